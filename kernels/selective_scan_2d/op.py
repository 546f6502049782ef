"""`visionmix::selective_scan_2d`, as mixers call it.

The function here checks nothing: it scripts, traces and exports. The checked one stands in the package.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.registration import register_op
from visionmix.kernels.selective_scan_2d import cpu, reference
from visionmix.kernels.selective_scan_2d.routes import count_routes, count_steps


def selective_scan_2d_op(
    x: Tensor,
    delta: Tensor,
    delta_weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: str,
    merge: str,
    permute: str = "all",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the selective scan over several orders of a map; `orders` are their names joined by commas.

    `delta` is (batch, height, width, K, channels), or (batch, height, width, K, rank) with `delta_weight`. `permute` is
    "all", or "input" where delta, B and C stay in raster order. The output has `out_dtype`, or x's type if None:
    torch.float32 where a norm follows that needs what half precision cannot hold.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            inputs = (x, delta, delta_weight, A, B, C, D, delta_bias, delta_softplus, orders, merge, permute)
            out, _ = dispatch.call_reference(reference.forward, *inputs, False, out_dtype)
            return out
    # A graph that torch.jit.trace makes shall not depend on the mode: it goes forward once more on its way back.
    keep_states = torch.is_grad_enabled() and not torch.jit.is_tracing()
    out, _ = torch.ops.visionmix.selective_scan_2d(
        x,
        delta,
        delta_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        delta_softplus,
        orders,
        merge,
        permute,
        keep_states,
        "auto",
        out_dtype,
    )
    return out


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(
    x,
    delta,
    delta_weight,
    A,
    B,
    C,
    D,
    delta_bias,
    delta_softplus,
    orders,
    merge,
    permute="all",
    keep_states=False,
    implementation="auto",
    out_dtype=None,
):
    shape = (*x.shape[:3], count_routes(orders), x.shape[3]) if merge == "none" else x.shape
    out = x.new_empty(shape, dtype=out_dtype)
    dtype = dispatch.compute_dtype(x, delta, delta_weight, A, B, C, D, delta_bias)
    compiled = dispatch.resolve("selective_scan_2d", implementation, x.device) == "cpu" and dtype == torch.float32
    shape = cpu.entering_shape(x, A, count_steps(orders, *x.shape[1:3])) if keep_states and compiled else (0,)
    return out, x.new_empty(shape, dtype=dtype)


def _fake_backward(grad_out, x, delta, delta_weight, A, B, C, D, delta_bias, *_options):
    return tuple(x.new_empty(0) if y is None else _like(y) for y in (x, delta, delta_weight, A, B, C, D, delta_bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.orders, ctx.merge, ctx.permute, _, implementation, _ = inputs
    ctx.implementation = dispatch.resolve("selective_scan_2d", implementation, tensors[0].device)
    entering = output[1]
    ctx.mark_non_differentiable(entering)
    ctx.set_materialize_grads(False)  # that of the states would be zeros of their size
    ctx.save_for_backward(*tensors, entering)


def _backward(ctx, grad_out, _):
    *tensors, entering = ctx.saved_tensors
    if grad_out is None:
        return (None,) * (len(tensors) + 7)
    grads = torch.ops.visionmix.selective_scan_2d_backward(
        grad_out, *tensors, ctx.delta_softplus, ctx.orders, ctx.merge, ctx.permute, entering, ctx.implementation
    )
    return *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), *(None,) * 7


def _flops(
    x_shape, delta_shape, weight_shape, A_shape, B_shape, C_shape, D_shape=None, *args, out_shape=None, **kwargs
):
    """As `selective_scan`, once an order, 2 rank more a token and channel for a low-rank delta, 1 to merge.

    Orders count with one step a cell.
    """
    batch, height, width, channels = x_shape
    orders, _, states = A_shape
    each = 7 * states + 2 + 2 * (D_shape is not None) + (0 if weight_shape is None else 2 * weight_shape[-1])
    return batch * height * width * channels * orders * each


def _backward_flops(
    grad_shape,
    x_shape,
    delta_shape,
    weight_shape,
    A_shape,
    B_shape,
    C_shape,
    D_shape=None,
    *args,
    out_shape=None,
    **kwargs,
):
    """As `selective_scan`, once an order, 6 rank more a token and channel for a low-rank delta, 1 to add up dx."""
    batch, height, width, channels = x_shape
    orders, _, states = A_shape
    each = 19 * states + 5 + 4 * (D_shape is not None) + (0 if weight_shape is None else 6 * weight_shape[-1])
    return batch * height * width * channels * orders * each


def _load_reference() -> dispatch.Implementation:
    return dispatch.Implementation(reference.forward, reference.backward)


_INPUTS = (
    "Tensor x, Tensor delta, Tensor? delta_weight, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, str orders, str merge, str permute"
)

register_op(
    "selective_scan_2d",
    schema=(
        f'({_INPUTS}, bool keep_states=False, str implementation="auto", ScalarType? out_dtype=None) -> '
        "(Tensor, Tensor)"
    ),
    backward_schema=(
        f'(Tensor grad_out, {_INPUTS}, Tensor? entering=None, str implementation="auto") -> '
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    fake=_fake,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    reference=_load_reference,
)

dispatch.register("selective_scan_2d", "cpu", cpu.load)
dispatch.register("selective_scan_2d", "triton", gpu.loader("selective_scan_2d", "selective_scan_2d"))
