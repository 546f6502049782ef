"""Half precision: computing in float32 where it needs more digits, and gated products within float16's range."""

import torch
import torch.fx
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32 where it is of half precision, else itself; any shape."""
    return _at_least_float32(x)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


@torch.jit.ignore
def autocasts(x: Tensor) -> bool:
    """Return whether autocast would round products of `x` to half precision; a function that must not turns it off."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def scan_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a scan's result up to its norm, float32 at least: sums over a sequence outgrow float16."""
    return _scan_dtype(x)


@torch.fx.wrap
def _scan_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scaled_gate(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x * gate`` for a linear projection, in the type of `gate`, and the scale that `unscaled` undoes.

    A projection's result may be within float16's range where its input is not. In float16 each token (..., dim) is
    therefore divided by a power of two, the scale (..., 1), that brings it below 32768. In any other type nothing is
    divided, and the scale is empty.
    """
    return _scaled_gate(x, gate)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _scaled_gate(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    if gate.dtype != torch.float16:
        return (x * gate).to(gate.dtype), gate.new_zeros([0, gate.shape[-1]])
    return _scaled(x.float() * gate.float(), gate)


def scaled(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x`, a scan's result, for a linear projection in the type of `like`, and the scale; see `scaled_gate`."""
    return _scaled(x, like)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _scaled(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    if like.dtype != torch.float16:
        return x.to(like.dtype), like.new_zeros([0, x.shape[-1]])
    exponent = torch.log2(x.detach().abs().amax(dim=-1, keepdim=True) / 32768).ceil().clamp(min=0)
    scale = torch.exp2(exponent)
    return (x / scale).to(like.dtype), scale


def zero_token(x: Tensor) -> Tensor:
    """Return a token of zeros (1, dim) for float16 tokens x (..., dim), none (0, dim) in any other type."""
    return _zero_token(x)


@torch.fx.wrap
def _zero_token(x: Tensor) -> Tensor:
    return x.new_zeros([int(x.dtype == torch.float16), x.shape[-1]])


def unscaled(out: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the projection of the whole product from `out`, that of the product which `scaled_gate` divided.

    Args:
        out: The projection of what `scaled_gate` returned.
        scale: The scale that it returned.
        bias: The projection of `zero_token`, which is its bias; None where the projection has no bias.
    """
    return _unscaled(out, scale, bias)


@torch.fx.wrap
def _unscaled(out: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if out.dtype != torch.float16:
        return out
    wide = out.float() * scale
    if bias is not None:
        wide = wide - bias.float() * (scale - 1.0)
    return wide.to(out.dtype)
