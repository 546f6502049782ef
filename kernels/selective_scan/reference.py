"""The selective scan in PyTorch: all chunks step together through their positions.

The length is cut into about sqrt(length) chunks of sqrt(length) tokens. One sweep over the positions inside a chunk,
for all chunks at once, gives what each chunk adds to the state; a loop over chunks passes the states; a second sweep,
from the right states, gives the outputs. So 3 sqrt(length) steps, and a step's tensor is (batch, chunks, channels,
states): no tensor holds all tokens' states. The backward op recomputes the states of a few chunks at a time; only
autograd through `forward`, as under `use("reference")`, keeps those of every step.

Inside, tensors are laid out (position, batch, groups, chunks, ...), so that a step reads contiguous slices: channels
(..., channels of a group), B and C (..., states), or (groups, 1, channels of a group, states) where they are constant.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmix.kernels.dispatch import compute_dtype
from visionmix.kernels.exported import is_symbolic, scan_states
from visionmix.kernels.selective_scan.schema import SCHEMA, Arguments, Gradients

# The states of this many (token, channel, state) triples are kept at a time in backward.
_BACKWARD_STATES = 1 << 21


@dataclass
class _Layout:
    """How (batch, channels, length) tensors are cut into groups, chunks and positions."""

    groups: int
    length: int
    chunk: int
    dtype: torch.dtype

    def cut(self, x: Tensor) -> Tensor:
        """(batch, groups x channels, length) to (chunk, batch, groups, chunks, channels); zeros beyond the end."""
        x = F.pad(x.to(self.dtype), (0, -self.length % self.chunk))
        return x.unflatten(-1, (-1, self.chunk)).unflatten(1, (self.groups, -1)).permute(4, 0, 1, 3, 2).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`."""
        return x.permute(1, 2, 4, 3, 0).flatten(3).flatten(1, 2)[..., : self.length]

    def cut_projection(self, x: Tensor) -> Tensor:
        """B or C: (batch, groups, states, length) as `cut`; constant to (groups, 1, channels, states)."""
        if x.dim() == 2:
            return x.to(self.dtype).unflatten(0, (self.groups, -1)).unsqueeze(1)
        return self.cut(x.flatten(1, 2))

    def join_projection(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of B or C in the shape of `x`; that of a constant one is summed over batch and chunks."""
        if x.dim() == 2:
            return grad.sum((0, 2)).flatten(0, 1)
        return self.join(grad).unflatten(1, x.shape[1:3])


def _chunk_size(length: int) -> int:
    return math.ceil(math.sqrt(length))


def _is_constant(projection: Tensor) -> bool:
    return projection.dim() == 4


def _at(projection: Tensor, position: int) -> Tensor:
    """B or C at a position inside the chunks, as a factor of the states (batch, groups, chunks, channels, states)."""
    return projection if _is_constant(projection) else projection[position].unsqueeze(-2)


def _read(state: Tensor, projection: Tensor, position: int) -> Tensor:
    """Sum over the states, (batch, groups, chunks, channels): `sum_n C_n h_n`."""
    if _is_constant(projection) or state.shape[-1] == 1:
        return (state * _at(projection, position)).sum(-1)
    return (state @ projection[position].unsqueeze(-1)).squeeze(-1)


def _spread(x: Tensor, state: Tensor, projection: Tensor) -> Tensor:
    """Sum over a group's channels, (batch, groups, chunks, states), or nothing where the projection is constant."""
    if _is_constant(projection):
        return x.unsqueeze(-1) * state
    return (x.unsqueeze(-2) @ state).squeeze(-2)


@dataclass
class _Scan:
    """The recurrence `h_t = exp(delta_t A) h_(t-1) + x_t B_t`, `y_t = C_t h_t` on laid-out tensors.

    x is delta u; with gaps delta is what states decay by, longer than that of x."""

    delta: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def decay(self, position: int) -> Tensor:
        return (self.delta[position].unsqueeze(-1) * self.A).exp()

    def step(self, position: int, state: Tensor | None) -> Tensor:
        x, projection = self.x[position].unsqueeze(-1), _at(self.B, position)
        if state is None:
            return x * projection
        return torch.addcmul(self.decay(position) * state, x, projection)

    def total_decay(self) -> Tensor:
        return (self.delta.sum(0).unsqueeze(-1) * self.A).exp()

    def part(self, chunks: slice) -> "_Scan":
        """The same on some of the chunks."""
        B, C = (p if _is_constant(p) else p[:, :, :, chunks] for p in (self.B, self.C))
        return _Scan(self.delta[:, :, :, chunks], self.x[:, :, :, chunks], self.A, B, C)

    def entering(self) -> tuple[Tensor, Tensor]:
        """Return the state entering each chunk (batch, groups, chunks, channels, states) and the last state."""
        state = None
        for position in range(self.delta.shape[0]):
            state = self.step(position, state)
        return _pass(self.total_decay(), state, None)

    def leaving_gradient(self, grad_y: Tensor, grad_last: Tensor | None) -> Tensor:
        """Return the gradient of the state leaving each chunk."""
        grad = None
        for position in reversed(range(self.delta.shape[0])):
            read = grad_y[position].unsqueeze(-1) * _at(self.C, position)
            grad = self.decay(position) * (read if grad is None else grad + read)
        return _pass(self.total_decay().flip(2), grad.flip(2), grad_last)[0].flip(2)


def _pass(decay: Tensor, added: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Carry a state over the chunks (axis 2); return the one entering each chunk and the last one."""
    state = torch.zeros_like(added[:, :, 0]) if state is None else state
    entering = []
    for chunk in range(added.shape[2]):
        entering.append(state)
        state = torch.addcmul(added[:, :, chunk], decay[:, :, chunk], state)
    return torch.stack(entering, 2), state


def _prepare(a: Arguments, dtype: torch.dtype) -> tuple[_Layout, _Scan, Tensor]:
    """Return the layout, the recurrence, and the steps that inputs come with, laid out."""
    groups = a.B.shape[1] if a.B.dim() == 4 else a.C.shape[1] if a.C.dim() == 4 else 1
    layout = _Layout(groups, a.u.shape[-1], _chunk_size(a.u.shape[-1]), dtype)
    steps = layout.cut(_activate(a.delta.to(dtype), a.delta_bias, a.delta_softplus))
    # A padded token has delta = 0: decay 1 and no input.
    recurrence = _Scan(
        steps if a.gap is None else steps + layout.cut(a.gap),
        steps * layout.cut(a.u),
        a.A.to(dtype).unflatten(0, (groups, -1)).unsqueeze(1),
        layout.cut_projection(a.B),
        layout.cut_projection(a.C),
    )
    return layout, recurrence, steps


def _activate(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype).unsqueeze(-1)
    return F.softplus(delta) if delta_softplus else delta


def _exported(a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the states as C reads them, and the last state, in a graph that serves every length."""
    u, dim = a.u.to(dtype), a.u.shape[1]

    def per_channel(x: Tensor) -> Tensor:
        """(batch, groups, states, length) or (dim, states), to (batch or 1, length or 1, dim, states)."""
        x = x.to(dtype)
        if x.dim() == 2:
            return x[None, None]
        x = x.permute(0, 3, 1, 2).unsqueeze(3)
        return x.expand(-1, -1, -1, dim // x.shape[2], -1).flatten(2, 3)

    delta = _activate(a.delta.to(dtype), a.delta_bias, a.delta_softplus)
    decaying = delta if a.gap is None else delta + a.gap.to(dtype)
    decay = (decaying.transpose(1, 2).unsqueeze(-1) * a.A.to(dtype)).exp()
    states = scan_states(decay, (delta * u).transpose(1, 2).unsqueeze(-1) * per_channel(a.B))
    return (states * per_channel(a.C)).sum(-1).transpose(1, 2), states[:, -1]


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, last state, nothing), the state empty unless asked for.

    The backward pass finds the states itself: none are kept.
    """
    dtype = compute_dtype(*SCHEMA.input_tensors(a))
    if is_symbolic(a.u.shape[-1]):
        out, last = _exported(a, dtype)
    else:
        layout, scan, _ = _prepare(a, dtype)
        state, last = scan.entering()
        outputs = []
        for position in range(layout.chunk):
            state = scan.step(position, state)
            outputs.append(_read(state, scan.C, position))
        out = layout.join(torch.stack(outputs))
        last = last.flatten(1, 2)
    if a.D is not None:
        out = out + a.D.to(dtype).unsqueeze(-1) * a.u
    if a.z is not None:
        out = out * F.silu(a.z.to(dtype))
    last = last.contiguous() if a.return_last_state else out.new_empty(0)
    return out.to(a.out_dtype or a.u.dtype).contiguous(), last, out.new_empty(0)


def _gradients(
    scan: _Scan, grad_y: Tensor, grad_last: Tensor | None, outputs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of delta (as a decay rate), x, A, B and C as laid out, and the outputs y if asked for."""
    chunk, batch, groups, chunks, channels = scan.delta.shape
    states = scan.A.shape[-1]
    entering, _ = scan.entering()
    leaving = scan.leaving_gradient(grad_y, grad_last)
    at_once = max(1, _BACKWARD_STATES // max(1, chunk * batch * groups * channels * states))
    grad_delta, grad_x = torch.empty_like(scan.delta), torch.empty_like(scan.x)
    grad_A = scan.A.new_zeros(scan.A.shape)
    grad_B = torch.zeros_like(entering) if _is_constant(scan.B) else torch.empty_like(scan.B)
    grad_C = torch.zeros_like(entering) if _is_constant(scan.C) else torch.empty_like(scan.C)
    y = torch.empty_like(grad_y) if outputs else None
    for start in range(0, chunks, at_once):
        some = slice(start, start + at_once)
        part, part_grad_y = scan.part(some), grad_y[:, :, :, some]
        history = [entering[:, :, some]]
        for position in range(chunk):
            history.append(part.step(position, history[-1]))
            if outputs:
                y[position, :, :, some] = _read(history[-1], part.C, position)
        grad = leaving[:, :, some]
        rate = torch.zeros_like(grad)
        for position in reversed(range(chunk)):
            state, former = history.pop(), history[-1]
            here = part_grad_y[position]
            grad = torch.addcmul(grad, here.unsqueeze(-1), _at(part.C, position))
            grad_x[position, :, :, some] = _read(grad, part.B, position)
            _accumulate(grad_B, position, some, _spread(part.x[position], grad, part.B))
            _accumulate(grad_C, position, some, _spread(here, state, part.C))
            grad = grad * part.decay(position)
            through = grad * former
            grad_delta[position, :, :, some] = (through * part.A).sum(-1)
            rate.addcmul_(through, part.delta[position].unsqueeze(-1))
        grad_A += rate.sum((0, 2)).unsqueeze(1)
    return grad_delta, grad_x, grad_A, grad_B, grad_C, y


def _accumulate(total: Tensor, position: int, chunks: slice, grad: Tensor) -> None:
    """Store the gradient of B or C at a position, or add it where they are constant."""
    if total.dim() == grad.dim():
        total[:, :, chunks] += grad
    else:
        total[position, :, :, chunks] = grad


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and gap in their dtypes, empty for what is None."""
    dtype = compute_dtype(*SCHEMA.input_tensors(a))
    layout, scan, steps = _prepare(a, dtype)
    grad_y = gradients.grad_out.to(dtype)
    if a.z is not None:
        gate, opening = a.z.to(dtype), a.z.to(dtype).sigmoid()
        grad_gated, grad_y = grad_y, grad_y * gate * opening
    grad_last = gradients.grad_state
    if grad_last is not None:
        grad_last = grad_last.to(dtype).unflatten(1, (layout.groups, -1))
    grad_rate, grad_x, grad_A, grad_B, grad_C, y = _gradients(scan, layout.cut(grad_y), grad_last, a.z is not None)
    grad_rate, grad_x = layout.join(grad_rate), layout.join(grad_x)
    grad_delta = grad_rate + grad_x * a.u
    grad_u = grad_x * layout.join(steps)
    nothing = grad_y.new_empty(0)
    grad_D = grad_z = grad_bias = nothing
    if a.D is not None:
        grad_u = grad_u + grad_y * a.D.to(dtype).unsqueeze(-1)
        grad_D = (grad_y * a.u).sum((0, 2)).to(a.D.dtype)
    if a.z is not None:
        y = layout.join(y)
        if a.D is not None:
            y = y + a.D.to(dtype).unsqueeze(-1) * a.u
        grad_z = (grad_gated * y * opening * (1 + gate * (1 - opening))).to(a.z.dtype).contiguous()
    if a.delta_softplus:
        # softplus(x) is x above 20, so its derivative is 1 there.
        raw = _activate(a.delta.to(dtype), a.delta_bias, delta_softplus=False)
        grad_delta = grad_delta * torch.where(raw > 20, torch.ones_like(raw), raw.sigmoid())
    if a.delta_bias is not None:
        grad_bias = grad_delta.sum((0, 2)).to(a.delta_bias.dtype)
    return (
        grad_u.to(a.u.dtype).contiguous(),
        grad_delta.to(a.delta.dtype).contiguous(),
        grad_A.view(a.A.shape).to(a.A.dtype),
        layout.join_projection(grad_B, a.B).to(a.B.dtype).contiguous(),
        layout.join_projection(grad_C, a.C).to(a.C.dtype).contiguous(),
        grad_D,
        grad_z,
        grad_bias,
        nothing if a.gap is None else grad_rate.to(a.gap.dtype).contiguous(),
    )
