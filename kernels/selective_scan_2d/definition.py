"""The selective scan over several orders of a map as its definition is written: one scan per order, cell by cell."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionmix import scans
from visionmix.kernels.selective_scan.definition import selective_scan


def selective_scan_2d(
    x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, orders=(), merge="sum", permute="all",
    cells=None, gaps=None,
) -> Tensor:  # fmt: skip
    """One `selective_scan` an order, on the cells it reads, written back cell by cell; delta, B and C in raster order
    for `permute="input"`. With `cells`, image by image."""
    if cells is not None:
        images = [
            _with_cells(x, delta, A, B, C, D, delta_bias, delta_softplus, merge, permute, cells, gaps, number)
            for number in range(len(x))
        ]
        return torch.cat(images)
    if isinstance(delta, tuple):
        delta = torch.einsum("bhwkr,kcr->bhwkc", *delta)
    batch, height, width, channels = x.shape
    routes = []
    for number, name in enumerate(orders):
        index, inverse = scans.order(name, height, width)

        place = index if permute == "all" else range(height * width)

        def read(maps: Tensor, cells) -> Tensor:
            flat = maps.flatten(1, 2)
            steps = [flat[:, cell] if cell >= 0 else torch.zeros_like(flat[:, 0]) for cell in map(int, cells)]
            return torch.stack(steps, -1)

        y, _ = selective_scan(
            read(x, index),
            read(delta[..., number, :], place),
            A[number],
            read(B[..., number, :], place),
            read(C[..., number, :], place),
            None if D is None else D[number],
            None,
            None if delta_bias is None else delta_bias[number],
            delta_softplus,
        )
        for part in inverse.view(-1, height * width).tolist():
            cells = [y[..., step] if step >= 0 else torch.zeros_like(y[..., 0]) for step in part]
            routes.append(torch.stack(cells, 1).view(batch, height, width, channels))
    if merge == "none":
        return torch.stack(routes, 3)
    return sum(routes) / len(routes) if merge == "mean" else sum(routes)


def _with_cells(x, delta, A, B, C, D, delta_bias, delta_softplus, merge, permute, cells, gaps, image) -> Tensor:
    """The scan of one image over the cells that are given for it, (1, height, width, channels)."""
    if isinstance(delta, tuple):
        delta = torch.einsum("bhwkr,kcr->bhwkc", *delta)
    height, width = x.shape[1:3]
    x, delta, B, C = (maps[image].flatten(0, 1) for maps in (x, delta, B, C))
    outputs = []
    for number, index in enumerate(cells[image].tolist()):
        places = index if permute == "all" else range(len(index))
        bias = x.new_zeros(x.shape[1]) if delta_bias is None else delta_bias[number]
        step = F.softplus(bias) if delta_softplus else bias
        gap = None if gaps is None else (gaps[image, number] * step[:, None])[None]

        def read(maps: Tensor, cells) -> Tensor:
            steps = [maps[cell] if cell >= 0 else torch.zeros_like(maps[0]) for cell in cells]
            return torch.stack(steps, -1)[None]

        maps = (read(x, index), read(delta[:, number], places), A[number])
        maps += (read(B[:, number], places), read(C[:, number], places))
        y, _ = selective_scan(*maps, None if D is None else D[number], None, bias, delta_softplus, gap)
        rows = {cell: y[0, :, step] for step, cell in enumerate(index)}
        outputs.append(torch.stack([rows.get(cell, torch.zeros_like(x[0])) for cell in range(len(x))]))
    out = torch.stack(outputs, 1)
    if merge != "none":
        out = out.mean(1) if merge == "mean" else out.sum(1)
    return out.unflatten(0, (height, width))[None]
