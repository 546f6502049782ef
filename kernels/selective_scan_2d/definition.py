"""The selective scan over several orders of a map as its definition is written: one scan per order, cell by cell."""

import torch
from torch import Tensor

from visionmix import scans
from visionmix.kernels.selective_scan.definition import selective_scan


def selective_scan_2d(x, delta, A, B, C, D, delta_bias, delta_softplus, orders, merge, permute="all") -> Tensor:
    """One `selective_scan` an order, on the cells it reads, written back cell by cell; delta, B and C in raster order
    for `permute="input"`."""
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
