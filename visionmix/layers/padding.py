"""Zeros around maps."""

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F


def pad(x: Tensor, amounts: list[int]) -> Tensor:
    """Return ``torch.nn.functional.pad(x, amounts)``, or `x` itself, uncopied, where every amount is 0."""
    return _pad(x, amounts)  # what torch.fx.wrap leaves whole it finds by the name in its own module alone


@torch.fx.wrap
def _pad(x: Tensor, amounts: list[int]) -> Tensor:
    # A compiled graph pads always: a branch on the size would compile once more.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if sum(amounts) == 0:
            return x
    return F.pad(x, amounts)
