"""Models in shards: each of several processes holds a part of every parameter (FSDP2)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from visionmix.tools.evaluation import AMP_DTYPES


def shard(model: nn.Module, name: str, mesh: DeviceMesh, amp: str, compiled: bool = False) -> None:
    """Divide a model's parameters among the processes of a mesh, each of its blocks by itself (FSDP2).

    Args:
        model: whose blocks are in lists called `blocks`, as timm's and this library's are.
        name: the model's, for messages.
        mesh: of one dimension.
        amp: "float16" and "bfloat16" are the type of the forward and backward pass, with sums of gradients in float32.
        compiled: run each block through torch.compile.

    Raises:
        ValueError: the model has no such blocks.
    """
    blocks = [
        block
        for path, layers in model.named_modules()
        if path.rpartition(".")[2] == "blocks" and isinstance(layers, nn.ModuleList | nn.Sequential)
        for block in layers
    ]
    if not blocks:
        raise ValueError(f"train.parallel=fsdp shards a model by its blocks, and {name!r} has none; set it to ddp")
    policy = MixedPrecisionPolicy()
    if amp in AMP_DTYPES:
        policy = MixedPrecisionPolicy(param_dtype=AMP_DTYPES[amp], reduce_dtype=torch.float32)
    for block in reversed(blocks):  # those inside of others first
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("forward_features", "forward_head", "forward_train"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict with shards put together; all processes call it."""
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def shard_like(value: Any, parameter: torch.Tensor) -> Any:
    """Return a value of an optimiser's state in shards as its parameter is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    mesh = parameter.device_mesh
    places = parameter.placements if value.shape == parameter.shape else [Replicate()] * mesh.ndim
    return distribute_tensor(value.to(parameter.device), mesh, places, src_data_rank=None)
