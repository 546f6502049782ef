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


def circular(mixer, x, text):
    """The definition of CLEAR's attention, query by query."""
    _, height, width, _ = x.shape
    heads, factor, radius = mixer.num_heads, mixer.down_factor, (mixer.kernel_size[0] + 1) / 2
    q, k, v = mixer.qkv(torch.cat([text, x.flatten(1, 2)], dim=1)).unflatten(-1, (3, heads, -1)).unbind(2)
    count, maps = text.shape[1], []
    for each in (k, v):
        cells = each[:, count:].unflatten(1, (height, width))
        rows, columns = -(-height // max(1, factor)), -(-width // max(1, factor))
        cells = F.pad(cells, [0, 0, 0, 0, 0, columns * factor - width, 0, rows * factor - height]) if factor else cells
        squares = [
            (cells[:, factor * r : factor * (r + 1), factor * c : factor * (c + 1)]
             * mixer.down_weight[..., None, None]).sum(dim=(1, 2))
            for r in range(rows) for c in range(columns)
        ] if factor else []  # fmt: skip
        maps.append(torch.stack([*each.unbind(1), *squares], dim=1))
    k, v = maps
    out = []
    for i in range(q.shape[1]):
        seen = list(range(count + height * width)) if i < count else list(range(count))
        if i >= count:
            y, z = divmod(i - count, width)
            near = [divmod(j, width) for j in range(height * width)]
            seen += [count + j for j, (r, c) in enumerate(near) if (r - y) ** 2 + (c - z) ** 2 < radius**2]
            seen += range(count + height * width, k.shape[1])
        weights = (torch.einsum("bhc,bnhc->bnh", q[:, i], k[:, seen]) * mixer.scale).softmax(dim=1)
        out.append(torch.einsum("bnh,bnhc->bhc", weights, v[:, seen]).flatten(1))
    out = mixer.proj(torch.stack(out, dim=1))
    return out[:, count:].reshape(x.shape), out[:, :count]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("down_factor", [None, 2, 4])
@pytest.mark.parametrize("size", [(6, 9), (3, 5), (1, 1)])
def test_circular_window_and_smaller_map_equal_their_definition(size, down_factor, fused):
    torch.manual_seed(0)
    mixer = visionmix.create_mixer("circular_na", 16, num_heads=2, kernel_size=3, down_factor=down_factor).double()
    mixer.fused_attn = fused
    for value in mixer.parameters():
        torch.nn.init.normal_(value)
    x, text = grid(*size), torch.randn(2, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer.forward_with_text(x, text), circular(mixer, x, text))
    torch.testing.assert_close(mixer(x), circular(mixer, x, text[:, :0])[0])


def test_the_smaller_map_begins_as_means_and_needs_a_factor_of_one_or_more():
    mixer = visionmix.create_mixer("circular_na", 16, num_heads=2, down_factor=4)
    assert torch.equal(mixer.down_weight, torch.full((4, 4), 1 / 16))
    with pytest.raises(ValueError, match="down_factor=0 is too small"):
        visionmix.create_mixer("circular_na", 16, num_heads=2, down_factor=0)
