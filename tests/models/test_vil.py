"""Vision-LSTM: one pair in float32, the whole model in float64, the keys of training files, other sizes."""

import golden
import pytest
import timm
import torch

import visionmix


def load(case: str, rename=lambda key: key, **options) -> torch.nn.Module:
    tensors = {rename(key): value for key, value in golden.state_dict(golden.load(case)[0]).items()}
    overlay = {"state_dict": {"state_dict": tensors}}
    with golden.quick_start():
        return timm.create_model("vil_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def as_trained(key: str) -> str:
    """Return the training code's name of a tensor, from the hub's."""
    for pair in range(12):
        for index, name in enumerate(("rowwise_from_top_left", "rowwise_from_bot_right")):
            key = key.replace(f"blocks.{pair}.{name}.norm.", f"xlstm.blocks.{2 * pair + index}.xlstm_norm.")
            key = key.replace(f"blocks.{pair}.{name}.layer.conv.", f"xlstm.blocks.{2 * pair + index}.xlstm.conv1d.")
            key = key.replace(f"blocks.{pair}.{name}.layer.", f"xlstm.blocks.{2 * pair + index}.xlstm.")
    if key.startswith("norm."):
        return key.replace("norm.", "xlstm.post_blocks_norm.")
    if key.startswith(("legacy_norm.", "head.")):
        return key.replace("head.", "head.1.").replace("legacy_norm.", "head.0.")
    return key if key.startswith("xlstm.") else f"xlstm.{key}"


def test_keys_of_training_files():
    ours, theirs = (load("vil_tiny", rename).state_dict() for rename in (lambda key: key, as_trained))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_positions_are_resampled_as_published():
    """Logits of the published code, built with one pair at 256 pixels, whose 14x14 positions it resamples."""
    model = load("vil_tiny__depth1", depth=1, img_size=256)
    with torch.no_grad(), visionmix.kernels.use("reference"):
        logits = model.double()(golden.image(256, 256).double())
    expected = torch.tensor([-0.6804809, 0.3165904, -0.0882035, 1.1916486, 0.6232288, 0.7976470])
    assert torch.allclose(logits[0, :6].float(), expected, atol=1e-6)
    assert logits.abs().max().item() == pytest.approx(3.1518863, abs=1e-6)
