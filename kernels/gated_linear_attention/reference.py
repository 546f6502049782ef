"""Gated linear attention in chunked PyTorch: batched matmuls over a tree of token blocks.

Within a chunk, the weight that token i gives token j < i is `sum_d q_id k_jd prod_{j < s <= i} a_sd`, a = exp(g).
Blocks of tokens are joined in pairs, from single tokens up to the chunk. A block keeps its queries decayed from its
start, its keys decayed to its end and its total decay; joining two blocks takes one matmul for the weights between them
and one product with the other's total decay. Every factor is a product of decays, so it lies in [0, 1]: nothing
overflows, and no two large sums are subtracted, so that tokens which follow a strong decay keep their precision.

Chunks then pass their states, (dk, dv) per head, in a loop over chunks. Memory is a few times the inputs plus
length x chunk weights and length / chunk states per head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmix.kernels.dispatch import compute_dtype
from visionmix.kernels.exported import is_symbolic, numbers, scan_states
from visionmix.kernels.gated_linear_attention.schema import (
    BIDIRECTIONAL_SCHEMA,
    SCHEMA,
    Arguments,
    BidirectionalArguments,
    BidirectionalGradients,
    Gradients,
)

CHUNKS = (32, 16)

# Blocks of up to this many tokens are joined by a product and a sum: batched matmuls of so few rows are slower.
_ELEMENTWISE = 2


@dataclass
class _Direction:
    """One direction's tree: `queries`, `keys`, `decays` of the blocks at each level, from tokens to chunks.

    Shapes: (rows, blocks, block, dk) and, for the decays, (rows, blocks, 1, dk); rows = batch x heads.
    """

    reverse: bool
    queries: list[Tensor]
    keys: list[Tensor]
    decays: list[Tensor]
    crossings: list[Tensor]  # weights of a pair's later block for its earlier one, (rows, pairs, block, block)
    entering: Tensor | None = None  # state entering each chunk, (rows, chunks, dk, dv)


def _pairs(x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Split the blocks of (rows, blocks, ...) into the earlier and the later of each pair, in the direction's time."""
    x = x.unflatten(1, (-1, 2))
    return (x[:, :, 1], x[:, :, 0]) if reverse else (x[:, :, 0], x[:, :, 1])


def _join(early: Tensor, late: Tensor, reverse: bool) -> Tensor:
    """Put the halves of each pair of blocks side by side: two (rows, pairs, n, dim) to (rows, pairs, 2 n, dim)."""
    return torch.cat((late, early) if reverse else (early, late), dim=-2)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """Return all dot products of two sets of vectors, (..., n, d) and (..., m, d), as (..., n, m)."""
    if rows.shape[-2] <= _ELEMENTWISE:
        return (rows.unsqueeze(-2) * columns.unsqueeze(-3)).sum(-1)
    return rows @ columns.transpose(-1, -2)


def _climb(query: Tensor, key: Tensor, gate: Tensor, chunk: int, reverse: bool) -> _Direction:
    decay = gate.exp().unsqueeze(2)
    key = key.unsqueeze(2)
    query = query.unsqueeze(2) * decay
    tree = _Direction(reverse, [query], [key], [decay], [])
    for _ in range(chunk.bit_length() - 1):
        early_query, late_query = _pairs(query, reverse)
        early_key, late_key = _pairs(key, reverse)
        early_decay, late_decay = _pairs(decay, reverse)
        tree.crossings.append(_products(late_query, early_key))
        query = _join(early_query, late_query * early_decay, reverse)
        key = _join(early_key * late_decay, late_key, reverse)
        decay = early_decay * late_decay
        tree.queries.append(query)
        tree.keys.append(key)
        tree.decays.append(decay)
    return tree


def _weights(diagonal: Tensor, forward: _Direction, backward: _Direction | None) -> Tensor:
    """Assemble the weights inside each chunk, (rows, chunks, chunk, chunk), from those between its blocks."""
    weights = diagonal[..., None, None]
    for level, lower in enumerate(forward.crossings):
        first, second = _pairs(weights, reverse=False)
        upper = torch.zeros_like(lower) if backward is None else backward.crossings[level]
        weights = torch.cat((torch.cat((first, upper), -1), torch.cat((lower, second), -1)), -2)
    return weights


def _carry(added: Tensor, decay: Tensor, state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """Carry a state (rows, dk, dv) over the chunks, in each of which it becomes ``added + decay * state``.

    Returns:
        The state that each chunk found, (rows, chunks, dk, dv), and the last one.
    """
    if state is None:
        state = torch.zeros_like(added[:, 0])
    found: list[Tensor] = []
    chunks = range(added.shape[1])
    for chunk in reversed(chunks) if reverse else chunks:
        found.append(state)
        state = torch.addcmul(added[:, chunk], decay[:, chunk], state)
    return torch.stack(found[::-1] if reverse else found, dim=1), state


def _pass_states(tree: _Direction, value: Tensor, state: Tensor | None) -> Tensor:
    """Carry the state (rows, dk, dv) over the chunks; fill `tree.entering` and return the last one."""
    added = tree.keys[-1].transpose(-1, -2) @ value
    tree.entering, state = _carry(added, tree.decays[-1].transpose(-1, -2), state, tree.reverse)
    return state


def _pass_states_backward(
    tree: _Direction, value: Tensor, grad_out: Tensor, grad_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the chunks' queries, keys, decays, of the values and of the first state."""
    used = tree.queries[-1].transpose(-1, -2) @ grad_out
    grad_leaving, grad_state = _carry(used, tree.decays[-1].transpose(-1, -2), grad_state, not tree.reverse)
    return (
        grad_out @ tree.entering.transpose(-1, -2),
        value @ grad_leaving.transpose(-1, -2),
        (grad_leaving * tree.entering).sum(-1).unsqueeze(-2),
        tree.keys[-1] @ grad_leaving,
        grad_state,
    )


def _descend(
    tree: _Direction, grad_weights: Tensor, grad_query: Tensor, grad_key: Tensor, grad_decay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and gate, each (rows, length, dk), from those of the chunks' values."""
    reverse = tree.reverse
    for level in reversed(range(len(tree.crossings))):
        _, late_query = _pairs(tree.queries[level], reverse)
        early_key, _ = _pairs(tree.keys[level], reverse)
        early_decay, late_decay = _pairs(tree.decays[level], reverse)
        size = late_query.shape[-2]
        first, second = slice(None, size), slice(size, None)
        early, late = (second, first) if reverse else (first, second)
        crossing = grad_weights[..., late, early]
        grad_late_query, grad_early_key = grad_query[..., late, :], grad_key[..., early, :]
        grad_early_decay = grad_decay * late_decay + (grad_late_query * late_query).sum(-2, keepdim=True)
        grad_late_decay = grad_decay * early_decay + (grad_early_key * early_key).sum(-2, keepdim=True)
        grad_late_query = grad_late_query * early_decay + crossing @ early_key
        grad_early_key = grad_early_key * late_decay + crossing.transpose(-1, -2) @ late_query
        grad_query = _interleave(grad_query[..., early, :], grad_late_query, reverse)
        grad_key = _interleave(grad_early_key, grad_key[..., late, :], reverse)
        grad_decay = _interleave(grad_early_decay, grad_late_decay, reverse)
        grad_weights = torch.stack((grad_weights[..., first, first], grad_weights[..., second, second]), 2).flatten(
            1, 2
        )
    decay = tree.decays[0]
    grad_gate = grad_decay * decay + grad_query * tree.queries[0]
    return (grad_query * decay).squeeze(2), grad_key.squeeze(2), grad_gate.squeeze(2)


def _interleave(early: Tensor, late: Tensor, reverse: bool) -> Tensor:
    """Undo `_pairs`."""
    return torch.stack((late, early) if reverse else (early, late), dim=2).flatten(1, 2)


def _chunk_size(length: int) -> int:
    """Return how many tokens a chunk takes: the usual power of two that pads least."""
    # At least 2, so that a single token's gate is part of autograd's graph and its gradient zero, not None.
    return min(max(2, 1 << (length - 1).bit_length()), min(CHUNKS, key=lambda chunk: -length % chunk))


def _rows(x: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """(batch, length, heads, dim) to (batch x heads, padded length, dim)."""
    return F.pad(x.transpose(1, 2).flatten(0, 1).to(dtype), (0, 0, 0, padding))


def _tokens(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `_rows`, to the first three axes of `like`; contiguous."""
    batch, length, heads = like.shape[:3]
    return x[:, :length].unflatten(0, (batch, heads)).transpose(1, 2).to(dtype).contiguous()


class _Attention:
    """The output in one or both directions, and its gradients.

    Tensors are (rows, length, dim), padded, in the computing dtype; values (rows, chunks, chunk, dv).
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, gates: list[Tensor], chunk: int):
        self.query, self.key = query, key
        self.value = value.unflatten(1, (-1, chunk))
        self.trees = [
            _climb(query, key, gate, chunk, reverse) for gate, reverse in zip(gates, (False, True), strict=False)
        ]
        # Each direction counts the token itself, undecayed.
        own = len(gates) * (query * key).sum(-1)
        self.weights = _weights(own, self.trees[0], self.trees[1] if len(gates) > 1 else None)
        self.out = self.weights @ self.value

    def pass_states(self, state: Tensor | None) -> Tensor:
        """Add what the states entering the chunks give, the first direction starting from `state`; return its last."""
        last = [_pass_states(tree, self.value, None if tree.reverse else state) for tree in self.trees]
        for tree in self.trees:
            self.out = self.out + tree.queries[-1] @ tree.entering
        return last[0]

    def gradients(self, grad_out: Tensor, grad_state: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Return the gradients of query, key, value and the gates, and of the first direction's initial state."""
        grad_out = grad_out.unflatten(1, self.value.shape[1:3])
        grad_weights = grad_out @ self.value.transpose(-1, -2)
        grad_value = self.weights.transpose(-1, -2) @ grad_out
        own = len(self.trees) * grad_weights.diagonal(dim1=-2, dim2=-1).flatten(1).unsqueeze(-1)
        grad_query, grad_key = own * self.key, own * self.query
        grad_gates, grad_initial = [], None
        for tree in self.trees:
            if tree.entering is None:
                grads = [torch.zeros_like(x[-1]) for x in (tree.queries, tree.keys, tree.decays)]
            else:
                *grads, grad_added, grad_first = _pass_states_backward(
                    tree, self.value, grad_out, None if tree.reverse else grad_state
                )
                grad_value = grad_value + grad_added
                grad_initial = grad_initial if tree.reverse else grad_first
            from_query, from_key, grad_gate = _descend(tree, grad_weights, *grads)
            grad_query, grad_key = grad_query + from_query, grad_key + from_key
            grad_gates.append(grad_gate)
        return [grad_query, grad_key, grad_value.flatten(1, 2), *grad_gates], grad_initial


def _prepare(tensors: list[Tensor], scale: float, state: Tensor | None) -> tuple[_Attention, Tensor | None]:
    """Return the attention of q, k, v and the gates inside the chunks, and the initial state as (rows, dk, dv)."""
    dtype = compute_dtype(*tensors, state)
    [length] = numbers(tensors[0].shape[1])
    chunk = _chunk_size(length)
    # A padded token has k = v = 0 and decay 1: it changes no state.
    query, key, value, *gates = (_rows(x, -length % chunk, dtype) for x in tensors)
    return _Attention(query * scale, key, value, gates, chunk), None if state is None else state.flatten(0, 1).to(dtype)


def _exported(tensors: list[Tensor], scale: float, state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (output, last state) of one direction, of q, k, v and g, in a graph that serves every length."""
    q, k, v, g = (x.to(dtype) for x in tensors)
    decay, added = g.exp().unsqueeze(-1), k.unsqueeze(-1) * v.unsqueeze(-2)
    if state is not None:
        added = torch.cat((added[:, :1] + decay[:, :1] * state.to(dtype).unsqueeze(1), added[:, 1:]), 1)
    states = scan_states(decay, added)
    return scale * (q.unsqueeze(-2) @ states).squeeze(-2), states[:, -1]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, final state), the state empty unless asked for; shapes as `gated_linear_attention`."""
    tensors, dtype = [a.q, a.k, a.v, a.g], compute_dtype(*SCHEMA.input_tensors(a))
    if is_symbolic(a.q.shape[1]):
        out, state = _exported(tensors, a.scale, a.initial_state, dtype)
        return out.to(a.v.dtype), state if a.output_final_state else out.new_empty(0, dtype=dtype)
    attention, state = _prepare(tensors, a.scale, a.initial_state)
    if state is not None or a.output_final_state or attention.value.shape[1] > 1:
        state = attention.pass_states(state)
    out = _tokens(attention.out.flatten(1, 2), a.v, a.v.dtype)
    if not a.output_final_state:
        return out, out.new_empty(0, dtype=dtype)
    return out, state.unflatten(0, (a.q.shape[0], a.q.shape[2]))


def _input_gradients(
    attention: _Attention, tensors: list[Tensor], scale: float, grad_out: Tensor, grad_last: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Return the gradients of q, k, v and the gates in their dtypes, and that of the initial state."""
    padding = attention.query.shape[1] - tensors[0].shape[1]
    grads, grad_initial = attention.gradients(_rows(grad_out, padding, attention.value.dtype), grad_last)
    grads[0] = grads[0] * scale
    return [_tokens(grad, x, x.dtype) for grad, x in zip(grads, tensors, strict=True)], grad_initial


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g and initial_state (empty where there is none), in their dtypes."""
    tensors, (grad_out, grad_state) = [a.q, a.k, a.v, a.g], gradients
    attention, state = _prepare(tensors, a.scale, a.initial_state)
    grad_last = None if grad_state is None else grad_state.flatten(0, 1).to(attention.value.dtype)
    if state is not None or grad_state is not None or attention.value.shape[1] > 1:
        attention.pass_states(state)
    grads, grad_initial = _input_gradients(attention, tensors, a.scale, grad_out, grad_last)
    if a.initial_state is None:
        return *grads, a.q.new_empty(0)
    return *grads, grad_initial.reshape(a.initial_state.shape).to(a.initial_state.dtype)


def bidirectional_forward(a: BidirectionalArguments) -> Tensor:
    """Return the merged output of both directions; shapes as `bidirectional_gated_linear_attention`."""
    tensors, scale, out_dtype = BIDIRECTIONAL_SCHEMA.input_tensors(a), merged(a), a.out_dtype or a.v.dtype
    if is_symbolic(a.q.shape[1]):
        dtype = compute_dtype(*tensors)
        out, _ = _exported(tensors[:4], scale, None, dtype)
        flipped, _ = _exported([x.flip(1) for x in (*tensors[:3], a.g_backward)], scale, None, dtype)
        return (out + flipped.flip(1)).to(out_dtype)
    attention, _ = _prepare(tensors, scale, None)
    if attention.value.shape[1] > 1:
        attention.pass_states(None)
    return _tokens(attention.out.flatten(1, 2), a.v, out_dtype)


def bidirectional_backward(a: BidirectionalArguments, gradients: BidirectionalGradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g_forward and g_backward, in their dtypes."""
    tensors, scale = BIDIRECTIONAL_SCHEMA.input_tensors(a), merged(a)
    attention, _ = _prepare(tensors, scale, None)
    if attention.value.shape[1] > 1:
        attention.pass_states(None)
    return tuple(_input_gradients(attention, tensors, scale, gradients.grad_out, None)[0])


def merged(a: BidirectionalArguments) -> float:
    """Return the factor of the queries that halves the sum of the directions where their mean is asked for."""
    return 0.5 * a.scale if a.merge == "mean" else a.scale
