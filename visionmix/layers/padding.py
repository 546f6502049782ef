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


def pad_to(x: Tensor, least: int) -> Tensor:
    """Return x (batch, height, width, dim) with zeros below and on the right, up to `least` rows and columns."""
    return _pad_to(x, least)


@torch.fx.wrap
def _pad_to(x: Tensor, least: int) -> Tensor:
    # As above, and Python's own max would be such a branch.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if x.shape[1] >= least and x.shape[2] >= least:
            return x
        return F.pad(x, [0, 0, 0, max(0, least - x.shape[2]), 0, max(0, least - x.shape[1])])
    return F.pad(x, [0, 0, 0, torch.sym_max(0, least - x.shape[2]), 0, torch.sym_max(0, least - x.shape[1])])
