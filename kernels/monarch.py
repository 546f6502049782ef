"""Monarch matrices: products with block-diagonal matrices and a permutation between them.

An op of the cheap kind, in PyTorch. `monarch` checks what it is given; layers call `monarch_op`, which checks nothing:
it scripts, traces and exports.
"""

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_shape, check_tensors
from visionmix.kernels.registration import register_reference_op


def monarch(x: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
    """Multiply the last axis of x by a Monarch matrix of order 2, or by one block-diagonal matrix.

    With B_1 and B_2 block-diagonal and the permutations P that read a table of rows by columns:

        y = B_1 x                                  (without `second`)
        y = P' B_2 P B_1 x

    P reads the entries of B_1 x as a table of `outer` columns, column by column, so that a block of B_2 sees entries
    from all over B_1 x; P' does the same to the output, a table of `outer` rows. The discrete Fourier transform of
    numbers in a fixed order is one such matrix. Dao et al., 2022, Monarch (arXiv 2204.00595); Fu et al., 2023, Monarch
    Mixer (arXiv 2310.12109).

    Args:
        x: vectors (..., blocks * columns), of any floating-point dtype.
        first: blocks of B_1 (blocks, rows, columns).
        second: blocks of B_2 (outer, rows of B_2, blocks * rows / outer); None for none.

    Returns:
        The products (..., outer * rows of B_2), or (..., blocks * rows), in the dtype of x, which the blocks are
        converted to.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    ranks = {"x": tuple(range(1, 9)), "first": (3,), "second": (3,)}
    check_tensors({"x": x, "first": first, "second": second}, ranks, ("x", "first"))
    blocks, rows, columns = first.shape
    if x.shape[-1] != blocks * columns:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; first, of shape {tuple(first.shape)}, multiplies {blocks * columns} "
            "channels"
        )
    if second is not None:
        outer = second.shape[0]
        if outer == 0 or blocks * rows % outer:
            raise ValueError(
                f"second has shape {tuple(second.shape)}; its blocks must divide the {blocks * rows} entries that "
                "first makes"
            )
        check_shape("second", second, {"outer": outer, "rows": second.shape[1], "columns": blocks * rows // outer})
    return monarch_op(x, first, second)


def monarch_op(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """Return what `monarch` does, without its checks."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference, (x, first, second))
    return torch.ops.visionmix.monarch(x, first, second)


def _reference(arguments: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    return _forward(*arguments)


def _forward(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    y = _times_blocks(x, first)
    if second is None:
        return y
    outer = second.shape[0]
    y = _times_blocks(y.unflatten(-1, (-1, outer)).transpose(-1, -2).flatten(-2), second)
    return y.unflatten(-1, (outer, -1)).transpose(-1, -2).flatten(-2)


def _times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return the product of each part of the last axis of x with its block, side by side, as a new tensor."""
    count, rows, columns = blocks.shape
    parts = x.reshape(-1, count, columns).transpose(0, 1)
    out = torch.bmm(parts, blocks.to(x.dtype).transpose(1, 2))
    return out.transpose(0, 1).reshape([*x.shape[:-1], count * rows])


def _fake(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    last = first if second is None else second
    return x.new_empty([*x.shape[:-1], last.shape[0] * last.shape[1]])


def _flops(x, first, second) -> int:
    vectors = 1
    for size in x[:-1]:
        vectors *= size
    return sum(2 * vectors * blocks[0] * blocks[1] * blocks[2] for blocks in (first, second) if blocks is not None)


register_reference_op("monarch", "(Tensor x, Tensor first, Tensor? second=None) -> Tensor", _forward, _flops, _fake)
