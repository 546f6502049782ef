"""Mixers made of scans against the published modules' outputs, for weights filled by name."""

import re

import golden
import pytest
import torch
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
