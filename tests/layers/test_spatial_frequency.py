"""Mamba-FCS's fusions against the published modules' outputs, for weights filled by name."""

import re

import golden
import pytest
import torch

from visionmix.layers import JointSpatialFrequency, PyramidFusion

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
_NAMES = [
    (r"^fft_pre\.proj\.", "before_spectrum."),
    (r"^fft_post\.proj\.", "after_spectrum."),
    (r"^reduce_conv\.", "reduce.0."),
    (r"^reduce_bn\.", "reduce.1."),
    (r"^ch_gate\.conv\.", "channel_conv."),
    (r"^(sp_gate|spatial_att)\.conv\.", "cell_conv."),
    (r"^branch1\.", "cell."),
    (r"^branch3\.", "near."),
    (r"^branch5\.", "far."),
    (r"^channel_att\.fc\.0\.", "fc1."),
    (r"^channel_att\.fc\.2\.", "fc2."),
    (r"^final_conv\.", "proj."),
]


def loaded(layer, meta):
    """Return `layer` in eval mode with all the published tensors but those of an attention that is never called."""
    tensors = {}
    for key, value in golden.state_dict(meta).items():
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("cross_attn."):
            tensors[name] = value
    layer.load_state_dict(tensors)
    return layer.eval()


@both_precisions
def test_joint_spatial_frequency(dtype):
    meta, arrays = golden.load("mambafcs_jsf")
    layer = loaded(JointSpatialFrequency(16), meta).to(dtype)
    maps = golden.image(16, 32, batch=2).reshape(2, 16, 8, 12).permute(0, 2, 3, 1).to(dtype)
    with torch.no_grad():
        out = layer(maps[:1], maps[1:]).permute(0, 3, 1, 2)
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


@both_precisions
def test_pyramid_fusion(dtype):
    meta, arrays = golden.load("mambafcs_pyramid")
    layer = loaded(PyramidFusion(16, 32), meta).to(dtype)
    x = golden.image(16, 32).reshape(1, 16, 8, 12).permute(0, 2, 3, 1).to(dtype)
    with torch.no_grad():
        out = layer(x).permute(0, 3, 1, 2)
    assert golden.relative_error(out, arrays["logits"]) <= BOUNDS[dtype]


@pytest.mark.parametrize("grid", [(1, 1), (5, 8)])
def test_fusions_train_on_any_grid_and_script(grid):
    before, after = torch.randn(2, 3, *grid, 12).unbind(0)
    fusion = torch.jit.script(JointSpatialFrequency(12, difference=False))
    pyramid = torch.jit.script(PyramidFusion(12, 12))
    out = pyramid(fusion(before, after))
    assert out.shape == before.shape
    out.square().sum().backward()
    for layer in (fusion, pyramid):
        assert all(value.grad is not None and value.grad.isfinite().all() for value in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fusion_in_half_precision(dtype):
    layer = JointSpatialFrequency(16).eval()
    before, after = (30 * torch.randn(2, 1, 9, 12, 16)).to(dtype).unbind(0)
    with torch.no_grad():
        expected = layer.double()(before.double(), after.double())
        with torch.autocast("cpu", dtype):
            assert (layer.float()(before.float(), after.float()) - expected).norm() <= 0.05 * expected.norm()
        out = layer.to(dtype)(before, after)
    assert out.dtype == dtype
    assert (out - expected).norm() <= 0.05 * expected.norm()


def test_pyramid_fusion_names_a_mistake():
    with pytest.raises(ValueError, match="reduction=16 leaves no hidden channel of dim=4; give at most 12"):
        PyramidFusion(8, 4)
