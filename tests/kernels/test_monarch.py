"""Monarch matrices against dense ones, and the long convolution against its sum."""

import math

import pytest
import torch
from tolerance import assert_close, assert_gradients_close, gradients
from torch.utils.flop_counter import FlopCounterMode

import visionmix
from visionmix.kernels.long_convolution import long_convolution
from visionmix.kernels.monarch import monarch


def drawn(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense(first, second=None):
    """The matrix, entry by entry: a row for each entry of the output."""
    blocks, rows, _ = first.shape
    matrix = torch.block_diag(*first)
    if second is None:
        return matrix
    outer, wide, _ = second.shape
    turned = [matrix[number] for start in range(outer) for number in range(start, blocks * rows, outer)]
    product = torch.block_diag(*second) @ torch.stack(turned)
    return torch.stack([product[block * wide + row] for row in range(wide) for block in range(outer)])


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize(
    "shapes", [[(2, 3, 12), (4, 5, 3)], [(12,), (1, 2, 12)], [(5, 12), (4, 6, 3), (3, 2, 8)], [(0, 9), (3, 3, 3)]]
)
def test_monarch_is_a_matrix(shapes, implementation):
    inputs = drawn(*shapes)
    with visionmix.kernels.use(implementation):
        out = monarch(*inputs)
        assert_close(out, inputs[0] @ dense(*inputs[1:]).T)
        assert_gradients_close(gradients(out, inputs), gradients(inputs[0] @ dense(*inputs[1:]).T, inputs))


def test_the_fourier_transform_is_a_monarch_matrix():
    """That of 6 numbers, as one of real matrices: cosines and sines of two axes with the twist between in a block."""
    rows, columns = 2, 3
    n = rows * columns
    x = torch.randn(n, dtype=torch.float64)
    index = torch.arange(n).reshape(rows, columns)

    # Over the rows of each column first, twisted; then over the columns.
    inner = torch.exp(-2j * math.pi * torch.outer(torch.arange(rows), torch.arange(rows)) / rows)
    twist = torch.exp(-2j * math.pi * torch.outer(torch.arange(columns), torch.arange(rows)) / n)
    outer = torch.exp(-2j * math.pi * torch.outer(torch.arange(columns), torch.arange(columns)) / columns)
    first = (twist.unsqueeze(2) * inner).to(torch.complex128)
    second = outer.to(torch.complex128).expand(rows, columns, columns)
    parts = {}
    for a, left in (("re", first.real), ("im", first.imag)):
        for b, right in (("re", second.real), ("im", second.imag)):
            parts[a, b] = monarch(x[index.T.reshape(-1)], left.contiguous(), right.contiguous())
    spectrum = torch.complex(parts["re", "re"] - parts["im", "im"], parts["re", "im"] + parts["im", "re"])
    assert torch.allclose(spectrum, torch.fft.fft(x), atol=1e-12)


def summed(x, kernel, reverse=None):
    out = []
    for i in range(x.shape[1]):
        total = sum(kernel[i - j] * x[:, j] for j in range(i + 1))
        if reverse is not None:
            total = total + sum(reverse[j - i - 1] * x[:, j] for j in range(i + 1, x.shape[1]))
        out.append(total)
    return torch.stack(out, 1)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_long_convolution_is_its_sum(length, both, implementation):
    inputs = drawn((2, length, 3), (length, 3), *[(length, 3)] * both)
    with visionmix.kernels.use(implementation):
        out = long_convolution(*inputs)
        expected = summed(*inputs)
        assert_close(out, expected)
        ours, theirs = gradients(out, inputs[:2]), gradients(expected, inputs[:2])
        assert_gradients_close(ours, theirs)
        if length > 1:  # no token comes after the only one
            assert_gradients_close(gradients(long_convolution(*inputs), inputs), gradients(summed(*inputs), inputs))


@pytest.mark.parametrize("both", [False, True])
def test_exported_long_convolution_serves_every_length(both):
    class Model(torch.nn.Module):
        def forward(self, x, *kernels):
            return long_convolution(x, *kernels)

    inputs = [each.detach() for each in drawn((2, 6, 3), (6, 3), *[(6, 3)] * both)]
    length = torch.export.Dim("length", min=2, max=99)
    shapes = ({1: length}, tuple({0: length} for _ in inputs[1:]))
    with visionmix.kernels.use("reference"):
        program = torch.export.export(Model(), tuple(inputs), dynamic_shapes=shapes)
    inputs = [each.detach() for each in drawn((2, 11, 3), (11, 3), *[(11, 3)] * both)]
    assert_close(program.module()(*inputs), summed(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, first, second = (each.detach() for each in drawn((7, 12), (4, 6, 3), (3, 2, 8), dtype=dtype))
    out = monarch(x, first, second)
    assert out.dtype == dtype
    assert_close(out, x.double() @ dense(first.double(), second.double()).T)
    x, kernel = (each.detach() for each in drawn((2, 9, 3), (9, 3), dtype=dtype))
    with torch.autocast("cpu", dtype):
        out = long_convolution(x, kernel)
    assert out.dtype == torch.float32
    assert_close(out, summed(x.double(), kernel.double()))


def test_strides_of_the_inputs_do_not_matter():
    x, first = (each.detach() for each in drawn((5, 12), (4, 6, 3)))
    expected = monarch(x, first)
    assert torch.equal(monarch(x.t().contiguous().t(), first.permute(2, 0, 1).contiguous().permute(1, 2, 0)), expected)
    x, kernel = (each.detach() for each in drawn((2, 9, 3), (9, 3)))
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(long_convolution(strided, kernel.t().contiguous().t()), long_convolution(x, kernel))


def test_operations_are_counted():
    x, first, second = (each.detach() for each in drawn((7, 12), (4, 6, 3), (3, 2, 8)))
    with FlopCounterMode(display=False) as counter:
        monarch(x, first, second)
    assert counter.get_total_flops() == 2 * 7 * (4 * 6 * 3 + 3 * 2 * 8)
    with FlopCounterMode(display=False) as counter:
        long_convolution(torch.ones(2, 8, 3), torch.ones(8, 3))
    assert counter.get_total_flops() == 3 * (5 * 5 * 8 * 4 + 6 * 2 * 9)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); first, of shape \(4, 6, 3\), multiplies 12 channels"):
        monarch(torch.ones(2, 5), torch.ones(4, 6, 3))
    with pytest.raises(ValueError, match="must divide the 24 entries"):
        monarch(torch.ones(2, 12), torch.ones(4, 6, 3), torch.ones(5, 2, 4))
    with pytest.raises(ValueError, match=r"second has shape \(3, 2, 4\)"):
        monarch(torch.ones(2, 12), torch.ones(4, 6, 3), torch.ones(3, 2, 4))
    with pytest.raises(TypeError, match="first is a list"):
        monarch(torch.ones(2, 12), [1.0])
    with pytest.raises(ValueError, match=r"kernel has shape \(4, 3\)"):
        long_convolution(torch.ones(2, 5, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="every axis after the batch"):
        long_convolution(torch.ones(2, 0, 3), torch.ones(0, 3))
