"""FLOP formulas of fused ops and of softmax attention, for counters that do not read PyTorch's registry."""

import math
from collections.abc import Callable
from typing import Any

import torch

from visionmix.kernels.schema import NAMESPACE
from visionmix.private_api import is_traced_tensor


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], float]]:
    """Return a handle per op for fvcore's `FlopCountAnalysis`, which counts a multiply-add as one.

    `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())`

    A handle takes the traced graph's input and output values and returns half of what the op's formula in
    `torch.utils.flop_counter` gives for their shapes. PyTorch's own fused softmax attention, which fvcore does not know
    either, counts as its two matrix products.
    """
    from torch.utils.flop_counter import flop_registry

    handles: dict[str, Callable[[list[Any], list[Any]], float]] = {"aten::scaled_dot_product_attention": _attention}
    for op, formula in flop_registry.items():
        name = str(op)
        if name.startswith(f"{NAMESPACE}.") and not name.endswith("_backward"):
            handles[name.replace(".", "::", 1)] = _handle(formula)
    return handles


def _handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], float]:
    def count(inputs: list[Any], outputs: list[Any]) -> float:
        return formula(*map(_constant, inputs), out_val=_constant(outputs[0])) / 2

    return count


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    """Count ``q k^T`` and its product with v, from q, k and v (..., tokens, channels)."""
    (*leading, queries, channels), (*_, keys, _), (*_, out_channels) = map(_constant, inputs[:3])
    return math.prod(leading) * queries * keys * (channels + out_channels)


def _constant(value: Any) -> Any:
    """Return a traced value's shape if it is a tensor, else the constant it stands for."""
    if is_traced_tensor(value):
        return torch.Size(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_constant(each) for each in value.node().inputs()]
    return value.toIValue()
