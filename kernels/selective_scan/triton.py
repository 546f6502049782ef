"""The selective scan in Triton: a program walks over the chunks of a tile of channels.

The states go from chunk to chunk through memory: `forward_kernel` writes those entering each chunk, which the backward
pass needs, and reads them again. `backward_kernel` walks back from the last chunk. What programs share (A, D,
delta_bias, and B and C of a group's channels) goes to partial buffers, which are summed here: no atomics, so that
gradients repeat bit by bit.

Gu and Dao, 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv 2312.00752).
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from visionmix.kernels.dispatch import log_slow_path
from visionmix.kernels.gpu import launch
from visionmix.kernels.selective_scan import reference
from visionmix.kernels.selective_scan.chunks import CHUNK, entering_shape
from visionmix.kernels.selective_scan.schema import Arguments, Gradients
from visionmix.kernels.selective_scan.triton_kernels import Constants, Strides, backward_kernel, forward_kernel

# Channels of a thread, and warps, each with its own. More channels read B and C less often and leave fewer partial sums
# of their gradients, until registers spill.
_FORWARD_TILE = (2, 4)
_BACKWARD_TILE = (1, 8)


def _lanes(length: int) -> int:
    """Return the lanes that a chunk's tokens lie over, eight in each: as few as hold a short sequence, 4 at least."""
    return min(CHUNK // 8, max(4, triton.next_power_of_2(triton.cdiv(length, 8))))


def _is_constant(projection: Tensor) -> bool:
    return projection.dim() == 2


def _strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Return a tensor's first strides, 0 for a tensor that is not given."""
    return (0,) * axes if x is None else x.stride()[:axes]


def _empty_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return rows of `shape`'s last axis, each as long as the next multiple of 8."""
    *others, length = shape
    return like.new_empty((*others, length + -length % 8), dtype=dtype)


def _cut(rows: Tensor, length: int) -> Tensor:
    """Return the rows without what was added to their end."""
    return rows[..., :length].contiguous()


def _in_rows(x: Tensor | None) -> Tensor | None:
    """Return x (..., length) with tokens side by side in rows that begin at multiples of 8 and go on to one with zeros.

    Another layout is copied once, instead of being read token by token for every state.
    """
    if x is None or _is_constant(x):
        return x
    length = x.shape[-1]
    padding = -length % 8
    if padding == 0 and x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]):
        return x
    rows = _empty_rows(x, x.shape)
    rows[..., :length] = x
    rows[..., length:] = 0
    return rows


class _Problem:
    """Sizes and the arguments that both kernels take."""

    def __init__(self, a: Arguments, tile: tuple[int, int]):
        A, D = a.A, a.D
        self.batch, self.dim, self.length = a.u.shape
        u, delta, z, B, C = map(_in_rows, (a.u, a.delta, a.z, a.B, a.C))
        self.states = A.shape[1]
        self.groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        group_dim = self.dim // self.groups
        channels, self.warps = tile
        self.tiles = triton.cdiv(group_dim, channels * self.warps)
        self.grid = (self.batch, self.groups, self.tiles)
        maps = ((0, *x.stride()) if _is_constant(x) else _strides(x, 3) for x in (B, C))
        strides = Strides(*(_strides(x, 2) for x in (u, delta, z, A)), *maps, _strides(D, 1))
        constants = Constants(
            self.states,
            channels,
            self.warps,
            _lanes(self.length),
            SOFTPLUS=a.delta_softplus,
            B_CONSTANT=_is_constant(B),
            C_CONSTANT=_is_constant(C),
        )
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
            "s": strides,
            "K": constants,
        }
        self.passes = {name: self.tiles for name, x in (("p_B", B), ("p_C", C)) if not _is_constant(x)}
        self.size = self.batch * self.dim * self.length


def _run_forward(a: Arguments, out: Tensor | None) -> Tensor:
    """Fill `out`, where given, and return the states entering the chunks and the last."""
    problem = _Problem(a, _FORWARD_TILE)
    states = a.u.new_empty(entering_shape(a.u, a.A), dtype=torch.float32)
    # Without an output, C, D and z are not read.
    unused = {} if out is not None else {"p_D": None, "p_z": None}
    launch(
        forward_kernel,
        problem.grid,
        **problem.arguments | unused,
        p_out=out,
        p_states=states,
        num_warps=problem.warps,
        passes=problem.passes | ({"p_C": 0} if out is None else {}),
        flops=problem.size * (7 * problem.states + 3),
    )
    return states


def _leaves_to_reference(gap: Tensor | None) -> bool:
    """Return whether there are gaps, which the kernels do not know; log it once."""
    if gap is not None:
        log_slow_path("selective_scan", "the Triton kernels cross no gaps", "leave out gap where states need not")
    return gap is not None


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, last state, states), the latter two empty unless asked for.

    Shapes as `selective_scan`, and `entering_shape`.
    """
    if _leaves_to_reference(a.gap):
        return reference.forward(a)
    u = a.u
    out = _empty_rows(u, u.shape, a.out_dtype)
    states = _run_forward(a, out)
    nothing = u.new_empty(0, dtype=torch.float32)
    last = states[:, -1].mT.contiguous() if a.return_last_state else nothing
    return _cut(out, u.shape[-1]), last, states if a.keep_states else nothing


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and gap in their dtypes, empty for what is None.

    The states are found anew where the forward pass did not keep them.
    """
    if _leaves_to_reference(a.gap):
        return reference.backward(a, gradients)
    u, delta, A, B, C, D, z, delta_bias = a[:8]
    grad_out, grad_state, states = gradients
    problem = _Problem(a, _BACKWARD_TILE)
    grad_out = _in_rows(grad_out)
    batch, dim, length = u.shape
    if states is None or states.dim() == 1:
        states = _run_forward(a, None)

    def partial(*shape: int, zeros: bool = False) -> Tensor:
        return (u.new_zeros if zeros else u.new_empty)(shape, dtype=torch.float32)

    def projection(x: Tensor) -> Tensor:
        if _is_constant(x):
            return partial(batch, problem.states, dim, zeros=True)
        return _empty_rows(u, (problem.tiles, *x.shape), torch.float32)

    by_state = (batch, problem.states, dim)
    flow = partial(*by_state, zeros=True) if grad_state is None else grad_state.mT.contiguous().float()
    grad_A, grad_B, grad_C = partial(*by_state, zeros=True), projection(B), projection(C)
    grad_u, grad_delta, grad_z = (None if x is None else _empty_rows(x, x.shape) for x in (u, delta, z))
    grad_D, grad_bias = (None if x is None else partial(batch, dim) for x in (D, delta_bias))
    launch(
        backward_kernel,
        problem.grid,
        **problem.arguments,
        s_grad=_strides(grad_out, 2),
        p_states=states,
        p_grad=grad_out,
        p_flow=flow,
        p_du=grad_u,
        p_ddelta=grad_delta,
        p_dA=grad_A,
        p_dB=grad_B,
        p_dC=grad_C,
        p_dD=grad_D,
        p_dz=grad_z,
        p_dbias=grad_bias,
        num_warps=problem.warps,
        passes=problem.passes,
        flops=problem.size * (19 * problem.states + 8),
    )

    def summed(grad: Tensor | None, x: Tensor | None) -> Tensor:
        if grad is None:
            return u.new_empty(0)
        total = grad.sum(0)
        return (total.mT if x.dim() == 2 else _cut(total, length) if x.dim() == 4 else total).to(x.dtype)

    return (
        _cut(grad_u, length),
        _cut(grad_delta, length),
        summed(grad_A, A),
        summed(grad_B, B),
        summed(grad_C, C),
        summed(grad_D, D),
        u.new_empty(0) if grad_z is None else _cut(grad_z, length),
        summed(grad_bias, delta_bias),
        u.new_empty(0),
    )
