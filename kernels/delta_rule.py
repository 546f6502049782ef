"""The gated delta rule: linear attention whose state replaces what it holds for a key rather than adding to it.

An op of the cheap kind, in chunked PyTorch. Within a chunk the tokens' corrections of each other are a triangular
system, which is solved at once; a state goes from chunk to chunk. `gated_delta_rule` checks what it is given; mixers
call `gated_delta_rule_op`, which checks nothing: it scripts, traces and exports.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_shape, check_sizes, check_tensors
from visionmix.kernels.exported import is_symbolic
from visionmix.kernels.registration import register_reference_op

_CHUNK = 64


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None) -> Tensor:
    """Read a state that forgets, and whose entry for a key moves towards the key's value.

    Per head, with ``a_t = exp(g_t)``, from S_0 = 0:

        S_t = a_t S_(t-1) + beta_t k_t^T (v_t - a_t k_t S_(t-1))
        o_t = scale q_t S_t

    With keys of length 1 and beta from 0 to 2 no state grows. g = 0 is the delta rule without a gate.

    Yang et al., 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484);
    Yang et al., 2024, Gated Delta Networks (arXiv 2412.06464).

    Args:
        q: queries (batch, length, heads, dk), of any floating-point dtype, as the others.
        k: keys (batch, length, heads, dk).
        v: values (batch, length, heads, dv).
        g: logarithms of the decays (batch, length, heads), not above 0.
        beta: shares of the corrections (batch, length, heads).
        scale: factor of the results; dk^-0.5 if None.

    Returns:
        o (batch, length, heads, dv) in float32, or float64 if any input is; so is the computation.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes or devices do not fit together, or an axis but the batch is empty.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    check_tensors(tensors, {name: (4,) if name in "qkv" else (3,) for name in tensors}, tensors)
    check_sizes("q", q)
    check_sizes("v", v)
    batch, length, heads, dk = q.shape
    axes = {"batch": batch, "length": length, "heads": heads}
    check_shape("k", k, axes | {"dk": dk})
    check_shape("v", v, axes | {"dv": v.shape[-1]})
    check_shape("g", g, axes)
    check_shape("beta", beta, axes)
    return gated_delta_rule_op(q, k, v, g, beta, dk**-0.5 if scale is None else scale)


def gated_delta_rule_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
    """Return what `gated_delta_rule` does, without its checks."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference, (q, k, v, g, beta, scale))
    return torch.ops.visionmix.gated_delta_rule(q, k, v, g, beta, scale)


def _reference(arguments: tuple) -> Tensor:
    return _forward(*arguments)


def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
    dtype = dispatch.compute_dtype(q, k, v, g, beta)
    length = q.shape[1]
    q, k, v, g, beta = (x.transpose(1, 2).to(dtype) for x in (q, k, v, g, beta))
    q = q * scale
    # An exported graph for all lengths has one chunk: it cannot loop over a length.
    if is_symbolic(length):
        return _chunk(q, k, v, g, beta, None)[0].transpose(1, 2).contiguous()
    state, outs = None, []
    parts = [x.split(_CHUNK, dim=2) for x in (q, k, v, g, beta)]
    for query, key, value, gate, share in zip(*parts, strict=True):
        out, state = _chunk(query, key, value, gate, share, state)
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return o (batch, heads, tokens, dv) of a chunk and the state (batch, heads, dk, dv) after it."""
    place = torch.arange(q.shape[2], device=q.device)
    later = place.unsqueeze(1) > place
    # The sum of g from behind token j to token i, from its own addends: a difference of two long sums would be rounded.
    since = g.unsqueeze(3).masked_fill(~later, 0.0).cumsum(2)
    decay = since.masked_fill(place.unsqueeze(1) < place, float("-inf")).exp()
    # What is written, w_i = beta_i (v_i - k_i (decayed state before i)), solves (1 + A) w = beta (v - decayed k S).
    system = ((k @ k.transpose(2, 3)) * decay * beta.unsqueeze(3)).tril(-1)
    total = g.cumsum(2).exp().unsqueeze(3)
    right = v if state is None else v - (k * total) @ state
    written = torch.linalg.solve_triangular(system, right * beta.unsqueeze(3), upper=False, unitriangular=True)
    out = ((q @ k.transpose(2, 3)) * decay) @ written
    last = decay[:, :, -1].unsqueeze(3)
    after = (k * last).transpose(2, 3) @ written
    if state is not None:
        out = out + (q * total) @ state
        after = after + total[:, :, -1:] * state
    return out, after


def _fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape, dtype=dispatch.compute_dtype(q, k, v, g, beta))


def _flops(q, k, v, g, beta, scale) -> int:
    """k k^T and q k^T, the triangular system and the sum of what is written, and four products with states."""
    batch, length, heads, dk = q
    chunk, dv = min(length, _CHUNK), v[-1]
    return batch * length * heads * (4 * chunk * dk + 3 * chunk * dv + 8 * dk * dv)


_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale) -> Tensor"
register_reference_op("gated_delta_rule", _SCHEMA, _forward, _flops, _fake)
