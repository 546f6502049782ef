"""Neighborhood attention on maps smaller than its window."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

import visionmix

GRIDS = [(4, 9), (5, 3), (12, 10)]


def build(name="na", **options):
    torch.manual_seed(0)
    mixer = visionmix.create_mixer(name, 16, num_heads=2, kernel_size=3, dilation=2, **options).double()
    torch.nn.init.normal_(mixer.qkv.weight)
    return mixer


def outputs_and_gradients(function, x, parameters):
    out = function(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *parameters])]


def grid(height, width):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(2, height, width, 16, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_small_maps_are_padded_before_the_projection(height, width, qkv_bias):
    mixer = build(qkv_bias=qkv_bias)

    def padded(x):
        return mixer(F.pad(x, [0, 0, 0, max(0, 6 - width), 0, max(0, 6 - height)]))[:, :height, :width]

    x, parameters = grid(height, width), list(mixer.parameters())
    torch.testing.assert_close(
        outputs_and_gradients(mixer, x, parameters), outputs_and_gradients(padded, x, parameters)
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_one_graph_trains_on_maps_smaller_and_larger_than_the_window(backend):
    mixer = build()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=backend)
    for size in GRIDS:
        x, parameters = grid(*size), list(mixer.parameters())
        ours, expected = (outputs_and_gradients(function, x, parameters) for function in (compiled, mixer))
        torch.testing.assert_close(ours, expected)
    assert counters["stats"]["unique_graphs"] == 1
