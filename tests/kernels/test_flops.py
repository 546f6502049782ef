"""FLOP formulas in fvcore agree with PyTorch's counter."""

import pytest
import timm
import torch
from tiny_models import MIXING
from torch.utils.flop_counter import FlopCounterMode

import visionmix

fvcore = pytest.importorskip("fvcore.nn")


# One for every op. The others of one for every mixer are swept: those without a fused op are skipped there.
QUICK = ["test_a2mamba", "test_hrvmamba", "test_local_vim", "test_m2_vit", "test_plstm_vis", "test_spatial_mamba"]
QUICK += ["test_transnext", "test_vig", "test_vil", "test_vir"]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in MIXING if name not in QUICK)]
)
def test_fvcore_counts_half_of_pytorchs_flops(name):
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 64, 96)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
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


@pytest.mark.parametrize("biased", [False, True])
def test_fvcore_counts_softmax_attention(biased):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias if biased else None)

    q, k, v, bias = (torch.randn(2, 3, *shape) for shape in ((5, 8), (7, 8), (7, 4), (5, 7)))
    analysis = fvcore.FlopCountAnalysis(Attention(), (q, k, v, bias)).set_op_handle(
        **visionmix.kernels.fvcore_handles()
    )
    assert analysis.total() == 2 * 3 * 5 * 7 * (8 + 4)


@pytest.mark.parametrize(
    "name",
    [
        "test_agent_swin",
        "test_mavit",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("test_agent_deit_tiny", "test_agent_cswin")),
    ],
)
def test_fvcore_counts_as_much_without_fused_attention(name):
    images, totals = torch.randn(1, 3, 64, 96), []
    for fused in (False, True):
        timm.layers.set_fused_attn(fused)
        analysis = fvcore.FlopCountAnalysis(timm.create_model(name).eval(), images)
        analysis.set_op_handle(**visionmix.kernels.fvcore_handles())
        totals.append(analysis.unsupported_ops_warnings(False).total())
    assert totals[0] == totals[1]
