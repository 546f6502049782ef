"""Gated linear attention in Triton: states at the chunks' ends, then every chunk by itself.

The length is cut into chunks of 32 tokens (16 unless q, k and v are bfloat16 and dk at most 32). `states_kernel` walks
over the chunks with a tile of the state in registers and writes the state that enters each; `mix_kernel` then forms, a
program per chunk, the weights between the chunk's tokens and the output, for both directions from one read of q, k and
v. In backward `states_kernel` runs once more for the gradients of the states, `mix_kernel` (transposed) gives the
gradient of v, and `gradients_kernel` those of q, k and the gates.

No step walks over tokens. Sums of gates are products with tiles of zeros and ones; a chunk's weights are one product
around its middle where gates allow it, else one for each level of segments of 1, 2, 4, ... tokens. Then no exponent is
positive, and no two cumulative gates are subtracted: a gate of -1e3 neither overflows nor costs the tokens after it
their precision.

Products of bfloat16 inputs take bfloat16 operands, and states lie in memory in bfloat16. Other inputs take float32
operands (TF32 for float16, with its 11 bits but the range of float32, so that states and weights cannot overflow).

Yang et al., 2023, Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionmix.kernels.gated_linear_attention import reference
from visionmix.kernels.gated_linear_attention.schema import (
    BIDIRECTIONAL_SCHEMA,
    Arguments,
    BidirectionalArguments,
    BidirectionalGradients,
    Gradients,
)
from visionmix.kernels.gated_linear_attention.triton_kernels import Tiles, gradients_kernel, mix_kernel, states_kernel
from visionmix.kernels.gpu import dot_precision, launch

# Values in bfloat16 whose sum is one of the dtype.
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@cache
def _ones(levels: int, device: torch.device) -> Tensor:
    """Return the tiles (2 directions x tiles, chunk, chunk) of zeros and ones whose products with gates are their sums.

    Rows and columns are a chunk's tokens. A tile holds ones where the column's gate belongs to the row's sum; see the
    numbers in `triton_kernels.py`.
    """
    size = 1 << levels
    tiles = []
    for times in (torch.arange(size), torch.arange(size).flip(0)):
        i, j = times[:, None], times[None, :]
        upto, after = (j <= i).int(), (j > i).int()
        tiles += [upto, after, upto - (j < size // 2).int()]
        for level in range(levels):
            same = ((i ^ j) < 1 << level).int()
            tiles += [upto * same, after * same]
    return torch.stack(tiles).to(device, torch.bfloat16)


def _tile(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


class _Problem:
    """Sizes, tiles and the launches on one set of inputs."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, scale: float):
        self.q, self.k, self.v, self.gates, self.scale = q, k, v, gates, scale
        self.batch, self.length, self.heads, self.dk = q.shape
        self.dv = v.shape[3]
        self.rows = self.batch * self.heads
        narrow = all(x.dtype == torch.bfloat16 for x in (q, k, v))
        self.state_dtype = torch.bfloat16 if narrow else torch.float32
        # Larger tiles do not fit the registers.
        large = narrow and self.dk <= 32
        self.levels = 5 if large and self.length > 16 else 4
        self.warps = 2 if large else 1
        self.block_v = _tile(self.dv, 32 if narrow and 32 < self.dv <= 64 else 16)
        self.chunks = triton.cdiv(self.length, 1 << self.levels)
        self.common = {
            "p_ones": _ones(self.levels, q.device),
            "p_g": gates[0],
            "p_g2": gates[1] if len(gates) > 1 else None,
            "s_g": gates[0].stride(),
            "s_g2": gates[-1].stride(),
            "scale": scale,
            "length": self.length,
            "heads": self.heads,
        }
        self.products = (tl.bfloat16, "ieee") if narrow else (tl.float32, dot_precision(q, k, v))

    def _offset(self, *tensors: Tensor) -> tl.dtype:
        """Return the type that holds the offsets inside a chunk of (batch, length, heads, dim) tensors."""
        farthest = max((x.stride(1) << self.levels) + x.stride(3) * x.shape[3] for x in (*tensors, *self.gates))
        return tl.int64 if farthest >= 1 << 31 else tl.int32

    def _tiles(self, block_k: int, block_v: int, *tensors: Tensor) -> Tiles:
        """Return a kernel's constants, for the tensors whose chunks it reads and writes."""
        sizes = (self.dk, self.dv, block_k, block_v, self.levels, 1 << self.levels)
        parts = max(_PARTS[x.dtype] for x in self.gates)
        return Tiles(*sizes, *self.products, parts, self._offset(*tensors))

    def states(self, x: Tensor, y: Tensor, keys: bool, first: Tensor | None, last: Tensor | None) -> Tensor | None:
        """Walk over the chunks; return the states before each chunk, None if all are 0."""
        needed = self.chunks > 1 or first is not None
        if not needed and last is None:
            return None
        directions = len(self.gates)
        shape = (directions, self.rows, self.chunks, self.dk, self.dv)
        states = self.q.new_empty(shape, dtype=self.state_dtype) if needed else None
        block_k, block_v = _tile(self.dk, 32), _tile(self.dv, 32)
        tiles_k, tiles_v = triton.cdiv(self.dk, block_k), triton.cdiv(self.dv, block_v)
        launch(
            states_kernel,
            (self.rows, tiles_k * tiles_v, directions),
            **self.common | {"scale": 1.0 if keys else self.scale},
            p_x=x,
            p_y=y,
            p_first=None if first is None else first.contiguous(),
            p_states=states,
            p_last=last,
            s_x=x.stride(),
            s_y=y.stride(),
            KEYS=keys,
            tiles=self._tiles(block_k, block_v, x, y),
            num_warps=2,
            num_stages=3,
            passes={"p_x": tiles_v * directions, "p_g": tiles_v, "p_g2": tiles_v, "p_y": tiles_k * directions},
            flops=3 * directions * self.rows * self.length * self.dk * self.dv,
        )
        return states

    def mix(self, x: Tensor, y: Tensor, v: Tensor, states: Tensor | None, out: Tensor, transposed: bool) -> None:
        # Of several tiles, wider ones do not fit the registers.
        block_k, block_v = _tile(self.dk, 32 if self.dk <= 32 else 16), _tile(self.dv, 32 if self.dv <= 64 else 16)
        launch(
            mix_kernel,
            (self.rows, self.chunks),
            **self.common,
            p_x=x,
            p_y=y,
            p_v=v,
            p_states=states,
            p_out=out,
            s_x=x.stride(),
            s_y=y.stride(),
            s_v=v.stride(),
            s_out=out.stride(),
            TRANSPOSED=transposed,
            tiles=self._tiles(block_k, block_v, x, y, v, out),
            num_warps=self.warps,
            flops=self.rows * self.length * self._within(states),
        )

    def gradients(self, grad_out: Tensor, states: Tensor | None, grad_states: Tensor | None) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v and the gates."""
        # With one chunk, where there is no initial state or no gradient of the last one, one of them is 0 throughout.
        if states is None and grad_states is not None:
            states = torch.zeros_like(grad_states)
        elif grad_states is None and states is not None:
            grad_states = torch.zeros_like(states)
        q, k, v = self.q, self.k, self.v
        grad_q, grad_k, grad_v, *grad_gates = (x.new_empty(x.shape) for x in (q, k, v, *self.gates))
        self.mix(k, q, grad_out, grad_states, grad_v, True)
        block_k = _tile(self.dk, 16)
        tiles = triton.cdiv(self.dk, block_k)
        launch(
            gradients_kernel,
            (self.rows, self.chunks, tiles),
            **self.common,
            p_q=q,
            p_k=k,
            p_v=v,
            p_do=grad_out,
            p_s=states,
            p_ds=grad_states,
            p_dq=grad_q,
            p_dk=grad_k,
            p_dg=grad_gates[0],
            p_dg2=grad_gates[1] if len(grad_gates) > 1 else None,
            s_q=q.stride(),
            s_k=k.stride(),
            s_v=v.stride(),
            s_do=grad_out.stride(),
            s_out=grad_q.stride(),
            tiles=self._tiles(block_k, self.block_v, q, k, v, grad_out),
            num_warps=self.warps,
            passes=dict.fromkeys(("p_v", "p_do"), tiles),
            flops=2 * self.rows * self.length * self._within(states),
        )
        return grad_q, grad_k, grad_v, *grad_gates

    def _within(self, states: Tensor | None) -> int:
        """Operations a token of the chunk's weights, their product with the values and that with the states."""
        directions = len(self.gates)
        far = 0 if states is None else 2 * directions * self.dk * self.dv
        return (directions * 2 * self.dk + 2 * self.dv << self.levels) // (1 if directions > 1 else 2) + far


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, final state), the state empty unless asked for; shapes as `gated_linear_attention`."""
    problem = _Problem(a.q, a.k, a.v, a.g, scale=a.scale)
    shape = (problem.batch, problem.heads, problem.dk, problem.dv) if a.output_final_state else (0,)
    last = a.q.new_empty(shape, dtype=torch.float32)
    out = a.v.new_empty(a.v.shape)
    states = problem.states(a.k, a.v, True, a.initial_state, last if a.output_final_state else None)
    problem.mix(a.q, a.k, a.v, states, out, False)
    return out, last


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g and initial_state (empty where there is none), in their dtypes."""
    problem = _Problem(a.q, a.k, a.v, a.g, scale=a.scale)
    initial, (grad_out, grad_state) = a.initial_state, gradients
    grad_initial = a.q.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    states = problem.states(a.k, a.v, True, initial, None)
    grad_states = problem.states(a.q, grad_out, False, grad_state, None if initial is None else grad_initial)
    return *problem.gradients(grad_out, states, grad_states), grad_initial


def bidirectional_forward(a: BidirectionalArguments) -> Tensor:
    """Return the merged output of both directions; shapes as `bidirectional_gated_linear_attention`."""
    problem = _Problem(*BIDIRECTIONAL_SCHEMA.input_tensors(a), scale=reference.merged(a))
    out = a.v.new_empty(a.v.shape, dtype=a.out_dtype)
    problem.mix(a.q, a.k, a.v, problem.states(a.k, a.v, True, None, None), out, False)
    return out


def bidirectional_backward(a: BidirectionalArguments, gradients: BidirectionalGradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g_forward and g_backward, in their dtypes."""
    problem = _Problem(*BIDIRECTIONAL_SCHEMA.input_tensors(a), scale=reference.merged(a))
    grad_out = gradients.grad_out
    states = problem.states(a.k, a.v, True, None, None)
    return problem.gradients(grad_out, states, problem.states(a.q, grad_out, False, None, None))
