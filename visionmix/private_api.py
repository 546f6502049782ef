"""The private names of PyTorch and timm that visionmix uses, in one place: a new version that moves one is met here.

Each stands here because no public name does the same. Every room may import this file; it imports none of them.
"""

import torch
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch._C import parse_schema
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = [
    "AnyBatchNorm",
    "FeatureGetterNet",
    "TorchDispatchMode",
    "feature_take_indices",
    "inside_functorch",
    "is_traced_tensor",
    "outside_of_tracing",
    "parse_schema",
    "tree_leaves",
]

# The base class of all batch norms, synchronised ones too.
AnyBatchNorm = _BatchNorm

# Whether vmap, grad or another transform of torch.func is running.
inside_functorch = torch._C._are_functorch_transforms_active

# A context in which tensors are computed although a graph is being traced.
outside_of_tracing = _disable_current_modes


def is_traced_tensor(value: torch.Value) -> bool:
    """Return whether a value of a traced graph stands for a tensor."""
    return value.type().isSubtypeOf(torch._C.TensorType.get())
