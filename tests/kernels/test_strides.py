"""The stride of an axis of length 1 means nothing: every op gives the same for any, and reads nobody else's memory."""

import random

import pytest
import torch
from choices import EACH_CHOICE, choose
from random_calls import OPS, dense, stray
from tolerance import assert_close

from visionmix.kernels import selective_scan_2d

EACH_OP = pytest.mark.parametrize("op", OPS)


def check(op: str, seed: int) -> None:
    rng = random.Random(f"{op} {seed}")
    call = OPS[op](rng)
    expected, actual = call.outputs_and_gradients(dense), call.outputs_and_gradients(stray(rng))
    for name, ours in actual.items():
        # Sums over other strides have another order.
        assert_close(ours, expected[name], f"{op}, seed {seed}: {name}", factor=3)


@EACH_CHOICE
@EACH_OP
def test_random_strides_of_axes_of_length_1(op, choice):
    with choose(choice):
        for seed in range(20):
            check(op, seed)


@pytest.mark.long
@EACH_OP
def test_random_strides_of_axes_of_length_1_sweep(op):
    for seed in range(6000):
        check(op, seed)


@EACH_OP
def test_expanded_gradient_of_the_output(op):
    """The gradient of a sum has stride 0 along every axis."""
    for seed in range(20):
        rng = random.Random(f"{op} {seed}")
        call = OPS[op](rng)
        inputs = [x.requires_grad_() for x in call.tensors.values() if x is not None]
        results = []
        for change in (torch.Tensor.contiguous, lambda x: x):
            outs = [out for out in call.run(*call.tensors.values()) if out.numel()]
            grads = [change(torch.ones(()).expand(out.shape)) for out in outs]
            results.append(torch.autograd.grad(outs, inputs, grads))
        for dense_grad, expanded_grad in zip(*results, strict=True):
            assert_close(expanded_grad, dense_grad, f"{op}, seed {seed}", factor=3)


@pytest.mark.parametrize(
    ("name", "shape", "strides"),
    [("C", (1, 6, 1, 3, 5), (5, 15, 1, 5, 1)), ("delta", (1, 17, 1, 1, 37), (37, 37, 629, 629, 1))],
)
def test_maps_of_one_column(name, shape, strides):
    """Maps of one column whose width has a stray stride, as transposed tensors have after `contiguous()`."""
    torch.manual_seed(0)
    batch, height, width, count, features = shape
    channels, states = (37, 2) if name == "delta" else (4, features)
    tensors = {
        "x": torch.randn(batch, height, width, channels),
        "delta": torch.rand(batch, height, width, count, channels),
        "A": -torch.rand(count, channels, states),
        "B": torch.randn(batch, height, width, count, states),
        "C": torch.randn(batch, height, width, count, states),
    }
    orders = ("raster", "raster_reversed", "snake")[:count]
    expected = selective_scan_2d(**tensors, orders=orders)
    tensors[name] = torch.empty_strided(shape, strides).copy_(tensors[name])
    assert tensors[name].is_contiguous()
    assert torch.equal(selective_scan_2d(**tensors, orders=orders), expected)


def test_empty_batch_of_any_strides():
    """A tensor without values counts as contiguous, whatever its strides."""
    maps = torch.empty(0, 3, 5, 4, 2).permute(0, 4, 3, 2, 1)
    projection = maps[..., :2]
    out = selective_scan_2d(maps[..., 0, :], maps, -torch.rand(5, 3, 2), projection, projection, orders=("raster",) * 5)
    assert out.shape == (0, 2, 4, 3)
