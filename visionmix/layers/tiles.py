"""When a layer works in tiles, so that a large tensor between its steps is never made."""

import torch
from torch import Tensor, nn

_LARGE = 2**25  # bytes; the C library takes larger tensors from the system every time


def eager_inference(x: Tensor) -> bool:
    """Return whether `x` is an ordinary tensor on the CPU that takes part in neither a graph nor a gradient."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    return type(x) is Tensor and x.is_cpu


def in_tiles(module: nn.Module, x: Tensor, inner: int) -> bool:
    """Return whether `module`, on `x`, is to work in tiles, where `inner` numbers lie between its steps.

    Only in eager inference on a CPU, where they would fill a large tensor. A module whose parts have hooks works on all
    at once, as the hooks expect.
    """
    if not eager_inference(x) or inner * x.element_size() <= _LARGE:
        return False
    return not any(part._forward_hooks or part._forward_pre_hooks for part in module.children())
