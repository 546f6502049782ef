"""The type that a part of a model computes in."""

import torch
import torch.fx
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32 where it is of half precision, else itself; any shape."""
    return _at_least_float32(x)  # what torch.fx.wrap leaves whole it finds by the name in its own module alone


def scan_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a scan's result up to its norm, float32 at least: sums over a sequence outgrow float16."""
    return _scan_dtype(x)


@torch.fx.wrap
def _scan_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.fx.wrap
def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
