"""Mixers made of attention and of global convolutions against the published modules' outputs, for filled weights."""

import re

import golden
import pytest
import torch
from torch.nn import functional as F

import visionmix
from visionmix.layers import ChannelMix, PrimitiveMixture

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def under(tensors, prefix):
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# Restore-RWKV

_OMNI_SHIFT = {f"conv{size}x{size}.weight": f"weight{size}" for size in (1, 3, 5)} | {"alpha": "alpha"}
_RE_WKV = {"key.weight": "key.weight", "value.weight": "value.weight", "receptance.weight": "receptance.weight"}
_RE_WKV |= {"output.weight": "proj.weight", "spatial_decay": "decay", "spatial_first": "bonus"}


_CHANNEL_MIX = {f"{name}.weight": f"{name}.weight" for name in ("key", "value", "receptance")}


def loaded(layer, tensors, names):
    """Load the published tensors, among them those of the shift."""
    shift = {f"shift.{ours}": tensors[f"omni_shift.{key}"] for key, ours in _OMNI_SHIFT.items()}
    layer.load_state_dict({ours: tensors[key] for key, ours in names.items()} | shift)


def rwkv_block(x, tensors):
    """The published block: the mixer, then the feed-forward, each behind a norm and scaled by channel."""
    dim, dtype = x.shape[-1], x.dtype
    mixer, mlp = visionmix.create_mixer("recurrent_wkv", dim, dtype=dtype), ChannelMix(dim, dtype=dtype)
    loaded(mixer, under(tensors, "att."), _RE_WKV)
    loaded(mlp, under(tensors, "ffn."), _CHANNEL_MIX)
    for number, layer in enumerate((mixer, mlp), 1):
        weight, bias = tensors[f"ln{number}.weight"], tensors[f"ln{number}.bias"]
        x = x + tensors[f"gamma{number}"] * layer(F.layer_norm(x, [dim], weight, bias))
    return x


@both_precisions
def test_recurrent_wkv_in_its_block(dtype):
    meta, arrays = golden.load("restore_rwkv_block")
    tensors = {key: value.to(dtype) for key, value in golden.state_dict(meta).items()}
    with torch.no_grad():
        out = rwkv_block(golden.image(10, 14).permute(0, 2, 3, 1).to(dtype), tensors)
    assert golden.relative_error(out.permute(0, 3, 1, 2), arrays["logits"]) <= BOUNDS[dtype]


@both_precisions
def test_recurrent_wkv_in_restore_rwkv(dtype):
    """A U of four resolutions, each half a PixelUnshuffle away from the next, which corrects its image."""
    meta, arrays = golden.load("restore_rwkv")
    tensors = {key: value.to(dtype) for key, value in golden.state_dict(meta).items()}

    def conv(x, name):
        weight = tensors[f"{name}.weight"]
        return F.conv2d(x, weight, tensors.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def blocks(x, name):
        for index in range(sum(re.fullmatch(rf"{name}\.\d+\.gamma1", key) is not None for key in tensors)):
            x = rwkv_block(x.permute(0, 2, 3, 1), under(tensors, f"{name}.{index}.")).permute(0, 3, 1, 2)
        return x

    image = golden.image(24, 32, channels=1).to(dtype)
    with torch.no_grad(), golden.quick_start():
        encoded = [blocks(conv(image, "patch_embed"), "encoder_level1")]
        for level, name in ((2, "encoder_level2"), (3, "encoder_level3"), (4, "latent")):
            smaller = F.pixel_unshuffle(conv(encoded[-1], f"down{level - 1}_{level}.body.0"), 2)
            encoded.append(blocks(smaller, name))
        x = encoded.pop()
        for level in (3, 2, 1):
            x = torch.cat([F.pixel_shuffle(conv(x, f"up{level + 1}_{level}.body.0"), 2), encoded.pop()], dim=1)
            x = blocks(conv(x, f"reduce_chan_level{level}") if level > 1 else x, f"decoder_level{level}")
        out = conv(blocks(x, "refinement"), "output") + image
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


# CATANet

_AGGREGATION = {"iasa_attn.proj.weight": "proj.weight", "conv1x1.weight": "out.weight", "means": "centers"}


def token_aggregation(tensors, group_size, dtype):
    """Return the mixer with a published token aggregation block's tensors."""
    qkv = torch.cat([tensors[f"iasa_attn.to_{part}.weight"] for part in "qkv"])
    kv = torch.cat([tensors[f"irca_attn.to_{part}.weight"] for part in "kv"])
    own = {"qkv.weight": qkv, "center_kv.weight": kv, "started": tensors["initted"]}
    own |= {ours: tensors[key].flatten(1) for key, ours in _AGGREGATION.items()}
    centers, dim = tensors["means"].shape
    sizes = {"num_heads": 4, "qk_dim": 36, "num_centers": centers, "group_size": group_size}
    sizes["stable"] = False
    mixer = visionmix.create_mixer("token_aggregation", dim, **sizes, dtype=dtype)
    mixer.load_state_dict(own)
    return mixer.eval()


def in_patches(x, side, function):
    """Return the means, where patches overlap, of `function` of each: 2 cells of the next, more at the far border."""
    total, counts = torch.zeros_like(x), torch.zeros_like(x)
    starts = [[min(at, n - side) for at in range(0, n - 2, side - 2)] for n in x.shape[1:3]]
    for top in starts[0]:
        for left in starts[1]:
            patch = (slice(None), slice(top, top + side), slice(left, left + side))
            total[patch] += function(x[patch])
            counts[patch] += 1
    return total / counts


@both_precisions
def test_token_aggregation_in_catanet(dtype):
    """Super-resolution: eight times token aggregation, then attention in overlapping patches."""
    meta, arrays = golden.load("catanet_x2")
    tensors = golden.state_dict(meta)
    started = {key: torch.tensor(True) for key, _, _ in meta["kept"]}  # as the golden was made
    tensors = {key: value.to(dtype) for key, value in tensors.items()} | started

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, [40], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def conv(x, name):  # over maps whose channels come last
        weight, groups = tensors[f"{name}.weight"], x.shape[-1] // tensors[f"{name}.weight"].shape[1]
        y = F.conv2d(
            x.permute(0, 3, 1, 2), weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=groups
        )
        return y.permute(0, 2, 3, 1)

    def mlp(x, name):
        hidden = F.gelu(linear(x, f"{name}.fc1"))
        return linear(hidden + F.gelu(conv(hidden, f"{name}.dwconv.depthwise_conv.0")), f"{name}.fc2")

    def attention(x, name):
        y = norm(x, f"{name}.norm").flatten(1, 2)
        q, k, v = (linear(y, f"{name}.fn.to_{part}").unflatten(-1, (4, -1)).transpose(1, 2) for part in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + linear(y, f"{name}.fn.proj").reshape(x.shape)

    image = golden.image(40, 48).to(dtype)
    base = F.interpolate(image, scale_factor=2, mode="bilinear")
    with torch.no_grad(), golden.quick_start():
        x = first = conv(image.permute(0, 2, 3, 1), "first_conv")
        for index in range(8):
            name, shortcut = f"blocks.{index}", x
            block = under(tensors, f"{name}.0.")
            x = x + token_aggregation(block, (256, 128, 64, 32)[index % 4], dtype)(norm(x, f"{name}.0.norm"))
            x = x + mlp(norm(x, f"{name}.0.mlp.norm"), f"{name}.0.mlp.fn")
            side = (16, 20, 24, 28)[index % 4]
            x = in_patches(x, side, lambda patch, name=name: attention(patch, f"{name}.1.layer.0"))
            x = x + mlp(norm(x, f"{name}.1.layer.1.norm"), f"{name}.1.layer.1.fn")
            x = shortcut + conv(x, f"mid_convs.{index}")
        larger = F.pixel_shuffle(conv(x + first, "upconv").permute(0, 3, 1, 2), 2)
        out = conv(F.leaky_relu(larger, 0.1).permute(0, 2, 3, 1), "last_conv").permute(0, 3, 1, 2) + base
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


# SGConv, ScatterFormer, LightNet, CLEAR: modules on sequences

_SGCONV = {"D": "D", "output_linear.weight": "proj.weight", "output_linear.bias": "proj.bias"}


@both_precisions
@pytest.mark.parametrize("case", ["sgconv_cat", "sgconv_sum_bi"])
def test_structured_global_conv(case, dtype):
    meta, arrays = golden.load(case)
    tensors, kwargs = golden.state_dict(meta), meta["kwargs"]
    options = {"kernel_dim": 16, "mode": kwargs["mode"].removesuffix("_randn"), "grid_size": (8, 16)}
    options |= {"bidirectional": kwargs.get("bidirectional", False), "channels": kwargs.get("channels", 1)}
    options |= {key: kwargs[key] for key in ("decay_min", "decay_max") if key in kwargs}
    mixer = visionmix.create_mixer("structured_global_conv", 12, **options, dtype=dtype)
    own = {ours: tensors[key] for key, ours in _SGCONV.items()}
    own["pieces"] = torch.stack([tensors[f"kernel_list.{index}"] for index in range(4)])
    mixer.load_state_dict(own | {"kernel_norm": mixer.kernel_norm})
    mixer.set_kernel_norm()  # the golden's code takes it on its first call
    tokens = golden.image(16, 32).reshape(1, 12, 128).transpose(1, 2).to(dtype)
    with torch.no_grad():
        out = mixer(tokens.unflatten(1, (8, 16))).flatten(1, 2).transpose(1, 2)
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


@both_precisions
def test_scattered(dtype):
    meta, arrays = golden.load("scatterformer_sla")
    mixer = visionmix.create_mixer("scattered", 32, num_heads=4, dtype=dtype)
    mixer.load_state_dict(golden.state_dict(meta))
    window = torch.repeat_interleave(torch.arange(3), torch.tensor(meta["kwargs"]["counts"]))
    voxels = golden.image(16, 16).reshape(1, 24, 32).to(dtype)
    with torch.no_grad():
        out = mixer.forward_windows(voxels, window)
    assert golden.relative_error(out[0], arrays["logits"]) <= BOUNDS[dtype]


_LIGHTNET = {"g_proj.0.weight": "gate_down.weight", "g_proj.1.weight": "gate_up.weight", "g_norm.weight": "norm.weight"}


@both_precisions
def test_lightnet(dtype):
    meta, arrays = golden.load("lightnet_attention")
    tensors = golden.state_dict(meta)
    mixer = visionmix.create_mixer("lightnet", 48, num_heads=4, causal=True, dtype=dtype)
    own = {ours: tensors[key] for key, ours in (_LIGHTNET | {"o_proj.weight": "proj.weight"}).items()}
    mixer.load_state_dict(own | {"qkv.weight": torch.cat([tensors[f"{part}_proj.weight"] for part in "qkv"])})
    with torch.no_grad():
        out = mixer(golden.image(16, 16).reshape(1, 4, 4, 48).to(dtype)).flatten(1, 2)
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


@both_precisions
@pytest.mark.parametrize("case", ["clear_local", "clear_local_down"])
def test_circular_na_with_text(case, dtype):
    meta, arrays = golden.load(case)
    tensors, kwargs = golden.state_dict(meta), meta["kwargs"]
    if "spatial_weight" in tensors:
        tensors["down_weight"] = tensors.pop("spatial_weight").flatten().reshape(4, 4)
    options = {"kernel_size": 2 * kwargs["window_size"] - 1, "down_factor": kwargs.get("down_factor")}
    mixer = visionmix.create_mixer("circular_na", 24, num_heads=2, **options, dtype=dtype)
    mixer.load_state_dict(tensors)
    text, image = golden.image(17, 32).reshape(1, 68, 24).to(dtype).split([4, 64], dim=1)
    with torch.no_grad():
        image, text = mixer.forward_with_text(image.unflatten(1, (8, 8)), text)
    out = torch.cat([text, image.flatten(1, 2)], dim=1)
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


_MIXTURE = {"gate.gate": "gate", "experts.0": "dense", "experts.1": "shifted"}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=str)
def test_primitive_mixture(dtype, bound):
    """A layer of the mixer shift_add. The golden itself is of float32."""
    meta, arrays = golden.load("shiftadd_moe_fc")
    own = {}
    for key, value in golden.state_dict(meta).items():
        part, _, leaf = key.rpartition(".")
        own[f"{_MIXTURE[part]}.{leaf}"] = value
    layer = PrimitiveMixture(48, 64, dtype=dtype)
    layer.load_state_dict(own)
    with torch.no_grad():
        out = layer(golden.image(16, 16).reshape(1, 16, 48).to(dtype))
    assert golden.relative_error(out, arrays["logits"]) <= bound
