"""Deformable convolution of the fourth version: sums of a map's values at places that are computed for every cell.

An op of the cheap kind, in PyTorch. `dcnv4` checks what it is given; mixers call `dcnv4_op`, which checks nothing: it
scripts, traces and exports.

A tap reads the four cells around its place. So a cell and group of channels is a weighted sum of four rows a tap of one
table, the map, which is a bag of embeddings: none of the rows is copied, and the gradient adds up in a fixed order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_shape, check_sizes, check_tensors
from visionmix.kernels.registration import register_reference_op
from visionmix.scans.cells import numbered


def dcnv4(
    x: Tensor,
    offset_mask: Tensor,
    group: int,
    kernel_size: int = 3,
    stride: int = 1,
    pad: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
) -> Tensor:
    """Deformable convolution without weights but those of its input, in groups of channels.

    Of cell (r, c) and a group, with taps (i, j) that count columns and rows from the kernel's middle in steps of
    `dilation`, offsets (dx, dy) and factors m:

        out(r, c) = sum over taps of m x(stride r + middle + offset_scale (j + dy), stride c + middle
                    + offset_scale (i + dx)),    middle = dilation (kernel_size - 1) // 2 - pad

    x at a place between cells is interpolated bilinearly; it is 0 beyond the border. The factors are taken as they are:
    no softmax makes them sum to 1. Xiong et al., 2024, Efficient Deformable ConvNets (arXiv 2401.06197).

    Args:
        x: map (batch, height, width, channels), of any floating-point dtype, as `offset_mask`.
        offset_mask: (batch, rows, columns, features): for each group in turn, dx and dy of all taps, then their m. Taps
            go down a column of the kernel, then on to the next column. Features beyond ``3 group kernel_size^2`` are
            not read.
        group: groups of channels that share their places.
        kernel_size: rows and columns of the kernel.
        stride: cells from one result to the next.
        pad: cells around the map.
        dilation: cells from one tap to the next.
        offset_scale: factor of all distances from the kernel's middle.

    Returns:
        The output (batch, rows, columns, channels), ``(side + 2 pad - dilation (kernel_size - 1) - 1) // stride + 1``
        a side, in the dtype of x. It is computed in float32, or in float64 if either input is.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes or devices do not fit together, an axis but the batch is empty, or a number is too small.
    """
    check_tensors({"x": x, "offset_mask": offset_mask}, {"x": (4,), "offset_mask": (4,)}, ("x", "offset_mask"))
    check_sizes("x", x)
    sizes = {"group": group, "kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    for name, value, least in (*((name, value, 1) for name, value in sizes.items()), ("pad", pad, 0)):
        if value < least:
            raise ValueError(f"{name}={value} is too small; give {least} or more")
    if x.shape[3] % group:
        raise ValueError(f"group={group} does not divide the {x.shape[3]} channels of x; give a divisor of them")
    needed = 3 * group * kernel_size * kernel_size
    if offset_mask.shape[3] < needed:
        raise ValueError(
            f"offset_mask has shape {tuple(offset_mask.shape)}; group={group} and kernel_size={kernel_size} read "
            f"{needed} features"
        )
    rows, columns = ((side + 2 * pad - dilation * (kernel_size - 1) - 1) // stride + 1 for side in x.shape[1:3])
    if min(rows, columns) < 1:
        raise ValueError(
            f"kernel_size={kernel_size} with dilation={dilation} and pad={pad} does not fit a map of "
            f"{x.shape[1]}x{x.shape[2]}; enlarge pad or the map"
        )
    axes = {"batch": x.shape[0], "rows": rows, "columns": columns, "features": offset_mask.shape[3]}
    check_shape("offset_mask", offset_mask, axes)
    return dcnv4_op(x, offset_mask, group, kernel_size, stride, pad, dilation, offset_scale)


def dcnv4_op(
    x: Tensor,
    offset_mask: Tensor,
    group: int,
    kernel_size: int,
    stride: int,
    pad: int,
    dilation: int,
    offset_scale: float,
) -> Tensor:
    """Return what `dcnv4` does, without its checks."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            sizes = (group, kernel_size, stride, pad, dilation)
            return dispatch.call_reference(_reference, (x, offset_mask, *sizes, offset_scale))
    return torch.ops.visionmix.dcnv4(x, offset_mask, group, kernel_size, stride, pad, dilation, offset_scale)


def _reference(arguments: tuple) -> Tensor:
    """Compute the op tap by tap, with copies of the rows: exported graphs and second derivatives have no bags."""
    x, group = arguments[0], arguments[2]
    cells, weights = _corners(*arguments)
    table = _rows(x, group, weights.dtype)
    out = None
    for cell, weight in zip(cells.split(4, dim=4), weights.split(4, dim=4), strict=True):
        taken = (F.embedding(cell, table) * weight.unsqueeze(5)).sum(4)
        out = taken if out is None else out + taken
    return out.flatten(3).to(x.dtype)


def _forward(x: Tensor, offset_mask: Tensor, group: int, *sizes: float) -> Tensor:
    cells, weights = _corners(x, offset_mask, group, *sizes)
    table = _rows(x, group, weights.dtype)
    out = F.embedding_bag(cells.flatten(0, 3), table, mode="sum", per_sample_weights=weights.flatten(0, 3))
    return out.unflatten(0, cells.shape[:4]).flatten(3).to(x.dtype)


def _rows(x: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return the table (batch * height * width * group, channels / group)."""
    return x.to(dtype).reshape(-1, x.shape[3] // group)


def _corners(x: Tensor, offset_mask: Tensor, group: int, *sizes: float) -> tuple[Tensor, Tensor]:
    """Return the rows of the table that are summed, int32 (batch, rows, columns, group, 4 * taps), and their weights.

    The four cells around a tap's place stand side by side. A cell beyond the border has weight 0, and so has all of a
    tap at least one cell beyond it.
    """
    kernel_size, stride, pad, dilation, offset_scale = sizes
    dtype = dispatch.compute_dtype(x, offset_mask)
    batch, height, width, _ = x.shape
    taps, middle = kernel_size * kernel_size, dilation * (kernel_size - 1) // 2
    given = offset_mask[..., : 3 * taps * group].to(dtype).unflatten(3, (group, 3 * taps))
    offsets, factors = given.split([2 * taps, taps], dim=4)
    across, down = offsets.unflatten(4, (taps, 2)).unbind(5)

    def places(number: Tensor, shape: list[int], tap: Tensor, offset: Tensor, side: int) -> Tensor:
        start = (number * stride + middle - pad).view(shape)
        return (start + (tap * dilation - middle + offset) * offset_scale).clamp(-1, side)

    tap = torch.arange(taps, device=x.device)
    y = places(numbered(offset_mask.shape[1], x), [-1, 1, 1, 1], tap % kernel_size, down, height)
    z = places(numbered(offset_mask.shape[2], x), [-1, 1, 1], tap // kernel_size, across, width)
    inside = (y > -1) & (y < height) & (z > -1) & (z < width)
    top, left = y.floor(), z.floor()
    lower, right = y - top, z - left
    image = (numbered(batch, x) * height).to(torch.int32).view(-1, 1, 1, 1, 1)
    of_group = torch.arange(group, device=x.device, dtype=torch.int32).view(-1, 1)

    def neighbours(first: Tensor, share: Tensor, side: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the two cells around each place along an axis: their number, whether they are there, their share."""
        pairs = ((first, 1 - share), (first + 1, share))
        # Clamped before they are integers: ONNX Runtime finds no such node for integers.
        return [(n.clamp(0, side - 1).to(torch.int32), (n >= 0) & (n < side), part) for n, part in pairs]

    columns = neighbours(left, right, width)
    cells, weights = [], []
    for row, row_there, vertical in neighbours(top, lower, height):
        for column, column_there, horizontal in columns:
            there = inside & row_there & column_there
            weights.append(torch.where(there, factors * vertical * horizontal, 0.0))
            cells.append(((image + row) * width + column) * group + of_group)
    return torch.stack(cells, dim=5).flatten(4), torch.stack(weights, dim=5).flatten(4)


def _fake(x: Tensor, offset_mask: Tensor, *_: float) -> Tensor:
    return x.new_empty(*offset_mask.shape[:3], x.shape[3])


def _flops(x, offset_mask, group, kernel_size, *_) -> int:
    """Four products and sums for each tap and channel."""
    batch, rows, columns, _ = offset_mask
    return 8 * kernel_size**2 * batch * rows * columns * x[3]


_SCHEMA = (
    "(Tensor x, Tensor offset_mask, int group, int kernel_size, int stride, int pad, int dilation, float offset_scale)"
    " -> Tensor"
)
register_reference_op("dcnv4", _SCHEMA, _forward, _flops, _fake)
