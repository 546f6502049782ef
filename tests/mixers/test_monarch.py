"""Monarch Mixer: its token mixer against the formula, token by token, and its feed-forward of blocks."""

import math

import pytest
import timm
import torch
from drawn import check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import MonarchLinear, MonarchMlp


def kernel_of(network, length):
    rows = []
    for i in range(length):
        angles = 2 * math.pi * i / network.max_length * torch.linspace(1e-4, network.bands - 1, network.bands).double()
        t = i / (network.max_length - 1)
        h = torch.cat([torch.tensor([t]).double(), angles.cos(), -angles.sin()])
        for layer in network.layers:
            h = torch.sin(network.frequency * layer(h))
        decays = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, network.dim).double()
        rows.append(network.out(h) * torch.exp(-t * decays))
    return torch.stack(rows)


def definition(mixer, x):
    _, height, width, dim = x.shape
    length = height * width
    projected = mixer.in_proj(x.flatten(1, 2))
    taps = mixer.conv.weight.shape[2]
    short = []
    for i in range(length):
        seen = [(tap, i - taps + 1 + tap) for tap in range(taps) if i - taps + 1 + tap >= 0]
        short.append(mixer.conv.bias + sum(mixer.conv.weight[:, 0, tap] * projected[:, j] for tap, j in seen))
    before, after, v = torch.stack(short, 1).split(dim, dim=-1)
    u, kernel = before * v, kernel_of(mixer.kernel, length)
    out = []
    for i in range(length):
        y = mixer.D * u[:, i] + sum(kernel[i - j] * u[:, j] for j in range(i + 1))
        if mixer.reverse is not None:
            reverse = kernel_of(mixer.reverse, length)
            y = y + sum((reverse[j - i - 1] * u[:, j] for j in range(i + 1, length)), start=torch.zeros_like(y))
        out.append(mixer.proj(after[:, i] * y))
    return torch.stack(out, 1).unflatten(1, (height, width))


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"kernel_size": 3, "filter_depth": 0, "bands": 2, "max_length": 9}]
)
@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (4, 3)])
def test_monarch_equals_definition(grid, options):
    mixer = drawn_mixer("monarch", filter_dim=8, **options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), definition(mixer, x), atol=1e-12)


def test_only_both_directions_see_later_tokens():
    x = torch.randn(1, 3, 4, 12)
    later = x.clone()
    later[:, 2, 3] += 1
    for bidirectional in (False, True):
        mixer = drawn_mixer("monarch", bidirectional=bidirectional)
        with torch.no_grad():
            same = (mixer(x) - mixer(later)).flatten(1, 2)[:, :-1].abs().max() < 1e-5
        assert same != bidirectional


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_products_of_three(dtype, autocast):
    mixer = drawn_mixer("monarch", filter_dim=8)
    check_half_precision(mixer, 10 * torch.randn(2, 3, 5, 12), definition, dtype, autocast)


def test_kernels_are_not_decayed():
    model = timm.create_model("test_m2_vit")
    assert {name for name, _ in model.named_parameters() if ".mixer.kernel." in name} <= model.no_weight_decay()


@pytest.mark.parametrize("order", [1, 2])
def test_the_linear_layer_is_one_of_a_matrix(order):
    torch.manual_seed(0)
    layer = MonarchLinear(16, 20, order=order).double()
    with torch.no_grad():
        torch.nn.init.normal_(layer.bias)
        matrix = (layer(torch.eye(16, dtype=torch.float64)) - layer.bias).T
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    assert torch.allclose(layer(x), F.linear(x, matrix, layer.bias), atol=1e-12)
    inside = torch.block_diag(*torch.ones(4, 5, 4)) != 0
    # A block-diagonal matrix keeps its blocks apart; one of order 2 mixes all channels.
    assert torch.equal(matrix != 0, inside if order == 1 else torch.ones_like(inside))


def test_the_feed_forward_follows_autocast():
    layer, x = MonarchMlp(12), torch.randn(2, 3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), layer(x), atol=2e-2 * layer(x).abs().max().item())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="kernel_size=0 is too small; give 1 or more"):
        create_mixer("monarch", 12, kernel_size=0)
    with pytest.raises(ValueError, match="max_length=1 is too small; give 2 or more"):
        create_mixer("monarch", 12, max_length=1)
    with pytest.raises(ValueError, match="num_blocks=4 does not divide 10 channels in and 40 out"):
        MonarchMlp(10)
    with pytest.raises(ValueError, match="order=3 is unknown"):
        MonarchLinear(12, 12, order=3)


def test_the_base_model_has_the_papers_45_million_parameters():
    model = timm.create_model("m2_vit_base", device="meta")
    assert sum(value.numel() for value in model.parameters()) == 45_554_920
