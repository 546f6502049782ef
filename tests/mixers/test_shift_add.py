"""ShiftAddViT's attention and linear layers against their definitions."""

import math
from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import PrimitiveMixture, ShiftLinear

shift_add = partial(drawn_mixer, "shift_add", num_heads=3)


def powers(layer):
    """The definition: one weight at a time."""
    weight = torch.zeros_like(layer.shift)
    for index in range(weight.numel()):
        exponent = round(min(0.0, max(-14.0, layer.shift.flatten()[index].item())))
        sign = round(layer.sign.flatten()[index].item())
        weight.view(-1)[index] = (sign > 0) * 2.0**exponent - (sign < 0) * 2.0**exponent
    return weight


def fixed(x):
    return ((x * 65536).floor() / 65536).clamp(-(2**15), 2**15 - 1)


def projected(layer, x):
    """The definition: each token by one of two layers."""
    if isinstance(layer, torch.nn.Linear):
        return layer(x)
    shifted = layer.shifted
    bias = None if shifted.bias is None else fixed(shifted.bias)
    first, second = layer.gate(x).unbind(-1)
    return torch.where((first >= second)[..., None], layer.dense(x), F.linear(fixed(x), powers(shifted), bias))


def defined(mixer, x):
    rows = []
    for image in x:
        qkv = projected(mixer.qkv, image.flatten(0, 1)).unflatten(-1, (3, mixer.num_heads, -1))
        q, k, v = qkv.unbind(1)
        q, k = (each / each.norm(dim=-1, keepdim=True) for each in (q, k))
        q, k = ((each > each.mean()).to(each.dtype) for each in (q, k))
        y = v / 2 + torch.einsum("nhc,mhc,mhd->nhd", q, k, v) / math.pi
        y = y / y.norm(dim=-1, keepdim=True)
        reach = mixer.conv.weight.shape[2] // 2
        for t in range(len(v)):
            for step in range(-reach, reach + 1):
                if 0 <= t + step < len(v):
                    y[t] += mixer.conv.weight[:, 0, step + reach] * v[t + step]
        rows.append(projected(mixer.proj, y.flatten(1)))
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "kernel_size": 3}, {"mixture": True}])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 3)])
def test_shift_add_equals_definition(grid, options):
    mixer = shift_add(std=1.0, **options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-10)


def test_binary_queries_have_the_gradient_of_a_clamp():
    mixer = shift_add().double()
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    mixer(x).sum().backward()
    grads = mixer.qkv.weight.grad.unflatten(0, (3, -1))
    assert all(each.any() for each in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_linear(dtype):
    torch.manual_seed(0)
    layer = ShiftLinear(6, 5, dtype=dtype)
    with torch.no_grad():
        layer.shift[0, :2], layer.sign[0, :3] = torch.tensor([-20.0, 3.0], dtype=dtype), 0.4
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    out = layer(x)
    assert torch.allclose(out, F.linear(fixed(x), powers(layer), fixed(layer.bias)), atol=1e-6)
    grad = torch.randn_like(out)
    own = torch.autograd.grad(out, [x, layer.shift, layer.sign, layer.bias], grad)
    weight_grad = grad.T @ fixed(x)
    wanted = [grad @ powers(layer), weight_grad * powers(layer) * math.log(2), weight_grad, grad.sum(0)]
    for ours, theirs in zip(own, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_gate_of_a_mixture_learns_which_layer_is_better():
    torch.manual_seed(0)
    layer = PrimitiveMixture(4, 4)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor([0.0, 0.1]))
    x = torch.randn(64, 4)
    target = layer.dense(x).detach()
    for _ in range(20):
        layer.zero_grad()
        (layer(x) - target).square().mean().backward()
        with torch.no_grad():
            layer.gate.bias -= layer.gate.bias.grad
    assert torch.equal(layer(x), target)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype, mixture):
    """No more: a rounding that moves a channel over the mean makes a 1 of a 0."""
    mixer = shift_add(mixture=mixture)
    x = 30 * torch.randn(1, 30, 30, 12)
    with torch.autocast("cpu", dtype):
        assert mixer(x).isfinite().all()
    out = mixer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("shift_add", 12, num_heads=5)
    with pytest.raises(ValueError, match="kernel_size=4 is even"):
        create_mixer("shift_add", 12, kernel_size=4)
