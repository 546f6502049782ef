"""`visionmix::selective_scan`, as mixers call it.

The function here checks nothing: it scripts, traces and exports. The checked one stands in the package.
"""

import torch
import torch.nn.functional as F
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
) -> tuple[Tensor, Tensor]:
    """Return (output, last state) of the selective scan, the state empty unless asked for.

    B and C are (batch, groups, states, length) or, constant, (dim, states); gap is (batch, dim, length).
    """
    if gap is None:
        return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    # The scan with gaps is one without: of steps as long as step and gap together, and of an input smaller by as much.
    double = u.dtype == torch.float64 or delta.dtype == torch.float64 or gap.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    whole = step + gap
    none = whole.abs() < 1e-30  # of larger ones the reciprocal, times a gradient, is a float
    share = torch.where(none, torch.ones_like(step), step / torch.where(none, torch.ones_like(step), whole))
    out, state = _scan(u * share, whole, A, B, C, None, None, None, False, return_last_state)
    if D is not None:
        out = out + D.to(dtype).unsqueeze(-1) * u
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype), state


def _scan(
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
) -> tuple[Tensor, Tensor]:
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(
                reference.forward, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
            )
    return torch.ops.visionmix.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, implementation="auto"):
    shape = (*u.shape[:2], A.shape[1]) if return_last_state else (0,)
    return _like(u), u.new_empty(shape, dtype=dispatch.compute_dtype(u, delta, A, B, C, D, z, delta_bias))


def _fake_backward(grad_out, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, implementation="auto"):
    options = (u.new_empty(0) if x is None else _like(x) for x in (D, z, delta_bias))
    return *(_like(x) for x in (u, delta, A, B, C)), *options


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.return_last_state, implementation = inputs
    ctx.implementation = dispatch.resolve("selective_scan", implementation, tensors[0].device)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out, grad_state):
    tensors = ctx.saved_tensors
    grads = torch.ops.visionmix.selective_scan_backward(
        grad_out, grad_state if ctx.return_last_state else None, *tensors, ctx.delta_softplus, ctx.implementation
    )
    return *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None, None, None


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
    schema=(f'({_INPUTS}, bool delta_softplus, bool return_last_state, str implementation="auto") -> (Tensor, Tensor)'),
    backward_schema=(
        f'(Tensor grad_out, Tensor? grad_state, {_INPUTS}, bool delta_softplus, str implementation="auto") '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
