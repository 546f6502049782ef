"""FLOP formulas in fvcore agree with PyTorch's counter."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visionmix

fvcore = pytest.importorskip("fvcore.nn")


@pytest.mark.parametrize("name", [name for name in visionmix.models.list_family_models() if name.startswith("test_")])
def test_fvcore_counts_half_of_pytorchs_flops(name):
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 64, 96)
    with FlopCounterMode(display=False) as counter:
        model(images)
    ours = {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if str(op).startswith("vision")}
    if not ours:
        pytest.skip("it has no fused op")
    analysis = fvcore.FlopCountAnalysis(model, images).set_op_handle(**visionmix.kernels.fvcore_handles())
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = {
        f"visionmix.{op}": 2 * count for op, count in analysis.by_operator().items() if f"visionmix.{op}" in ours
    }
    assert counted == ours
