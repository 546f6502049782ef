"""Reduced models against what the published code computes, with the published keys' weights."""

import golden
import pytest
import timm
import torch
from accelerator import DEVICES

from visionmix import reduction

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
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vim_tiny", "vim_tiny_stride8"])
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
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if "_r8" in case else []) for case in CASES]
)
def test_logits_equal_the_published(case, device):
    base, method, options = CASES[case]
    meta, arrays = golden.load(case)
    with golden.quick_start():
        model = timm.create_model(base).eval()
    model.load_state_dict(golden.state_dict(meta))
    fast = reduction.apply(model.to(device), method, **options)
    counts = []
    for block in fast.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, inputs: counts.append(inputs[0].shape[1]))
    image = golden.image(*meta["image_size"], batch=meta["batch"], seed=meta["seed"])
    with torch.no_grad():
        assert golden.relative_error(fast(image.to(device)), arrays["logits"]) <= 1e-5
    assert counts == listed_tokens(meta, "after each block")
