"""Registering a fused op and its backward with torch.library."""

import logging
from collections.abc import Callable

import torch

from visionmix.kernels import dispatch

NAMESPACE = "visionmix"

_REMEDY = 'choose visionmix.kernels.use("reference"), which calls the PyTorch reference instead'


def _quiet_flop_registry() -> Callable:
    """Import PyTorch's FLOP registry, which warns where a CUDA build of PyTorch has no triton beside it (Windows)."""
    logger = logging.getLogger("torch.utils.flop_counter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.flop_counter import register_flop_formula
    finally:
        logger.setLevel(level)
    return register_flop_formula


_register_flop_formula = _quiet_flop_registry()


def _define(name: str, schema: str, kernel: Callable, fake: Callable, flops: Callable) -> None:
    qualified = f"{NAMESPACE}::{name}"

    def batched(*_args, **_kwargs):
        raise RuntimeError(f"vmap is not implemented for the fused op {qualified}; {_REMEDY}")

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", kernel)
    torch.library.register_fake(qualified, fake)
    torch.library.register_vmap(qualified, batched)
    _register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)


def _place_of_implementation(schema: str) -> int:
    names = [argument.name for argument in torch._C.parse_schema(f"{NAMESPACE}::any{schema}").arguments]
    return names.index("implementation")


def register_op(
    name: str,
    *,
    schema: str,
    backward_schema: str,
    fake: Callable,
    backward_fake: Callable,
    setup_context: Callable,
    backward: Callable,
    flops: Callable,
    backward_flops: Callable,
    reference: Callable[[], dispatch.Implementation],
) -> None:
    """Register `visionmix::name` and `visionmix::name_backward`, and the op's reference with the dispatcher.

    Args:
        schema: arguments and returns; the last argument is `str implementation="auto"`, and the first a tensor on the
            op's device.
        backward_schema: the same for the backward op, whose implementation is the one that ran forward.
        fake: shapes, dtypes and strides of the outputs.
        backward_fake: the same for the backward op.
        setup_context: as for `torch.library.register_autograd`.
        backward: as for `torch.library.register_autograd`; calls the backward op.
        flops: floating-point operations from the arguments' shapes, as `register_flop_formula` takes it.
        backward_flops: the same for the backward op.
        reference: loader of the PyTorch implementation.
    """
    dispatch.register(name, "reference", reference)

    # The dispatcher leaves out trailing arguments that have their default values.
    place, backward_place = _place_of_implementation(schema), _place_of_implementation(backward_schema)

    def run(*args):
        implementation = dispatch.resolve(name, *args[place : place + 1] or ("auto",), args[0].device)
        with dispatch.full_precision(args[0].device):
            return dispatch.load(name, implementation).forward(*args[:place], *args[place + 1 :])

    def run_backward(*args):
        implementation = dispatch.resolve(name, *args[backward_place:] or ("auto",), args[0].device)
        with dispatch.full_precision(args[0].device):
            return dispatch.load(name, implementation).backward(*args[:backward_place])

    def double_backward(_ctx, *_grads):
        raise RuntimeError(f"double backward is not implemented for the fused op {NAMESPACE}::{name}; {_REMEDY}")

    _define(name, schema, run, fake, flops)
    _define(f"{name}_backward", backward_schema, run_backward, backward_fake, backward_flops)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", double_backward)
