"""PyTorch's private names that visionmix uses, in one place: a new version that moves one is met here.

Each stands here because no public name does the same.
"""

import torch
from torch._C import parse_schema
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["inside_functorch", "is_traced_tensor", "outside_of_tracing", "parse_schema"]

# Whether vmap, grad or another transform of torch.func is running.
inside_functorch = torch._C._are_functorch_transforms_active

# A context in which tensors are computed although a graph is being traced.
outside_of_tracing = _disable_current_modes


def is_traced_tensor(value: torch.Value) -> bool:
    """Return whether a value of a traced graph stands for a tensor."""
    return value.type().isSubtypeOf(torch._C.TensorType.get())
