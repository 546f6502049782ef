"""Random small calls of every fused op, and tensors whose axes of length 1 have strides that mean nothing."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmix.kernels.gated_linear_attention import bidirectional_op, gated_linear_attention_op
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.kernels.selective_scan import selective_scan_op
from visionmix.kernels.selective_scan_2d import selective_scan_2d_op

# Half of all axes have length 1; widths beyond a vector's lanes come too.
_SIZES = (1, 1, 1, 1, 2, 3, 5, 17)


@dataclass(frozen=True)
class Call:
    """An op's arguments: the tensors by name, None for an option left out, and `run`, a function of their values."""

    tensors: dict[str, Tensor | None]
    run: Callable[..., tuple[Tensor, ...]]

    def outputs_and_gradients(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Run forward and backward; `change` makes each input, and each gradient of an output, from a dense one."""
        inputs = {name: change(x).requires_grad_() for name, x in self.tensors.items() if x is not None}
        outs = [out for out in self.run(*(inputs.get(name) for name in self.tensors)) if out.numel()]
        generator = torch.Generator().manual_seed(0)
        weights = [change(torch.randn(out.shape, generator=generator).to(out)) for out in outs]
        options = {"allow_unused": True, "materialize_grads": True}  # padding that a large map needs not
        grads = torch.autograd.grad(outs, list(inputs.values()), weights, **options)
        named = {f"output {number}": out.detach() for number, out in enumerate(outs)}
        return named | {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def _size(rng: random.Random) -> int:
    return rng.choice(_SIZES)


def _normal(rng: random.Random) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return lambda *shape: torch.randn(shape, generator=generator)


def gated_linear_attention(rng: random.Random) -> Call:
    batch, length, heads, dk, dv = (_size(rng) for _ in range(5))
    normal, final = _normal(rng), rng.random() < 0.5
    tokens = (batch, length, heads)
    tensors = {
        "q": normal(*tokens, dk),
        "k": normal(*tokens, dk),
        "v": normal(*tokens, dv),
        "g": -normal(*tokens, dk).abs(),
        "initial_state": normal(batch, heads, dk, dv) if rng.random() < 0.5 else None,
    }
    return Call(tensors, lambda q, k, v, g, state: gated_linear_attention_op(q, k, v, g, 0.5, state, final))


def bidirectional_gated_linear_attention(rng: random.Random) -> Call:
    batch, length, heads, dk, dv = (_size(rng) for _ in range(5))
    normal, merge = _normal(rng), rng.choice(("mean", "sum"))
    shapes = {"q": dk, "k": dk, "v": dv, "g_forward": dk, "g_backward": dk}
    tensors = {name: normal(batch, length, heads, dim) for name, dim in shapes.items()}
    for name in ("g_forward", "g_backward"):
        tensors[name] = -tensors[name].abs()
    return Call(tensors, lambda *tensors: (bidirectional_op(*tensors, 0.5, merge),))


def selective_scan(rng: random.Random) -> Call:
    batch, width, length, states = (_size(rng) for _ in range(4))
    groups = rng.choice((1, 1, 2))
    dim = groups * width
    normal, softplus, last = _normal(rng), rng.random() < 0.5, rng.random() < 0.5

    def projection() -> Tensor:
        return normal(dim, states) if rng.random() < 0.3 else normal(batch, groups, states, length)

    def option(*shape: int) -> Tensor | None:
        return normal(*shape).abs() if rng.random() < 0.5 else None

    tensors = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length).abs(),
        "A": -normal(dim, states).abs(),
        "B": projection(),
        "C": projection(),
        "D": option(dim),
        "z": option(batch, dim, length),
        "delta_bias": option(dim),
        "gap": option(batch, dim, length),
    }
    return Call(tensors, lambda *tensors: selective_scan_op(*tensors[:8], softplus, last, tensors[8]))


_ORDERS = ("raster", "raster_transposed", "hilbert", "window_2", "skip_2_0_1", "raster_reversed+snake")


def selective_scan_2d(rng: random.Random) -> Call:
    batch, height, width, channels, states = (_size(rng) for _ in range(5))
    orders = rng.choices(_ORDERS, k=rng.choice((1, 1, 2, 3)))
    count, rank = len(orders), rng.choice((0, 1, 1, 3))
    merge, softplus = rng.choice(("sum", "mean", "none")), rng.random() < 0.5
    whole = [name for name in orders if name in _ORDERS[:3]]
    permute = "input" if len(whole) == count and rng.random() < 0.3 else "all"
    normal, grid = _normal(rng), (batch, height, width)
    tensors = {
        "x": normal(*grid, channels),
        "delta": normal(*grid, count, rank or channels).abs(),
        "delta_weight": normal(count, channels, rank).abs() if rank else None,
        "A": -normal(count, channels, states).abs(),
        "B": normal(*grid, count, states),
        "C": normal(*grid, count, states),
        "D": normal(count, channels) if rng.random() < 0.5 else None,
        "delta_bias": normal(count, channels).abs() if rng.random() < 0.5 else None,
    }
    names = ",".join(orders)
    return Call(tensors, lambda *tensors: (selective_scan_2d_op(*tensors, softplus, names, merge, permute),))


def neighborhood_attention(rng: random.Random) -> Call:
    grid = [_size(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    batch, key_heads, dk, dv, extra = (rng.choice((1, 1, 2, 3)) for _ in range(5))
    heads, axes = key_heads * rng.choice((1, 1, 2)), len(grid)
    circular = rng.random() < 0.3
    kernel_size = [rng.choice((1, 3)) if circular else rng.choice((1, 2, 3)) for _ in grid]
    dilation = [rng.choice((1, 1, 2)) for _ in grid]
    causal = [int(rng.random() < 0.2) for _ in grid]
    normal, extended = _normal(rng), rng.random() < 0.5
    spans = [2 * k - 1 for k in kernel_size]
    tensors = {
        "query": normal(batch, *grid, heads, dk),
        "key": normal(batch, *grid, key_heads, dk),
        "value": normal(batch, *grid, key_heads, dv),
        "additional_keys": normal(batch, extra, key_heads, dk) if extra > 1 else None,
        "additional_values": normal(batch, extra, key_heads, dv) if extra > 1 else None,
        "relative_position_bias": normal(heads, *spans) if rng.random() < 0.5 else None,
        "key_padding": normal(key_heads, dk) if extended else None,
        "value_padding": normal(key_heads, dv) if extended else None,
    }

    def run(query, key, value, more_keys, more_values, bias, *paddings):
        window = (kernel_size, [1] * axes, dilation, causal, 0.5)
        return neighborhood_attention_op(query, key, value, *window, more_keys, more_values, bias, circular, *paddings)

    return Call(tensors, run)


OPS = {
    function.__name__: function
    for function in (
        gated_linear_attention,
        bidirectional_gated_linear_attention,
        selective_scan,
        selective_scan_2d,
        neighborhood_attention,
    )
}


def dense(x: Tensor) -> Tensor:
    """Return the values in memory of their own, in order; an axis of length 1 has the stride that follows from it."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


def stray(rng: random.Random) -> Callable[[Tensor], Tensor]:
    """Return a function that gives a tensor's values strides at random, in memory full of NaN.

    An axis of length 1 gets any stride, 0 among them; the others lie in the order of a random permutation, with room
    between them or without, and sometimes a tensor of one value for an axis is expanded along it.
    """

    def change(x: Tensor) -> Tensor:
        order = list(range(x.dim()))
        if rng.random() < 0.3:
            rng.shuffle(order)
        strides, room = [0] * x.dim(), 1
        for axis in reversed(order):
            strides[axis] = room
            room *= x.shape[axis] + (rng.random() < 0.2)
        strides = [
            rng.choice((0, 1, 3, room, room + 5)) if n == 1 else s for n, s in zip(x.shape, strides, strict=True)
        ]
        margin = 4096
        buffer = torch.full((room + 2 * margin,), float("nan"), dtype=x.dtype)
        return buffer.as_strided(x.shape, strides, margin).copy_(x)

    return change
