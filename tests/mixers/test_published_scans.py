"""Mixers made of scans against the published modules' outputs, for weights filled by name."""

import re

import golden
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import visionmix

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
_BRANCHES = {"": "scan", "_b": "reordered_scan"}


def loaded(mixer, tensors):
    """Return `mixer` in eval mode with `tensors`, which are all of its own, each under its shape there."""
    own = mixer.state_dict()
    shaped = {name: tensor.reshape(own[name].shape) for name, tensor in tensors.items()}
    mixer.load_state_dict(shaped)
    return mixer.eval()


def reordering_key(key):
    """Return the name of SR-Mamba's tensor `key` here."""
    if match := re.fullmatch(r"(A|D|conv1d|x_proj|dt_proj)(_b)?(?:_log)?(\.\w+)?", key):
        part, branch, leaf = (group or "" for group in match.groups())
        name = {"A": "A_log", "conv1d": f"conv{leaf}", "dt_proj": f"delta_{leaf[1:]}"}.get(part, part + leaf)
        return f"{_BRANCHES[branch]}.{name}"
    return key.replace("out_proj", "proj")


@both_precisions
def test_sequence_reordering(dtype):
    meta, arrays = golden.load("srmamba_block")
    mixer = visionmix.create_mixer("sequence_reordering", 48, rate=5)
    loaded(mixer, {reordering_key(key): value for key, value in golden.state_dict(meta).items()}).to(dtype)
    tokens = golden.image(16, 16).reshape(1, 16, 48).to(dtype)
    out = mixer(tokens.unsqueeze(1)).squeeze(1)
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


@both_precisions
def test_sequence_reordering_in_mambamil(dtype):
    meta, arrays = golden.load("mambamil_srmamba")
    tensors = {key: value.to(dtype) for key, value in golden.state_dict(meta).items()}

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, [512], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    with torch.no_grad(), golden.quick_start():
        x = F.gelu(linear(golden.image(168, 128).reshape(1, 63, 1024).to(dtype), "_fc1.0"))
        for layer in ("layers.0", "layers.1"):
            mixer = visionmix.create_mixer("sequence_reordering", 512, rate=10, dtype=dtype)
            prefix = f"{layer}.1."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            loaded(mixer, {reordering_key(key): value for key, value in own.items()})
            x = x + mixer(norm(x, f"{layer}.0").unsqueeze(1)).squeeze(1)
        x = norm(x, "norm")
        weights = linear(linear(x, "attention.0").tanh(), "attention.2").softmax(dim=1)
        logits = linear((weights * x).sum(dim=1), "classifier")
    assert golden.relative_error(logits, arrays["logits"]) <= BOUNDS[dtype]


def test_sequence_reordering_refuses_a_rate_below_one():
    with pytest.raises(ValueError, match="rate=0 is too small"):
        visionmix.create_mixer("sequence_reordering", 24, rate=0)


_LAMAMBA = {
    "x_proj_weight": "scan.x_proj.weight",
    "dt_projs_weight": "scan.delta_weight",
    "dt_projs_bias": "scan.delta_bias",
    "A_logs": "scan.A_log",
    "Ds": "scan.D",
    "out_norm": "norm",
    "out_proj": "proj",
    "conv2d": "conv",
}


def renamed(key):
    """Return the name of the tensor `key` of a published scan over maps here."""
    for published, ours in _LAMAMBA.items():
        if key == published or key.startswith(f"{published}."):
            return ours + key.removeprefix(published)
    return key


@both_precisions
@pytest.mark.parametrize("shift", [0, 2])
def test_local_attention_mamba(shift, dtype):
    """The published block, put together from the mixer's parts with its modulation and its MLP."""
    meta, arrays = golden.load(f"lamamba_block_shift{shift}")
    tensors = {key: value.to(dtype) for key, value in golden.state_dict(meta).items()}
    mixer = visionmix.create_mixer("local_attention_mamba", 12, num_heads=3, window_size=4, shift=shift > 0)
    names = {"norm_swin.": "norm.", "attn.": "attention."}
    own = {f"scan.{renamed(key[3:])}": value for key, value in tensors.items() if key.startswith("op.")}
    for key, value in tensors.items():
        for published, ours in names.items():
            if key.startswith(published) and not key.endswith("index"):
                own[key.replace(published, ours).replace("relative_position_bias_table", "bias_table")] = value
    loaded(mixer, own).to(dtype)

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, [12], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = golden.image(16, 16).reshape(1, 12, 8, 8).permute(0, 2, 3, 1).to(dtype)
    with torch.no_grad():
        condition = x.mean(dim=(1, 2), keepdim=True)
        shifts_scales_gates = linear(F.silu(condition), "adaLN_modulation.1").chunk(9, dim=-1)
        branches = [
            ("norm", mixer.scan),
            ("norm_swin", mixer.attention),
            ("norm2", lambda y: linear(F.gelu(linear(y, "mlp.fc1")), "mlp.fc2")),
        ]
        for branch, (name, function) in enumerate(branches):
            move, scale, gate = shifts_scales_gates[3 * branch : 3 * branch + 3]
            x = x + gate * function(norm(x, name) * (1 + scale) + move)
    assert golden.relative_error(x, arrays["logits"]) <= BOUNDS[dtype]


def interleaved(tensors=None, dim=3, **options):
    """Return the mixer with the published module's tensors, by default those of 3 channels."""
    own = {}
    for key, value in (tensors or golden.state_dict(golden.load("vfimamba_ss2d")[0])).items():
        name = renamed(key)
        if name.startswith("scan."):
            own |= {f"scans.{at}.{name[5:]}": part for at, part in enumerate(value.chunk(4))}
        else:
            own[name] = value
    return loaded(visionmix.create_mixer("interleaved_scan", dim, **options), own)


@both_precisions
def test_interleaved_scan(dtype):
    _, arrays = golden.load("vfimamba_ss2d")
    pair = golden.image(6, 8, batch=2).permute(0, 2, 3, 1).unsqueeze(0).to(dtype)
    with torch.no_grad():
        out = interleaved(published_inverse=True).to(dtype)(pair)
    assert golden.relative_error(out[0], arrays["logits"]) <= BOUNDS[dtype]


@both_precisions
def test_interleaved_scan_in_vfimamba(dtype):
    """The features of two frames: convolutions at strides 1, 2 and 4, then blocks of the mixer at strides 8 and 16."""
    meta, arrays = golden.load("vfimamba_s_features")
    tensors = {key: value.to(dtype) for key, value in golden.state_dict(meta).items()}

    def weights(name):
        return tensors[f"{name}.weight"], tensors.get(f"{name}.bias")

    def conv(x, name, **options):
        weight, bias = weights(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, **options)

    def norm(x, name):  # over the channels of maps
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *weights(name)).permute(0, 3, 1, 2)

    def prelu(x, name):
        return F.prelu(x, weights(name)[0])

    def scan(x, prefix):
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        mixer = interleaved(own, x.shape[1], published_inverse=True, dtype=dtype)
        frames = torch.stack(x.permute(0, 2, 3, 1).chunk(2), dim=1)
        return mixer(frames).transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)

    def look(x, name):  # convolutions, whose channels are weighed
        x = conv(F.gelu(conv(x, f"{name}.0")), f"{name}.2")
        weight = conv(x.mean((2, 3), keepdim=True), f"{name}.3.attention.1").relu()
        return x * conv(weight, f"{name}.3.attention.3").sigmoid()

    x, features = torch.cat(golden.image(32, 96).to(dtype).chunk(2, dim=3)), []
    with torch.no_grad(), golden.quick_start():
        for stage, depth in enumerate(meta["kwargs"]["depths"]):
            if stage < meta["kwargs"]["conv_stages"]:
                if stage:
                    x = prelu(conv(x, f"patch_embed{stage}.0", stride=2), f"patch_embed{stage}.1")
                for layer in range(depth):
                    x = prelu(conv(x, f"block{stage}.conv.{2 * layer}"), f"block{stage}.conv.{2 * layer + 1}")
            else:
                x = conv(norm(x, f"patch_embed{stage}.norm"), f"patch_embed{stage}.proj", stride=2)
                for layer in range(depth):
                    block = f"block{stage}.blocks.{layer}"
                    first, second = (tensors[f"{block}.skip_scale{end}"][:, None, None] for end in ("", "2"))
                    x = x * first + scan(norm(x, f"{block}.ln_1"), f"{block}.self_attention.")
                    x = x * second + look(norm(x, f"{block}.ln_2"), f"{block}.conv_blk.cab")
            features.append(x)
    for ours, name in zip(features[-3:], ("out0", "out1", "out2"), strict=True):
        assert golden.relative_error(ours, arrays[name]) <= BOUNDS[dtype]


@pytest.mark.parametrize("order", ["raster", "snake", "window_3"])
def test_interleaved_scan_brings_every_token_back_to_its_place(order):
    """Without memory each token sees its own cell alone, whatever the order."""
    mixer = interleaved(order=order).double()
    with torch.no_grad():
        for scan in mixer.scans:
            scan.A_log.fill_(20.0)  # each state is forgotten at the next step
            for name in ("x_proj.weight", "delta_weight", "delta_bias", "D"):
                scan.get_parameter(name).copy_(mixer.scans[0].get_parameter(name))
        frames = torch.randn(2, 3, 5, 7, 3, dtype=torch.float64)
        alone = torch.stack([mixer(frame) for frame in frames.unbind(1)], dim=1)
        assert torch.allclose(mixer(frames), alone, atol=1e-12)


def test_interleaved_scan_of_frames_is_the_scan_of_them_side_by_side():
    """Cells of two frames in turns are the columns of a map of twice the width, as its rows are read."""
    mixer = interleaved()
    frames = torch.randn(1, 2, 4, 5, 3)
    for at in (1, 3):  # the columns' scans out of the sum
        for name in ("x_proj.weight", "D"):
            nn.init.zeros_(mixer.scans[at].get_parameter(name))
    with torch.no_grad():
        nn.init.zeros_(mixer.conv.weight)[:, :, 1, 1] = 1.0
        nn.init.zeros_(mixer.conv.bias)
        wide = frames.permute(0, 2, 3, 1, 4).reshape(1, 4, 10, 3)
        expected = mixer(wide).reshape(1, 4, 5, 2, 3).permute(0, 3, 1, 2, 4)
        assert torch.allclose(mixer(frames), expected, atol=1e-6)
