"""Gated linear attention in Triton: states at the chunks' ends, then every chunk by itself.

The length is cut into chunks of up to 64 tokens. `states_kernel` walks over the chunks with a tile of the state in
registers and writes the state that enters each; `mix_kernel` then forms, a program per chunk, the weights between the
chunk's tokens and the output, for both directions from one read of q, k and v. In backward `states_kernel` runs once
more for the gradients of the states, `mix_kernel` (transposed) gives the gradient of v, and `gradients_kernel` those of
q, k and the gates.

No exponent is ever positive, and no two cumulative gates are subtracted: a decay from token j to token i is a product
of one from j to the end of its block, one over whole blocks, and one from the start of i's block to i, each the
exponential of a sum of gates; inside a block of 16 tokens the decays are running products. So a gate of -1e3 neither
overflows nor costs the tokens after it their precision.

Yang et al., 2023, Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635).
"""

import torch
import triton
from torch import Tensor

from visionmix.kernels.gated_linear_attention import reference
from visionmix.kernels.gated_linear_attention.schema import (
    BIDIRECTIONAL_SCHEMA,
    Arguments,
    BidirectionalArguments,
    BidirectionalGradients,
    Gradients,
)
from visionmix.kernels.gated_linear_attention.triton_kernels import gradients_kernel, mix_kernel, states_kernel
from visionmix.kernels.gpu import dot_precision, launch


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """Return the stride arguments of (batch, length, heads, dim) tensors: name to s{name}_b, _t, _h, _d."""
    return {
        f"s{name}_{axis}": 0 if x is None else x.stride(place)
        for name, x in tensors.items()
        for place, axis in enumerate("bthd")
    }


def _tile(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


class _Problem:
    """Sizes, tiles and the launches on one set of inputs."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, scale: float):
        self.q, self.k, self.v, self.gates, self.scale = q, k, v, gates, scale
        self.batch, self.length, self.heads, self.dk = q.shape
        self.dv = v.shape[3]
        self.rows = self.batch * self.heads
        precision = dot_precision(q, k, v, *gates)
        # Float32 tiles of more tokens do not fit the registers.
        self.half = precision == "tf32"
        self.chunk = _tile(self.length, 64 if self.half else 32)
        self.chunks = triton.cdiv(self.length, self.chunk)
        self.sizes = {
            "DK": self.dk,
            "DV": self.dv,
            "CHUNK": self.chunk,
            "BV": _tile(self.dv, 32),
            "PRECISION": precision,
        }

    def gate(self, number: int) -> Tensor | None:
        return self.gates[number] if number < len(self.gates) else None

    def states(
        self, number: int, x: Tensor, y: Tensor, keys: bool, first: Tensor | None, last: Tensor | None
    ) -> Tensor | None:
        """Walk over the chunks for direction `number`; return the states before each chunk, None if all are 0."""
        needed = self.chunks > 1 or first is not None
        if not needed and last is None:
            return None
        states = self.q.new_empty(self.rows, self.chunks, self.dk, self.dv, dtype=torch.float32) if needed else None
        block_k, block_v = _tile(self.dk, 32), _tile(self.dv, 32)
        tiles_k, tiles_v = triton.cdiv(self.dk, block_k), triton.cdiv(self.dv, block_v)
        launch(
            states_kernel,
            (self.rows, tiles_k, tiles_v),
            p_x=x,
            p_y=y,
            p_g=self.gates[number],
            p_first=None if first is None else first.contiguous(),
            p_states=states,
            p_last=last,
            scale=1.0 if keys else self.scale,
            length=self.length,
            heads=self.heads,
            **_strides(x=x, y=y, g=self.gates[number]),
            **self.sizes | {"BK": block_k, "BV": block_v},
            DOWN=(number == 1) == keys,
            KEYS=keys,
            num_warps=4,
            passes={"p_x": tiles_v, "p_g": tiles_v, "p_y": tiles_k},
            flops=3 * self.rows * self.length * self.dk * self.dv,
        )
        return states

    def mix(self, y: Tensor, states: list[Tensor | None], out: Tensor, transposed: bool) -> None:
        launch(
            mix_kernel,
            (self.rows, self.chunks),
            p_q=self.q,
            p_k=self.k,
            p_y=y,
            p_g=self.gates[0],
            p_g2=self.gate(1),
            p_states=states[0],
            p_states2=states[1] if len(states) > 1 else None,
            p_out=out,
            scale=self.scale,
            length=self.length,
            heads=self.heads,
            **_strides(q=self.q, k=self.k, y=y, g=self.gates[0], g2=self.gate(1), o=out),
            **self.sizes,
            # Wider tiles do not fit the registers where there are several, or where they are masked.
            BK=32 if self.dk == 32 else 16,
            TRANSPOSED=transposed,
            num_warps=4,
            flops=self.rows * self.length * self._within(states, len(self.gates)),
        )

    def gradients(
        self,
        number: int,
        grad_out: Tensor,
        states: Tensor | None,
        grad_states: Tensor | None,
        added: list[Tensor],
        outs: list[Tensor],
    ) -> None:
        """Write direction `number`'s gradients of q, k and its gates to `outs`, the former two plus those `added`."""
        block_k = 16
        tiles = triton.cdiv(self.dk, block_k)
        launch(
            gradients_kernel,
            (self.rows, self.chunks, tiles),
            p_q=self.q,
            p_k=self.k,
            p_v=self.v,
            p_g=self.gates[number],
            p_do=grad_out,
            p_s=states,
            p_ds=grad_states,
            p_added_q=added[0] if added else None,
            p_added_k=added[1] if added else None,
            p_dq=outs[0],
            p_dk=outs[1],
            p_dg=outs[2],
            scale=self.scale,
            length=self.length,
            heads=self.heads,
            **_strides(q=self.q, k=self.k, v=self.v, g=self.gates[number], o=grad_out),
            **self.sizes,
            BK=block_k,
            REVERSE=number == 1,
            num_warps=8 if self.chunk == 64 else 4,
            passes={"p_v": tiles, "p_do": tiles},
            flops=2 * self.rows * self.length * self._within([states], 1),
        )

    def _within(self, states: list[Tensor | None], directions: int) -> int:
        """Operations per token of the chunk's weights, their product with the values and that with the states."""
        far = sum(2 * self.dk * self.dv for x in states if x is not None)
        return self.chunk * (directions * 2 * self.dk + 2 * self.dv) // (1 if directions > 1 else 2) + far


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, final state), the state empty unless asked for; shapes as `gated_linear_attention`."""
    problem = _Problem(a.q, a.k, a.v, a.g, scale=a.scale)
    shape = (problem.batch, problem.heads, problem.dk, problem.dv) if a.output_final_state else (0,)
    last = a.q.new_empty(shape, dtype=torch.float32)
    out = a.v.new_empty(a.v.shape)
    states = problem.states(0, a.k, a.v, True, a.initial_state, last if a.output_final_state else None)
    problem.mix(a.v, [states], out, transposed=False)
    return out, last


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g and initial_state (empty where there is none), in their dtypes."""
    problem = _Problem(a.q, a.k, a.v, a.g, scale=a.scale)
    initial, (grad_out, grad_state) = a.initial_state, gradients
    grad_initial = a.q.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    states = problem.states(0, a.k, a.v, True, initial, None)
    grad_states = problem.states(0, a.q, grad_out, False, grad_state, None if initial is None else grad_initial)
    return *_backward(problem, grad_out, [states], [grad_states]), grad_initial


def bidirectional_forward(a: BidirectionalArguments) -> Tensor:
    """Return the merged output of both directions; shapes as `bidirectional_gated_linear_attention`."""
    problem = _Problem(*BIDIRECTIONAL_SCHEMA.input_tensors(a), scale=reference.merged(a))
    out = a.v.new_empty(a.v.shape, dtype=a.out_dtype)
    states = [problem.states(number, a.k, a.v, True, None, None) for number in range(2)]
    problem.mix(a.v, states, out, transposed=False)
    return out


def bidirectional_backward(a: BidirectionalArguments, gradients: BidirectionalGradients) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g_forward and g_backward, in their dtypes."""
    problem = _Problem(*BIDIRECTIONAL_SCHEMA.input_tensors(a), scale=reference.merged(a))
    grad_out = gradients.grad_out
    states = [problem.states(number, a.k, a.v, True, None, None) for number in range(2)]
    grad_states = [problem.states(number, a.q, grad_out, False, None, None) for number in range(2)]
    return _backward(problem, grad_out, states, grad_states)


def _backward(
    problem: _Problem, grad_out: Tensor, states: list[Tensor | None], grad_states: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and the gates."""
    if states[0] is None or grad_states[0] is None:
        # One of them is zero throughout: with one chunk, there is no initial state or no gradient of the last one.
        states, grad_states = _with_zeros(states, grad_states)
    q, k, v, gates = problem.q, problem.k, problem.v, problem.gates
    grad_q, grad_k, grad_v, *grad_gates = (x.new_empty(x.shape) for x in (q, k, v, *gates))
    problem.mix(grad_out, grad_states, grad_v, transposed=True)
    added: list[Tensor] = []
    for number, grad_gate in enumerate(grad_gates):
        last = number == len(gates) - 1
        sums = [grad_q, grad_k] if last else [torch.empty_like(x, dtype=torch.float32) for x in (grad_q, grad_k)]
        problem.gradients(number, grad_out, states[number], grad_states[number], added, [*sums, grad_gate])
        added = sums
    return grad_q, grad_k, grad_v, *grad_gates


def _with_zeros(
    states: list[Tensor | None], grad_states: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    some = next((x for x in (*states, *grad_states) if x is not None), None)
    if some is None:
        return states, grad_states
    return tuple([torch.zeros_like(some) if x is None else x for x in group] for group in (states, grad_states))
