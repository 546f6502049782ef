"""Mixers whose parameters are all drawn at random, biases and positions too: none hides behind a 0 or a 1."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visionmix import create_mixer


def drawn_mixer(name: str, *, std: float = 0.3, **options: Any) -> nn.Module:
    """Return the mixer of 12 channels with `options`, its parameters normal numbers of this deviation."""
    torch.manual_seed(0)
    mixer = create_mixer(name, 12, **options)
    for value in mixer.parameters():
        nn.init.normal_(value, std=std)
    return mixer


def check_definition(
    mixer: nn.Module, defined: Callable[..., Tensor], shape: tuple[int, ...], *, atol: float = 1e-12, rtol: float = 1e-8
) -> None:
    """Assert that a `mixer` of float64 computes what its definition, called with it and x of this shape, does.

    Args:
        mixer: The mixer.
        defined: Its definition.
        shape: Of x.
        atol: How far results may lie apart.
        rtol: How far gradients may lie apart, of their size; a hundredth of it where they are near 0.
    """
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x), defined(mixer, x)
    assert torch.allclose(out, expected, atol=atol)
    leaves, grad = [x, *mixer.parameters()], torch.randn_like(out)
    grads, wanted = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for own, other in zip(grads, wanted, strict=True):
        assert torch.allclose(own, other, rtol=rtol, atol=rtol / 100)


def check_half_precision(
    mixer: nn.Module, x: Tensor, defined: Callable[..., Tensor], dtype: torch.dtype, autocast: bool
) -> None:
    """Assert that `mixer`, under autocast or converted to `dtype`, has finite gradients on x (batch, height, width, 12)
    and computes what its definition, called with a mixer and a map in float64, does, within some roundings.
    """
    low = mixer if autocast else mixer.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = low(x if autocast else x.to(dtype))
    out.float().square().mean().backward()
    assert all(torch.isfinite(value.grad).all() for value in low.parameters())
    with torch.no_grad():
        expected = defined(low.double(), x.double() if autocast else x.to(dtype).double())
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()
