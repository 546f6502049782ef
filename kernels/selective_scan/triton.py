"""The selective scan in Triton: a program walks over the chunks of a tile of channels with the states in registers.

In backward `forward_kernel` runs once more for the states entering the chunks, and `backward_kernel` walks back from
there. What programs share (A, D, delta_bias, and B and C of a group's channels) goes to partial buffers, which are
summed here: no atomics, so that gradients repeat bit by bit.

Gu and Dao, 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv 2312.00752).
"""

import torch
import triton
from torch import Tensor

from visionmix.kernels.dispatch import log_slow_path
from visionmix.kernels.gpu import launch
from visionmix.kernels.selective_scan import reference
from visionmix.kernels.selective_scan.schema import Arguments, Gradients
from visionmix.kernels.selective_scan.triton_kernels import backward_kernel, forward_kernel


def _is_constant(projection: Tensor) -> bool:
    return projection.dim() == 2


class _Problem:
    """Sizes and the arguments that both kernels take."""

    def __init__(self, a: Arguments):
        u, delta, A, B, C, D, z = a[:7]
        self.batch, self.dim, self.length = u.shape
        self.states = A.shape[1]
        self.groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        group_dim = self.dim // self.groups
        # The fastest of the tiles timed on an H200: with 8 channels, there are programs enough.
        self.block = 8
        self.tokens = min(32, max(16, triton.next_power_of_2(self.length)))
        self.chunks = triton.cdiv(self.length, self.tokens)
        self.tiles = triton.cdiv(group_dim, self.block)
        self.grid = (self.batch, self.groups, self.tiles)
        strides = {}
        for name, x in {"u": u, "d": delta, "z": z}.items():
            strides |= {f"s{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate("bdt")}
        for name, x in {"B": B, "C": C}.items():
            values = (0, *x.stride(), 0) if _is_constant(x) else x.stride()
            strides |= {f"s{name}_{axis}": value for axis, value in zip("bcnt", values, strict=True)}
        self.arguments = {
            "p_u": u,
            "p_delta": delta,
            "p_A": A,
            "p_B": B,
            "p_C": C,
            "p_D": D,
            "p_z": z,
            "p_bias": None if a.delta_bias is None else a.delta_bias.contiguous(),
            "length": self.length,
            "dim": self.dim,
            "group_dim": group_dim,
            "sA_d": A.stride(0),
            "sA_n": A.stride(1),
            "sD_d": 0 if D is None else D.stride(0),
            **strides,
            "so_d": self.length,
            "so_t": 1,
            "N": self.states,
            "BN": triton.next_power_of_2(self.states),
            "BD": self.block,
            "BT": self.tokens,
            "SOFTPLUS": a.delta_softplus,
            "B_CONSTANT": _is_constant(B),
            "C_CONSTANT": _is_constant(C),
        }
        self.passes = {name: self.tiles for name, x in (("p_B", B), ("p_C", C)) if not _is_constant(x)}
        self.size = self.batch * self.dim * self.length

    def states_entering(self) -> Tensor:
        """Return the states entering the chunks, (batch, chunks, dim, states)."""
        u = self.arguments["p_u"]
        states = u.new_empty(self.batch, self.chunks, self.dim, self.states, dtype=torch.float32)
        self.forward(None, states, None)
        return states

    def forward(self, out: Tensor | None, states: Tensor | None, last: Tensor | None) -> None:
        # Without an output, C, D and z are not read.
        unused = {} if out is not None else {"p_D": None, "p_z": None}
        launch(
            forward_kernel,
            self.grid,
            **self.arguments | unused,
            p_out=out,
            p_states=states,
            p_last=last,
            num_warps=1,
            passes=self.passes | ({"p_C": 0} if out is None else {}),
            flops=self.size * (7 * self.states + 3),
        )


def _leaves_to_reference(gap: Tensor | None) -> bool:
    """Return whether there are gaps, which the kernels do not know; log it once."""
    if gap is not None:
        log_slow_path("selective_scan", "the Triton kernels cross no gaps", "leave out gap where states need not")
    return gap is not None


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, last state, nothing), the state empty unless asked for; shapes as `selective_scan`.

    The backward pass finds the states itself: none are kept.
    """
    if _leaves_to_reference(a.gap):
        return reference.forward(a)
    u, problem = a.u, _Problem(a)
    out = u.new_empty(u.shape, dtype=a.out_dtype)
    shape = (problem.batch, problem.dim, problem.states) if a.return_last_state else (0,)
    last = u.new_empty(shape, dtype=torch.float32)
    problem.forward(out, None, last if a.return_last_state else None)
    return out, last, u.new_empty(0, dtype=torch.float32)


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and gap in their dtypes, empty for what is None."""
    if _leaves_to_reference(a.gap):
        return reference.backward(a, gradients)
    u, delta, A, B, C, D, z, delta_bias = a[:8]
    grad_out, grad_state, _ = gradients
    problem = _Problem(a)
    batch, dim = problem.batch, problem.dim
    states = problem.states_entering()

    def partial(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    grads = {name: x.new_empty(x.shape) for name, x in (("p_du", u), ("p_ddelta", delta))}
    grad_A = partial(batch, dim, problem.states)
    projections = {
        name: partial(batch, dim, problem.states) if _is_constant(x) else partial(problem.tiles, *x.shape)
        for name, x in (("p_dB", B), ("p_dC", C))
    }
    grad_z = u.new_empty(0) if z is None else z.new_empty(z.shape)
    grad_D, grad_bias = (None if x is None else partial(batch, dim) for x in (D, delta_bias))
    launch(
        backward_kernel,
        problem.grid,
        **problem.arguments,
        **grads,
        **projections,
        p_states=states,
        p_grad=grad_out,
        p_grad_last=None if grad_state is None else grad_state.contiguous(),
        p_dA=grad_A,
        p_dD=grad_D,
        p_dz=None if z is None else grad_z,
        p_dbias=grad_bias,
        **{f"sg_{axis}": grad_out.stride(i) for i, axis in enumerate("bdt")},
        num_warps=1,
        passes=problem.passes,
        flops=problem.size * (19 * problem.states + 8),
    )
    nothing = u.new_empty(0)
    return (
        grads["p_du"],
        grads["p_ddelta"],
        grad_A.sum(0).to(A.dtype),
        projections["p_dB"].sum(0).to(B.dtype),
        projections["p_dC"].sum(0).to(C.dtype),
        nothing if D is None else grad_D.sum(0).to(D.dtype),
        grad_z,
        nothing if delta_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
        nothing,
    )
