"""The matrix LSTM of xLSTM: linear attention whose input gates are exponential and whose forget gates are sigmoids.

An op of the cheap kind, in chunked PyTorch: within a chunk the parallel form, a state between chunks. `mlstm` checks
what it is given; mixers call `mlstm_op`, which checks nothing: it scripts, traces and exports.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_shape, check_sizes, check_tensors
from visionmix.kernels.exported import is_symbolic
from visionmix.kernels.registration import register_reference_op

_CHUNK = 256  # so that a map of 16x16 is one product, as in the published code
_EPS = 1e-6
_HUGE = 80.0  # an exponent near the largest of float32


def mlstm(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """The cell of the matrix LSTM, with a matrix for a state and a vector that normalises what is read from it.

    Per head, with `i_t` and `f_t` the gates before their functions and `k_t` divided by `dim^0.5`:

        m_t = max(logsigmoid(f_t) + m_(t-1), i_t),  m_0 = -inf
        C_t = exp(logsigmoid(f_t) + m_(t-1) - m_t) C_(t-1) + exp(i_t - m_t) v_t k_t^T    (n_t likewise, of k_t alone)
        h_t = C_t q_t / (max(|n_t q_t|, exp(-m_t)) + 1e-6)

    Beck et al., 2024, xLSTM: Extended Long Short-Term Memory (arXiv 2405.04517).

    Args:
        q: queries (batch, length, heads, dim), of any floating-point dtype, as the others.
        k: keys (batch, length, heads, dim).
        v: values (batch, length, heads, dim).
        input_gate: logarithms of the input gates (batch, length, heads).
        forget_gate: forget gates before the sigmoid (batch, length, heads).

    Returns:
        h (batch, length, heads, dim) in float32, or float64 if any input is; so is the computation.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes or devices do not fit together, or an axis but the batch is empty.
    """
    tensors = {"q": q, "k": k, "v": v, "input_gate": input_gate, "forget_gate": forget_gate}
    check_tensors(tensors, {name: (4,) if len(name) == 1 else (3,) for name in tensors}, tensors)
    check_sizes("q", q)
    axes = dict(zip(("batch", "length", "heads", "dim"), q.shape, strict=True))
    check_shape("k", k, axes)
    check_shape("v", v, axes)
    del axes["dim"]
    check_shape("input_gate", input_gate, axes)
    check_shape("forget_gate", forget_gate, axes)
    return mlstm_op(q, k, v, input_gate, forget_gate)


def mlstm_op(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """Return what `mlstm` does, without its checks."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference, (q, k, v, input_gate, forget_gate))
    return torch.ops.visionmix.mlstm(q, k, v, input_gate, forget_gate)


def _reference(arguments: tuple[Tensor, ...]) -> Tensor:
    return _forward(*arguments)


def _forward(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    dtype = dispatch.compute_dtype(q, k, v, input_gate, forget_gate)
    length, dim = q.shape[1], q.shape[3]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    k = k * dim**-0.5
    gates = input_gate.transpose(1, 2).to(dtype)
    decays = F.logsigmoid(forget_gate.transpose(1, 2).to(dtype))
    # An exported graph for all lengths has one chunk: it cannot loop over a length.
    if is_symbolic(length):
        return _chunk(q, k, v, gates, decays.cumsum(2), None).transpose(1, 2).contiguous()
    parts = [x.split(_CHUNK, dim=2) for x in (q, k, v, gates, decays)]
    state, outs = None, []
    for query, key, value, gate, decay in zip(*parts, strict=True):
        since = decay.cumsum(2)
        outs.append(_chunk(query, key, value, gate, since, state))
        if len(outs) < len(parts[0]):
            state = _after(key, value, gate, since, state)
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()


_State = tuple[Tensor, Tensor, Tensor]


def _chunk(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, since: Tensor, state: _State | None) -> Tensor:
    """Return h (batch, heads, tokens, dim) of a chunk, from its decays' sums `since` its start and the state before."""
    place = torch.arange(query.shape[2], device=query.device)
    weight = since.unsqueeze(3) + (gate - since).unsqueeze(2)  # of key j in the state that query i reads
    weight = weight.masked_fill(place.unsqueeze(1) < place, float("-inf"))
    largest = weight.amax(3)
    if state is None:
        attention = (query @ key.transpose(2, 3)) * (weight - largest.unsqueeze(3)).exp()
        read, total = attention @ value, attention.sum(3)
    else:
        matrix, normaliser, before = state
        carried = since + before.unsqueeze(2)
        largest = torch.maximum(largest, carried)
        attention = (query @ key.transpose(2, 3)) * (weight - largest.unsqueeze(3)).exp()
        query = query * (carried - largest).exp().unsqueeze(3)
        read = attention @ value + query @ matrix
        total = attention.sum(3) + (query @ normaliser.unsqueeze(3)).squeeze(3)
    # Clamped where h is 0 to float32 anyway: an infinite divisor has no gradient.
    least = (-largest).clamp(max=_HUGE).exp()
    return read / (torch.maximum(total.abs(), least) + _EPS).unsqueeze(3)


def _after(key: Tensor, value: Tensor, gate: Tensor, since: Tensor, state: _State | None) -> _State:
    """Return the state after a chunk: the matrix (batch, heads, dim, dim), the normaliser and the stabiliser m."""
    whole = since[:, :, -1:]
    weight = whole - since + gate
    largest = weight.amax(2)
    if state is not None:
        carried = whole.squeeze(2) + state[2]
        largest = torch.maximum(largest, carried)
    key = key * (weight - largest.unsqueeze(2)).exp().unsqueeze(3)
    matrix, normaliser = key.transpose(2, 3) @ value, key.sum(2)
    if state is not None:
        kept = (carried - largest).exp().unsqueeze(2)
        matrix, normaliser = torch.addcmul(matrix, kept.unsqueeze(3), state[0]), normaliser + kept * state[1]
    return matrix, normaliser, largest


def _fake(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    return q.new_empty(q.shape, dtype=dispatch.compute_dtype(q, k, v, input_gate, forget_gate))


def _flops(q, *_) -> int:
    """Within chunks, q k and the sum of values for each pair of tokens (2 dim each); between them, the state's product
    with q and k v into it."""
    batch, length, heads, dim = q
    pairs = (min(length, _CHUNK) + 1) / 2
    states = 4 * dim * dim if length > _CHUNK else 0
    return int(batch * length * heads * (4 * dim * pairs + states))


_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor input_gate, Tensor forget_gate) -> Tensor"
register_reference_op("mlstm", _SCHEMA, _forward, _flops, _fake)
