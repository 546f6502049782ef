"""Neighborhood attention in float16 and bfloat16, and in several types at once."""

import pytest
import torch
from neighborhood_runs import COMPILED, EACH_CHOICE, EXPORTED_TOO, cast, choose, make, naive, run
from tolerance import TOLERANCE, assert_close, assert_gradients_close

from visionmix.kernels import na2d

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@EACH_CHOICE
@HALVES
@pytest.mark.parametrize(
    ("grid", "window", "sizes"),
    [
        ((9, 18), {"kernel_size": (3, 5)}, {"extra": 2, "bias": True, "dim": 8, "value_dim": 8}),
        ((9, 35), {"kernel_size": (3, 5)}, {"bias": True, "dim": 8, "value_dim": 5}),
        ((7, 20), {"kernel_size": (4, 2), "dilation": (1, 3)}, {"bias": True, "dim": 20, "value_dim": 17}),
        ((5, 19), {"kernel_size": (5, 1), "is_causal": True}, {"dim": 7, "value_dim": 9}),
        ((140,), {"kernel_size": 131}, {"dim": 6, "value_dim": 3}),
    ],
)
def test_half_precision(grid, window, sizes, dtype, choice):
    tensors = make(grid, window["kernel_size"], **sizes)
    tensors = {name: (x.detach() / 2).to(dtype).double().requires_grad_() for name, x in tensors.items()}
    check_half(tensors, window, choice, dtype)


@COMPILED
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("extra", [0, 3])
def test_half_types_give_what_float32_copies_of_them_give_on_cpu(dtypes, extra):
    """Read and written where they lie, rounded once; query and key are slices of a projection."""
    window = {"kernel_size": (3, 5)}
    tensors = cast(make((5, 37), (3, 5), extra=extra, dim=9, value_dim=6), torch.float32)
    for name, dtype in zip(("query", "key", "value"), dtypes, strict=True):
        wide = torch.randn(2, 5, 37, 3, 2, 9 if name != "value" else 6).to(dtype)
        tensors[name] = wide.unbind(3)[1].detach().requires_grad_()
    copies = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    with choose("cpu"):
        (out, lse), grads = run(tensors, window)
        (expected, expected_lse), expected_grads = run(copies, window)
    assert torch.equal(out, expected.to(out.dtype))
    assert torch.equal(lse, expected_lse)
    for grad, right, x in zip(grads, expected_grads, tensors.values(), strict=True):
        assert grad.dtype == x.dtype
        # They are made of the rounded output.
        assert_close(grad, right, factor=max(1.0, TOLERANCE[out.dtype] / TOLERANCE[grad.dtype]))


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_beyond_an_odd_number_of_neighbours_may_be_infinite_on_cpu(dtype):
    """Products of pairs leave it out; columns 16 to 31 fill whole vectors, far from the border."""
    q, k, v = torch.randn(3, 1, 1, 48, 2, 16).to(dtype).unbind(0)
    v[:, :, 20] = torch.inf
    with choose("cpu"):
        out = na2d(q, k, v, kernel_size=(1, 3))
    finite = out[0, 0, 16:32].isfinite().all(dim=(1, 2))
    assert (~finite).nonzero().flatten().tolist() == [3, 4, 5]


def check_half(tensors, window, choice, dtype):
    (expected, expected_lse), expected_grads = naive(tensors, **window)
    with choose(choice):
        (out, lse), grads = run(cast(tensors, dtype), window)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert all(grad.dtype == dtype for grad in grads)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert_gradients_close(grads, expected_grads)


@EXPORTED_TOO
def test_output_takes_the_dtype_of_value(choice):
    tensors = cast(make((9, 9), (3, 3)), torch.float32) | {"value": torch.randn(2, 9, 9, 2, 5).bfloat16()}
    with choose(choice):
        out, lse = na2d(**tensors, kernel_size=3, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
