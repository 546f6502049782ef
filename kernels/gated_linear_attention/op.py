"""`visionmix::gated_linear_attention` and `visionmix::bidirectional_gated_linear_attention`, as mixers call them.

The functions here check nothing: they script, trace and export. The checked functions stand in the package.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch, gpu
from visionmix.kernels.gated_linear_attention import cpu, reference
from visionmix.kernels.registration import register_op


def gated_linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """Return (output, final state) of gated linear attention, the state empty unless asked for."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(reference.forward, q, k, v, g, scale, initial_state, output_final_state)
    return torch.ops.visionmix.gated_linear_attention(q, k, v, g, scale, initial_state, output_final_state)


def bidirectional_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    scale: float,
    merge: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return gated linear attention in both directions, merged by "mean" or "sum".

    The output has `out_dtype`, or v's type if None: torch.float32 where a norm follows that needs what half precision
    cannot hold.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(
                reference.bidirectional_forward, q, k, v, g_forward, g_backward, scale, merge, out_dtype
            )
    return torch.ops.visionmix.bidirectional_gated_linear_attention(
        q, k, v, g_forward, g_backward, scale, merge, "auto", out_dtype
    )


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(q, k, v, g, scale, initial_state, output_final_state, implementation="auto"):
    batch, _, heads, dk = q.shape
    shape = (batch, heads, dk, v.shape[-1]) if output_final_state else (0,)
    return _like(v), v.new_empty(shape, dtype=dispatch.compute_dtype(q, k, v, g, initial_state))


def _fake_backward(grad_out, grad_state, q, k, v, g, scale, initial_state, implementation="auto"):
    return _like(q), _like(k), _like(v), _like(g), q.new_empty(0) if initial_state is None else _like(initial_state)


def _setup_context(ctx, inputs, output):
    q, k, v, g, ctx.scale, initial_state, ctx.output_final_state, implementation = inputs
    ctx.implementation = dispatch.resolve("gated_linear_attention", implementation, q.device)
    ctx.save_for_backward(q, k, v, g, initial_state)


def _backward(ctx, grad_out, grad_state):
    q, k, v, g, initial_state = ctx.saved_tensors
    *grads, grad_initial = torch.ops.visionmix.gated_linear_attention_backward(
        grad_out,
        grad_state if ctx.output_final_state else None,
        q,
        k,
        v,
        g,
        ctx.scale,
        initial_state,
        ctx.implementation,
    )
    return *grads, None, None if initial_state is None else grad_initial, None, None


def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """k^T v into the state and q into the output, 2 dk dv each a token and head, plus the decay of the state, dk dv."""
    batch, length, heads, dk = q_shape
    return 5 * batch * length * heads * dk * v_shape[-1]


def _backward_flops(grad_shape, grad_state_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    """States again (3 dk dv), their gradients (3), and the products for the gradients of q, k, v and g (2 each)."""
    batch, length, heads, dk = q_shape
    return 14 * batch * length * heads * dk * grad_shape[-1]


def _load_reference() -> dispatch.Implementation:
    return dispatch.Implementation(reference.forward, reference.backward)


register_op(
    "gated_linear_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state, bool output_final_state, "
        'str implementation="auto") -> (Tensor, Tensor)'
    ),
    backward_schema=(
        "(Tensor grad_out, Tensor? grad_state, Tensor q, Tensor k, Tensor v, Tensor g, float scale, "
        'Tensor? initial_state, str implementation="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    ),
    fake=_fake,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    reference=_load_reference,
)


def _fake_bidirectional(q, k, v, g_forward, g_backward, scale, merge, implementation="auto", out_dtype=None):
    return v.new_empty(v.shape, dtype=out_dtype)


def _fake_bidirectional_backward(grad_out, q, k, v, g_forward, g_backward, scale, merge, implementation="auto"):
    return _like(q), _like(k), _like(v), _like(g_forward), _like(g_backward)


def _setup_bidirectional_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.merge, implementation, _ = inputs
    ctx.implementation = dispatch.resolve("bidirectional_gated_linear_attention", implementation, tensors[0].device)
    ctx.save_for_backward(*tensors)


def _bidirectional_backward(ctx, grad_out):
    grads = torch.ops.visionmix.bidirectional_gated_linear_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.scale, ctx.merge, ctx.implementation
    )
    return *grads, None, None, None, None


def _bidirectional_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Two directions."""
    return 2 * _flops(q_shape, k_shape, v_shape)


def _bidirectional_backward_flops(grad_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    """Two directions."""
    return 2 * _backward_flops(grad_shape, None, q_shape)


def _load_bidirectional_reference() -> dispatch.Implementation:
    return dispatch.Implementation(reference.bidirectional_forward, reference.bidirectional_backward)


register_op(
    "bidirectional_gated_linear_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor g_forward, Tensor g_backward, float scale, str merge, "
        'str implementation="auto", ScalarType? out_dtype=None) -> Tensor'
    ),
    backward_schema=(
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor g_forward, Tensor g_backward, float scale, str merge, "
        'str implementation="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    ),
    fake=_fake_bidirectional,
    backward_fake=_fake_bidirectional_backward,
    setup_context=_setup_bidirectional_context,
    backward=_bidirectional_backward,
    flops=_bidirectional_flops,
    backward_flops=_bidirectional_backward_flops,
    reference=_load_bidirectional_reference,
)

dispatch.register("gated_linear_attention", "cpu", cpu.load)
dispatch.register("gated_linear_attention", "triton", gpu.loader("gated_linear_attention", "gated_linear_attention"))
dispatch.register("bidirectional_gated_linear_attention", "cpu", cpu.load_bidirectional)
dispatch.register(
    "bidirectional_gated_linear_attention",
    "triton",
    gpu.loader(
        "bidirectional_gated_linear_attention",
        "gated_linear_attention",
        "bidirectional_forward",
        "bidirectional_backward",
    ),
)
