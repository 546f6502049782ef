"""Reduced models against what the published code computes, with the published keys' weights."""

import re
from functools import partial

import golden
import pytest
import timm
import torch
from accelerator import DEVICES
from timm.layers import LayerNorm

from visionmix import reduction

_EARLY = {"variant": "2022", "layers": (2, 5, 8), "keep_rates": (0.9, 0.8, 0.7)}
# Segmenter's ViT-S, whose norms have PyTorch's epsilon.
_SEGMENTER = ("deit_small_patch16_224", {"norm_layer": partial(LayerNorm, eps=1e-5)})
CASES = {
    "tome_deit_small_r8": ("deit_small_patch16_224", "tome", {"r": 8}),
    "tome_deit_small_r8_decreasing": ("deit_small_patch16_224", "tome", {"r": (8, -1.0)}),
    "tome_deit_small_r13": ("deit_small_patch16_224", "tome", {"r": 13}),
    "tome_deit_small_r13_noprop": ("deit_small_patch16_224", "tome", {"r": 13, "prop_attn": False}),
    "tome_deit_small_r13_decreasing": ("deit_small_patch16_224", "tome", {"r": (13, -1.0)}),
    "tome_deit_tiny_r16": ("deit_tiny_patch16_224", "tome", {"r": 16}),
    "tome_deit_small_r13_distilled": ("deit_small_distilled_patch16_224", "tome", {"r": 13}),
    "evit_deit_tiny_kr0.5": ("deit_tiny_patch16_224", "evit", {"keep_rate": 0.5}),
    "evit_deit_small_kr0.7": ("deit_small_patch16_224", "evit", {"keep_rate": 0.7}),
    "evit_deit_small_kr0.7_nofuse": ("deit_small_patch16_224", "evit", {"keep_rate": 0.7, "fuse": False}),
    "mctf_deit_tiny": ("deit_tiny_patch16_224", "mctf", {}),
    "mctf_deit_small": ("deit_small_patch16_224", "mctf", {}),
    "mctf_fast_deit_small": ("deit_small_patch16_224", "mctf_fast", {}),
    "mctf_fast_deit_tiny": ("deit_tiny_patch16_224", "mctf_fast", {}),
    "ats_deit_small_b1": ("deit_small_patch16_224", "ats", {}),
    "ats_deit_small": ("deit_small_patch16_224", "ats", {"released": True}),
    "avit_tiny": ("deit_tiny_patch16_224", "avit", {"gate_center": 30}),
    "avit_small": ("deit_small_patch16_224", "avit", {"gate_center": 75}),
    "avit_small_g10_c15": ("deit_small_patch16_224", "avit", {"gate_center": 15}),
    "avit_tiny_g10_c15": ("deit_tiny_patch16_224", "avit", {"gate_center": 15}),
    "zerotprune2022_deit_tiny_987": ("deit_tiny_patch16_224", "zero_tprune", _EARLY),
    "zerotprune2022_deit_small_987": ("deit_small_patch16_224", "zero_tprune", _EARLY),
    "dynamicvit_deit_small": ("deit_small_patch16_224", "dynamicvit", {}),
    "algm_vit_small": (_SEGMENTER, "algm", {"threshold": 0.0, "released": True}),
    "algm_vit_small_b1": (_SEGMENTER, "algm", {"threshold": 0.0}),
}
LONG = re.compile("_r8|_small_987|avit_small$|mctf_deit_small|dynamicvit").search
_PREDICTOR = {"in_conv.0": "norm", "in_conv.1": "proj", "out_conv.0": "fc1", "out_conv.2": "fc2", "out_conv.4": "fc3"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vim_tiny", pytest.param("vim_tiny_stride8", marks=pytest.mark.long)])
def test_pruned_vim_equals_the_published(name, device, tmp_path):
    """The published code runs one image; more are each as it would be alone."""
    meta, arrays = golden.load(f"topvim_{name}")
    torch.save({"model": golden.state_dict(meta)}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval().to(device)
    fast = reduction.apply(model, "ssm_prune", released=True)
    counts = []
    for block in fast.blocks:
        block.mixer.in_proj.register_forward_pre_hook(lambda layer, inputs: counts.append(inputs[0].shape[1]))
    image = golden.image(*meta["image_size"], batch=meta["batch"], seed=meta["seed"]).to(device)
    other = golden.image(*meta["image_size"], batch=1, seed=meta["seed"] + 1).to(device)
    with torch.no_grad():
        assert golden.relative_error(fast(image), arrays["logits"]) <= 1e-5
        assert counts == listed_tokens(meta, "into each block")
        assert golden.relative_error(fast(torch.cat([other, image]))[1:], arrays["logits"]) <= 1e-5


def listed_tokens(meta: dict, where: str) -> list[int]:
    """Return the numbers of tokens that the golden's note gives `where`, class token included."""
    note = meta["note"].partition(where)[2]
    counts = [int(count) for count in note[note.index("[") + 1 : note.index("]")].split(",")]
    return [count + 1 for count in counts] if "without cls" in meta["note"] else counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] if LONG(case) else []) for case in CASES])
def test_logits_equal_the_published(case, device):
    base, method, options = CASES[case]
    meta, arrays = golden.load(case)
    base, layers = (base, {}) if isinstance(base, str) else base
    with golden.quick_start():
        model = timm.create_model(base, **layers).eval()
    fast = reduction.apply(model, method, **options).to(device)
    fast.load_state_dict({_own_key(key): value for key, value in golden.state_dict(meta).items()})
    counts = []
    for block in fast.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, inputs: counts.append(inputs[0].shape[1]))
    image = golden.image(*meta["image_size"], batch=meta["batch"], seed=meta["seed"])
    with torch.no_grad():
        assert golden.relative_error(fast(image.to(device)), arrays["logits"]) <= 1e-5
    if meta["note"]:
        after = method == "zero_tprune"  # which prunes behind the feed-forward
        assert counts[after:] == listed_tokens(meta, "after each block")[: len(counts) - after]


def _own_key(key: str) -> str:
    """Return the key that a published predictor's tensor has here."""
    for published, own in _PREDICTOR.items():
        key = re.sub(rf"^score_predictor\.(\d)\.{re.escape(published)}\.", rf"reduction.predictors.\1.{own}.", key)
    return key


@pytest.mark.parametrize("device", DEVICES)
def test_merged_vim_equals_the_published(device, tmp_path):
    meta, arrays = golden.load("rmeeto_vim_tiny")
    torch.save({"model": golden.state_dict(meta)}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    model = timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval().to(device)
    fast = reduction.apply(model, "rmeeto", r=5)
    counts = []
    for block in fast.blocks:
        block.mixer.in_proj.register_forward_pre_hook(lambda layer, inputs: counts.append(inputs[0].shape[1]))
    image = golden.image(*meta["image_size"], batch=meta["batch"], seed=meta["seed"]).to(device)
    with torch.no_grad():
        assert golden.relative_error(fast(image), arrays["logits"]) <= 1e-5
    assert counts == [197 - 5 * (index // 2) for index in range(24)]
