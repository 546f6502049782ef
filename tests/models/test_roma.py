"""RoMA's ARM: its sizes, and files of its pre-training, which have one direction and no class token."""

import golden
import pytest
import timm
import torch
from torch.nn import functional as F

import visionmix
from visionmix.models import load_checkpoint


@pytest.mark.parametrize(("size", "millions"), [("tiny", "22.167"), ("small", "38.594"), ("base", "85.03")])
def test_parameters_are_the_published_codes(size, millions):
    with torch.device("meta"):
        params = sum(value.numel() for value in timm.create_model(f"roma_arm_{size}").parameters())
    digits = len(millions.partition(".")[2])
    assert f"{params / 1e6:.{digits}f}" == millions


def test_it_equals_the_published_code_in_float64():
    meta, arrays = golden.load("roma_arm_tiny")
    model = timm.create_model("roma_arm_tiny").eval()
    load_checkpoint(model, golden.state_dict(meta))
    expected = torch.from_numpy(arrays["logits"])
    with torch.no_grad(), visionmix.kernels.use("reference"):
        logits = model.double()(golden.image(224, 224).double())
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


def pretrained_file(dim, depth, cells):
    """Return tensors under the keys of a published file of the pre-training, drawn at random."""
    shapes = {"pos_embed": (1, cells, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    rank, hidden = -(-dim // 16), dim * 8 // 3
    for layer in range(depth):
        block = {
            "mixer.A_log": (dim, 16), "mixer.D": (dim,), "mixer.in_proj.weight": (2 * dim, dim),
            "mixer.conv1d.weight": (dim, 1, 4), "mixer.conv1d.bias": (dim,),
            "mixer.x_proj.weight": (rank + 32, dim), "mixer.dt_proj.weight": (dim, rank), "mixer.dt_proj.bias": (dim,),
            "mixer.out_proj.weight": (dim, dim), "mlp.w1.weight": (hidden, dim), "mlp.w1.bias": (hidden,),
            "mlp.w2.weight": (hidden, dim), "mlp.w2.bias": (hidden,), "mlp.w3.weight": (dim, hidden),
            "mlp.w3.bias": (dim,), "norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,),
            "norm2.bias": (dim,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{key}": shape for key, shape in block.items()}
    decoder = ("angle_embed", "ar_token", "dec_pos_embed", "mask", "enc2dec.weight", "dec_block.0.attn2.q.weight",
               "norm_1.weight", "norm_4.bias", "ar_norm.weight", "ar_pred.bias")  # fmt: skip
    shapes |= dict.fromkeys(decoder, (2,))
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def test_a_file_of_the_pretraining_begins_every_direction():
    torch.manual_seed(0)
    tensors = pretrained_file(32, 3, cells=25)
    model = timm.create_model("test_roma_arm")
    fresh = load_checkpoint(model, {"model": tensors})
    assert set(fresh) == {
        *("class_token.weight", "class_token.pos_embed", "norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias")
    }
    for layer, block in enumerate(model.blocks):
        for scan in block.mixer.scans:
            assert torch.equal(scan.A_log[0], tensors[f"layers.{layer}.mixer.A_log"])
            assert torch.equal(scan.delta_bias[0], tensors[f"layers.{layer}.mixer.dt_proj.bias"])
            assert torch.equal(scan.conv.weight, tensors[f"layers.{layer}.mixer.conv1d.weight"])
        gate = torch.cat([tensors[f"layers.{layer}.mlp.w{number}.weight"] for number in (1, 2)])
        assert torch.equal(block.mlp.fc1.weight, gate)
    square = tensors["pos_embed"].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    resampled = F.interpolate(square, (6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    assert torch.allclose(model.pos_embed.weight, resampled, atol=1e-5)
    del tensors["layers.1.mixer.D"]
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.mixer\.scans\.0\.D"):
        load_checkpoint(model, tensors)
