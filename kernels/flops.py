"""The fused ops' FLOP formulas, for counters that know nothing of PyTorch's own registry."""

from collections.abc import Callable
from typing import Any

import torch

from visionmix.kernels.private_api import is_traced_tensor
from visionmix.kernels.schema import NAMESPACE


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], float]]:
    """Return a handle an op for fvcore's `FlopCountAnalysis`, which counts a multiply-add as one.

    `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())`

    A handle takes the traced graph's input and output values and returns half of what the op's formula in
    `torch.utils.flop_counter` gives for their shapes.
    """
    from torch.utils.flop_counter import flop_registry

    handles = {}
    for op, formula in flop_registry.items():
        name = str(op)
        if name.startswith(f"{NAMESPACE}.") and not name.endswith("_backward"):
            handles[name.replace(".", "::", 1)] = _handle(formula)
    return handles


def _handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], float]:
    def count(inputs: list[Any], outputs: list[Any]) -> float:
        return formula(*map(_constant, inputs), out_val=_constant(outputs[0])) / 2

    return count


def _constant(value: Any) -> Any:
    """Return a traced value's shape if it is a tensor, else the constant it stands for."""
    if is_traced_tensor(value):
        return torch.Size(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_constant(each) for each in value.node().inputs()]
    return value.toIValue()
