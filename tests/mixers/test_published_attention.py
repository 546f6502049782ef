"""Mixers made of attention and of global convolutions against the published modules' outputs, for filled weights."""

import re

import golden
import pytest
import torch
from torch.nn import functional as F

import visionmix
from visionmix.layers import OmniShift

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def under(tensors, prefix):
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# Restore-RWKV

_OMNI_SHIFT = {f"conv{size}x{size}.weight": f"weight{size}" for size in (1, 3, 5)} | {"alpha": "alpha"}
_RE_WKV = {"key.weight": "key.weight", "value.weight": "value.weight", "receptance.weight": "receptance.weight"}
_RE_WKV |= {"output.weight": "proj.weight", "spatial_decay": "decay", "spatial_first": "bonus"}


def omni_shift(tensors, dtype):
    layer = OmniShift(tensors["conv1x1.weight"].shape[0], dtype=dtype)
    layer.load_state_dict({ours: tensors[key] for key, ours in _OMNI_SHIFT.items()})
    return layer


def rwkv_block(x, tensors):
    """The published block: the mixer, then a feed-forward whose gate and whose input are shifted in all directions."""
    dim, dtype = x.shape[-1], x.dtype
    mixer = visionmix.create_mixer("recurrent_wkv", dim, dtype=dtype)
    own = {ours: tensors[f"att.{key}"] for key, ours in _RE_WKV.items()}
    shift = {f"shift.{ours}": tensors[f"att.omni_shift.{key}"] for key, ours in _OMNI_SHIFT.items()}
    mixer.load_state_dict(own | shift)
    x = x + tensors["gamma1"] * mixer(F.layer_norm(x, [dim], tensors["ln1.weight"], tensors["ln1.bias"]))
    y = F.layer_norm(x, [dim], tensors["ln2.weight"], tensors["ln2.bias"])
    y = omni_shift(under(tensors, "ffn.omni_shift."), dtype)(y)
    hidden = F.linear(y, tensors["ffn.key.weight"]).relu().square()
    gate = F.linear(y, tensors["ffn.receptance.weight"]).sigmoid()
    return x + tensors["gamma2"] * gate * F.linear(hidden, tensors["ffn.value.weight"])


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
