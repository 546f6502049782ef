"""`visionmix::selective_scan`, as mixers call it.

The function here checks nothing: it scripts, traces and exports. The checked one stands in the package.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.registration import register_op
from visionmix.kernels.selective_scan import cpu, reference


def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    gap: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (output, last state) of the selective scan, the state empty unless asked for.

    The output has `out_dtype`, or u's type if None: torch.float32 where a norm follows that needs what half precision
    cannot hold.

    B and C are (batch, groups, states, length) or, constant, (dim, states); gap is (batch, dim, length).
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, gap, False, out_dtype)
            out, state, _ = dispatch.call_reference(reference.forward, *inputs)
            return out, state
    # A graph that torch.jit.trace makes shall not depend on the mode: it goes forward once more on its way back.
    keep_states = torch.is_grad_enabled() and not torch.jit.is_tracing()
    out, state, _ = torch.ops.visionmix.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, gap, keep_states, "auto", out_dtype
    )
    return out, state


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    return_last_state,
    gap=None,
    keep_states=False,
    implementation="auto",
    out_dtype=None,
):
    dtype = dispatch.compute_dtype(u, delta, A, B, C, D, z, delta_bias, gap)
    state = u.new_empty((*u.shape[:2], A.shape[1]) if return_last_state else (0,), dtype=dtype)
    compiled = dispatch.resolve("selective_scan", implementation, u.device) == "cpu" and dtype == torch.float32
    out = u.new_empty(u.shape, dtype=out_dtype)
    return out, state, u.new_empty(cpu.entering_shape(u, A) if keep_states and compiled else (0,), dtype=dtype)


def _fake_backward(grad_out, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap=None, *_options):
    options = (u.new_empty(0) if x is None else _like(x) for x in (D, z, delta_bias, gap))
    return *(_like(x) for x in (u, delta, A, B, C)), *options


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.return_last_state, gap, _, implementation, _ = inputs
    ctx.implementation = dispatch.resolve("selective_scan", implementation, tensors[0].device)
    entering = output[2]
    ctx.mark_non_differentiable(entering)
    ctx.set_materialize_grads(False)  # that of the states would be zeros of their size
    ctx.save_for_backward(*tensors, gap, entering)


def _backward(ctx, grad_out, grad_state, _):
    *tensors, gap, entering = ctx.saved_tensors
    if grad_out is None:  # the state alone was used
        grad_out = _like(tensors[0]).zero_()
    if not ctx.return_last_state:
        grad_state = None
    grads = torch.ops.visionmix.selective_scan_backward(
        grad_out, grad_state, *tensors, ctx.delta_softplus, gap, entering, ctx.implementation
    )
    *grads, grad_gap = (None if x is None else grad for x, grad in zip((*tensors, gap), grads, strict=True))
    return *grads, None, None, grad_gap, None, None, None


def _flops(
    u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape=None, z_shape=None, *args, out_shape=None, **kwargs
):
    """7 a token, channel and state (delta A, exp, decay h, delta u B, their sum, C h and its sum), and 1 a token and
    channel for delta u, 2 more with D, 3 more with z."""
    batch, dim, length = u_shape
    return batch * dim * length * (7 * A_shape[1] + 1 + 2 * (D_shape is not None) + 3 * (z_shape is not None))


def _backward_flops(
    grad_shape,
    grad_state_shape,
    u_shape,
    delta_shape,
    A_shape,
    B_shape,
    C_shape,
    D_shape=None,
    z_shape=None,
    *args,
    out_shape=None,
    **kwargs,
):
    """The states again (5), and their gradients: 2 for C dy, 1 for the decay, 2 each for the gradients of x = delta u,
    B and C, 1 + 2 + 2 for those of the decay rate, delta and A; a token and channel 4 for u and delta, 4 more with D, 7
    with z."""
    batch, dim, length = u_shape
    return batch * dim * length * (19 * A_shape[1] + 4 + 4 * (D_shape is not None) + 7 * (z_shape is not None))


def _load_reference() -> dispatch.Implementation:
    return dispatch.Implementation(reference.forward, reference.backward)


_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"

register_op(
    "selective_scan",
    schema=(
        f"({_INPUTS}, bool delta_softplus, bool return_last_state, Tensor? gap=None, bool keep_states=False, "
        'str implementation="auto", ScalarType? out_dtype=None) -> (Tensor, Tensor, Tensor)'
    ),
    backward_schema=(
        f"(Tensor grad_out, Tensor? grad_state, {_INPUTS}, bool delta_softplus, Tensor? gap=None, "
        'Tensor? entering=None, str implementation="auto") -> '
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    fake=_fake,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    reference=_load_reference,
)

dispatch.register("selective_scan", "cpu", cpu.load)
dispatch.register("selective_scan", "triton", gpu.loader("selective_scan", "selective_scan"))
