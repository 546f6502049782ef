"""Maps at other sizes, in eager mode and in graphs."""

import pytest
import torch
from torch.nn import functional as F

from visionmix.layers import pool_map, resample_map
from visionmix.tools.export_files import to_onnx
from visionmix.tools.export_runs import open_file


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_maps_are_resampled_and_left_alone_at_their_own_size(mode):
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    assert resample_map(x, 5, 7, mode) is x
    expected = F.interpolate(x.permute(0, 3, 1, 2), (8, 6), mode=mode).permute(0, 2, 3, 1)
    assert torch.equal(resample_map(x, 8, 6, mode), expected)
    low = x.bfloat16()
    high = F.interpolate(low.float().permute(0, 3, 1, 2), (8, 6), mode=mode).permute(0, 2, 3, 1)
    assert torch.equal(resample_map(low, 8, 6, mode), high.bfloat16())


@pytest.mark.parametrize(("dynamic", "graphs"), [(False, [False, True]), (True, [True])])
def test_a_graph_of_one_size_holds_no_needless_resampling(dynamic, graphs):
    """Compiled for fixed sizes there is none at the built one; compiled for all sizes one graph serves them."""
    resamples = []

    def backend(module, examples):
        resamples.append(any(node.target is torch.matmul for node in module.graph.nodes))
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: resample_map(x, 6, 8) + 1, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in ((6, 8), (4, 8), (6, 8)):
        x = torch.randn(1, *size, 3)
        assert torch.allclose(compiled(x), resample_map(x, 6, 8) + 1, atol=1e-6)
    assert resamples == graphs


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(1, 1), (3, 11), (7, 9), (20, 2)])
def test_compiled_resampling_equals_eager(size, mode):
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: resample_map(x, *size, mode), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), resample_map(x, *size, mode), atol=1e-12)


def test_scripted_and_traced_resampling_follows_the_size():
    class Resample(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return resample_map(x, 6, 8)

    scripted, traced = torch.jit.script(Resample()), torch.fx.symbolic_trace(Resample())
    for size in ((6, 8), (4, 8), (7, 3)):
        x = torch.randn(2, *size, 3)
        assert torch.equal(scripted(x), resample_map(x, 6, 8))
        assert torch.equal(traced(x), resample_map(x, 6, 8))


@pytest.mark.parametrize("size", [(9, 4), *(pytest.param(size, marks=pytest.mark.long) for size in ((4, 5), (6, 8)))])
def test_onnx_runtime_makes_maps_larger_and_smaller(size, tmp_path):
    pytest.importorskip("onnxruntime")

    class Resample(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return resample_map(resample_map(x, 6, 8) * 2, x.shape[1], x.shape[2])

    x = torch.randn(2, *size, 3)
    to_onnx(Resample(), x, tmp_path / "model.onnx")
    run, _ = open_file(tmp_path / "model.onnx")
    assert torch.allclose(run(x), Resample()(x), atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (7, 5), (2, 3)])
def test_pooling_is_adaptive_average_pooling(size):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (2, 3)).permute(0, 2, 3, 1)
    assert torch.allclose(pool_map(x, 2, 3), expected, atol=1e-12)
