"""The private names of PyTorch and timm that visionmix uses, in one place: a new version that moves one is met here.

Each stands here because no public name does the same. Every room may import this file; it imports none of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_path
from torch._C import parse_schema
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = [
    "AnyBatchNorm",
    "FakeTensorMode",
    "FeatureGetterNet",
    "TorchDispatchMode",
    "compile_and_package",
    "feature_take_indices",
    "inside_functorch",
    "is_traced_tensor",
    "load_compiled_package",
    "load_model_config_from_path",
    "load_whole_state_dict",
    "outside_of_tracing",
    "parse_schema",
    "tree_leaves",
    "update_model_input_size",
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


def compile_and_package(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write what AOTInductor compiles an exported program to as the file `path`, with `metadata`."""
    from torch._inductor import aoti_compile_and_package  # here, since few need it and it takes long to import

    options = {"aot_inductor.metadata": dict(metadata or {})}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def load_compiled_package(path: Path) -> Callable[..., Any]:
    """Return the function that `compile_and_package` wrote; its `get_metadata()` returns the metadata and more."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def load_whole_state_dict(reader: "torch.distributed.checkpoint.StorageReader") -> dict[str, Any]:
    """Return all that a distributed checkpoint holds, nested as it was saved, read by this process alone."""
    # Here, since few need it and it takes long to import.
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    _load_state_dict(found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return found


try:
    # Notes the size with which `timm.models.save_for_hf` says that the model is to be built.
    from timm.models._input import update_model_input_size
except ImportError:  # an older timm, which writes what a user says by `model_args`

    def update_model_input_size(model: torch.nn.Module, img_size: tuple[int, int]) -> None:
        """Do nothing: this timm writes no size of a model."""
