"""Registering ops with torch.library: fused ones with a backward op of their own, and cheap ones with PyTorch's."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.schema import NAMESPACE, Schema, named_tuple
from visionmix.private_api import parse_schema

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

    def counted(*args, out_shape=None, **kwargs) -> int:
        return flops(*args, **kwargs)

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", kernel)
    torch.library.register_fake(qualified, fake)
    _register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(counted)


def _refuse_vmap(name: str) -> None:
    def batched(*_args, **_kwargs):
        raise RuntimeError(f"vmap is not implemented for the fused op {NAMESPACE}::{name}; {_REMEDY}")

    torch.library.register_vmap(f"{NAMESPACE}::{name}", batched)


def register_op(
    schema: Schema, *, fake: Callable, flops: Callable, backward_flops: Callable, reference: Callable
) -> None:
    """Register `visionmix::name` and `visionmix::name_backward`, and the op's reference with the dispatcher.

    Args:
        schema: the arguments; all functions here take them as one tuple.
        fake: the outputs' shapes, dtypes and strides, as empty tensors, from the arguments.
        flops: floating-point operations, from the arguments with shapes in place of tensors.
        backward_flops: the same for the backward op, from (arguments, gradients).
        reference: loader of the PyTorch implementation.
    """
    name, Arguments = schema.name, schema.Arguments
    dispatch.register(name, "reference", reference)

    def run(*args):
        arguments = Arguments(*args)
        implementation = dispatch.resolve(name, arguments.implementation, args[0].device)
        with dispatch.full_precision(args[0].device):
            return dispatch.load(name, implementation).forward(arguments)

    def run_backward(*args):
        arguments, gradients = schema.split(*args)
        implementation = dispatch.resolve(name, arguments.implementation, args[0].device)
        with dispatch.full_precision(args[0].device):
            return dispatch.load(name, implementation).backward(arguments, gradients)

    def fake_backward(*args):
        arguments, _ = schema.split(*args)
        tensors = schema.input_tensors(arguments)
        return tuple(tensors[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)

    def double_backward(_ctx, *_grads):
        raise RuntimeError(f"double backward is not implemented for the fused op {NAMESPACE}::{name}; {_REMEDY}")

    def fake_forward(*args, **kwargs):
        return fake(Arguments(*args, **kwargs))

    def count_forward(*args, **kwargs) -> int:
        return flops(Arguments(*args, **kwargs))

    def count_backward(*args) -> int:
        return backward_flops(*schema.split(*args))

    backward_name = f"{name}_backward"
    _define(name, schema.text, run, fake_forward, count_forward)
    _define(backward_name, schema.backward_text, run_backward, fake_backward, count_backward)
    setup_context, backward = _autograd(schema, fake)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"{NAMESPACE}::{backward_name}", double_backward)
    for each in (name, backward_name):
        _refuse_vmap(each)


def _autograd(schema: Schema, fake: Callable) -> tuple[Callable, Callable]:
    """Return `setup_context` and `backward`, as `torch.library.register_autograd` takes them."""
    kept = [name for name in schema.Gradients._fields if name in schema.outputs]
    saved = schema.tensors + schema.indices
    wanted = [f"grad_{name}" for name in schema.outputs]

    def outputs_by_name(outputs: Tensor | tuple) -> dict[str, Tensor]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(schema.outputs, outputs, strict=True))

    def setup_context(ctx, inputs, output) -> None:
        arguments, outputs = schema.Arguments(*inputs), outputs_by_name(output)
        # The backward op runs the implementation that ran forward.
        implementation = dispatch.resolve(schema.name, arguments.implementation, inputs[0].device)
        ctx.save_for_backward(*(arguments[place] for place in saved), *(outputs[name] for name in kept))
        ctx.others = [None if place in saved else x for place, x in enumerate(arguments)]
        ctx.others[arguments._fields.index("implementation")] = implementation
        given = schema.Gradients._fields
        ctx.mark_non_differentiable(*(x for name, x in outputs.items() if f"grad_{name}" not in given))
        ctx.set_materialize_grads(False)  # those of outputs that nobody used would be zeros of their size

    def backward(ctx, *grads):
        values, tensors = list(ctx.others), ctx.saved_tensors
        for place, x in zip(saved, tensors, strict=False):
            values[place] = x
        arguments = schema.Arguments(*values)
        # An output that was not asked for is empty, with one axis, and so is its gradient.
        known = {name: None if g is None or g.dim() == 1 else g for name, g in zip(wanted, grads, strict=True)}
        known = {name: known[name] for name in schema.Gradients._fields if name in known}
        if all(grad is None for grad in known.values()):
            return (None,) * len(values)
        if any(grad is None and name in schema.required for name, grad in known.items()):
            zeros = outputs_by_name(fake(arguments))
            for name, grad in known.items():
                if grad is None and name in schema.required:
                    known[name] = zeros[name.removeprefix("grad_")].zero_()
        known |= dict(zip(kept, tensors[len(saved) :], strict=True))
        op = getattr(getattr(torch.ops, NAMESPACE), f"{schema.name}_backward")
        found = op(*schema.join(arguments, schema.Gradients(**known)))
        result: list[Tensor | None] = [None] * len(values)
        for place, grad in zip(schema.tensors, found, strict=True):
            if values[place] is not None:
                result[place] = grad
        return tuple(result)

    return setup_context, backward


def register_reference_op(
    name: str, schema: str, function: Callable, flops: Callable[..., int], fake: Callable | None = None
) -> None:
    """Register `visionmix::name`, an op that is one PyTorch function, with PyTorch's own gradients.

    This is the cheap kind of op, for recurrences whose speed does not matter: it scripts, is one node of compiled and
    exported graphs, and counts FLOPs by its formula. The backward pass computes the function again.

    Args:
        name: the op's name.
        schema: its arguments and outputs, as `torch.library.define` takes them.
        function: computes the outputs, new tensors that share no memory with the inputs, without autocast; it must run
            on fake tensors, so it must not depend on values.
        flops: floating-point operations, from the arguments with shapes in place of tensors.
        fake: the outputs as empty tensors, from the arguments; None for `function`. One that loops over a size needs
            it, since the loop would fix the size in a graph.
    """

    parsed = parse_schema(f"{NAMESPACE}::{name}{schema}")
    Arguments = named_tuple("Arguments", parsed.arguments)

    def run(*args, **kwargs):
        with dispatch.full_precision(args[0].device):
            return function(*Arguments(*args, **kwargs))

    def run_fake(*args, **kwargs):
        return (fake or function)(*Arguments(*args, **kwargs))

    def count(*args, **kwargs) -> int:
        return flops(*Arguments(*args, **kwargs))

    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once: a checkpointed block computes them anew
        tensors = iter(saved)
        # Arguments left out have their defaults among the inputs, but not among the flags.
        flags = (*ctx.needs_input_grad, *[False] * len(ctx.others))
        needed = [other is None and flag for other, flag in zip(ctx.others, flags, strict=False)]
        again = torch.is_grad_enabled()  # a second derivative is asked for
        with torch.enable_grad(), dispatch.full_precision(saved[0].device):
            inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
            if not again:
                inputs = [x.detach().requires_grad_(n) if n else x for x, n in zip(inputs, needed, strict=True)]
            outs = function(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if out.requires_grad]
            wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
            used, weights = zip(*pairs, strict=True)
            options = {"allow_unused": True, "materialize_grads": True, "create_graph": again}
            found = iter(torch.autograd.grad(used, wanted, weights, **options))
        return tuple(next(found) if n else None for n in needed)

    _define(name, schema, run, run_fake, count)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
