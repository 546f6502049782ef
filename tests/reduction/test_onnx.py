"""Files of reduced models whose numbers of tokens are fixed, with a batch of any size."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from visionmix import reduction
from visionmix.reduction.tokens import argsorted
from visionmix.tools.export_files import to_onnx
from visionmix.tools.export_runs import open_file

pytestmark = pytest.mark.long

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
OF_VIT = {
    "tome": {"r": 5},
    "mctf": {"r": 5},
    "mctf_fast": {},
    "evit": {"keep_rate": 0.6},
    "avit": {"gate_scale": 0.1, "gate_center": 1.0},
    "zero_tprune": {"layers": [0, 1], "keep_rates": [0.9, 0.6], "similar": 3},
    "dynamicvit": {"keep_rate": 0.6},
}
OF_VIM = [
    ("ssm_prune", {"keep_rate": 0.5, "layers": [0, 1]}),
    ("ssm_prune", {"keep_rate": 0.5, "layers": [0, 1], "released": True}),
    ("rmeeto", {"r": 3, "layers": [1, 2]}),
]


def equals_the_file(model: nn.Module, side: int, path) -> None:
    """Compare what `model` computes with what ONNX Runtime does, for the example's batch and for others."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    to_onnx(model, torch.randn(2, 3, side, side), path, dynamic={0: "batch"})
    run, _ = open_file(path)
    for batch in (2, 1, 7):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            expected = model(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", OF_VIT)
def test_a_reduced_vit_as_a_file(method, tmp_path):
    torch.manual_seed(0)
    # A head that pools over cells gets one token a cell, where tokens have been merged.
    model = VisionTransformer(**VIT, global_pool="avg" if method in ("tome", "avit") else "token")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    equals_the_file(reduction.apply(model.eval(), method, **OF_VIT[method]), 32, tmp_path / "model.onnx")


@pytest.mark.parametrize(("method", "options"), OF_VIM)
def test_a_reduced_vim_as_a_file(method, options, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vim_tiny", img_size=96, depth=3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("x_proj.weight", "in_proj.weight", "mixer.proj.weight", "head.fc.weight")):
                value.normal_(std=0.3)
    equals_the_file(reduction.apply(model.eval(), method, **options), 96, tmp_path / "model.onnx")


@pytest.mark.parametrize("descending", [True, False])
def test_equal_scores_go_by_position_in_a_file_too(descending, tmp_path):
    class Order(nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return argsorted(scores.flatten(1), descending).to(scores.dtype)

    pytest.importorskip("onnxruntime")
    scores = torch.randint(3, (5, 1, 1, 300), generator=torch.Generator().manual_seed(0)).float()
    to_onnx(Order(), scores, tmp_path / "order.onnx")
    run, _ = open_file(tmp_path / "order.onnx")
    expected = [sorted(range(300), key=lambda at: -row[at] if descending else row[at]) for row in scores.flatten(1)]
    assert run(scores).tolist() == expected
    assert Order()(scores).tolist() == expected
    assert torch.export.export(Order(), (scores,)).module()(scores).tolist() == expected
