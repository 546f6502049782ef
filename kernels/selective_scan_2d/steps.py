"""What the PyTorch reference reads at each step and where it writes: by the orders' names, or by tensors of cells.

Both kinds have the same functions. Sequences are (batch, K, steps, features), maps of x (batch, cells, features), maps
of delta, B and C (batch, height, width, K, features), outputs (batch, cells, channels) or, not merged, (batch, cells,
routes, channels). `x_back`, `maps_back` and `write_back` are the gradients of `read_x`, `read_maps` and `write`.
"""

import torch
from torch import Tensor

from visionmix.kernels.exported import numbers
from visionmix.kernels.selective_scan_2d.routes import routes, take, take_sum
from visionmix.kernels.selective_scan_2d.schema import Arguments


class NamedSteps:
    """The steps of named orders, the same in every image."""

    def __init__(self, a: Arguments):
        self.table = routes(a.orders, *numbers(a.x.shape[1], a.x.shape[2]), a.permute)
        self.merged = a.merge != "none"
        self.routes = len(self.table.inverse)

    def read_x(self, x: Tensor) -> Tensor:
        return take(x, self.table.index).unflatten(1, self.table.index.shape)

    def x_back(self, grad: Tensor) -> Tensor:
        return take_sum(grad.flatten(1, 2), self.table.index_back)

    def read_maps(self, maps: Tensor) -> Tensor:
        return take(maps.flatten(1, 3), self.table.of_maps).unflatten(1, self.table.index.shape)

    def maps_back(self, grad: Tensor, like: Tensor) -> Tensor:
        return take_sum(grad.flatten(1, 2), self.table.of_maps_back).view(like.shape)

    def write(self, sequences: Tensor) -> Tensor:
        sequences, inverse = sequences.flatten(1, 2), self.table.inverse
        if self.merged:
            return take_sum(sequences, inverse)
        return take(sequences, inverse).unflatten(1, inverse.shape).transpose(1, 2)

    def write_back(self, grad: Tensor) -> Tensor:
        grad = grad.repeat(1, self.routes, 1) if self.merged else grad.transpose(1, 2).flatten(1, 2)
        return take_sum(grad, self.table.inverse_back).unflatten(1, self.table.index.shape)


class GivenSteps:
    """Steps that read the cells of a tensor (batch, K, steps), each image its own."""

    def __init__(self, a: Arguments):
        self.index = a.cells.long()
        self.size = a.x.shape[1] * a.x.shape[2]
        self.merged = a.merge != "none"
        self.routes, steps = a.cells.shape[1:]
        raster = torch.arange(steps, device=a.x.device).expand(a.cells.shape)
        self.place = self.index if a.permute == "all" else raster

    def read_x(self, x: Tensor) -> Tensor:
        return _gather(x.unsqueeze(1).expand(-1, self.routes, -1, -1), self.index)

    def x_back(self, grad: Tensor) -> Tensor:
        return _scatter(grad, self.index, self.size).sum(1)

    def read_maps(self, maps: Tensor) -> Tensor:
        return _gather(maps.flatten(1, 2).transpose(1, 2), self.place)

    def maps_back(self, grad: Tensor, like: Tensor) -> Tensor:
        return _scatter(grad, self.place, self.size).transpose(1, 2).reshape(like.shape)

    def write(self, sequences: Tensor) -> Tensor:
        maps = _scatter(sequences, self.index, self.size)
        return maps.sum(1) if self.merged else maps.transpose(1, 2)

    def write_back(self, grad: Tensor) -> Tensor:
        return self.read_x(grad) if self.merged else _gather(grad.transpose(1, 2), self.index)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the cells of (batch, K, cells, features) at (batch, K, steps), zeros where the index is -1."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    index = torch.where(index < 0, x.shape[2], index).unsqueeze(3)
    return padded.gather(2, index.expand(-1, -1, -1, x.shape[3]))


def _scatter(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the gradient of `_gather`: (batch, K, size, features) of (batch, K, steps, features)."""
    index = torch.where(index < 0, size, index).unsqueeze(3).expand_as(x)
    sums = x.new_zeros((x.shape[0], x.shape[1], size + 1, x.shape[3]))
    return sums.scatter_add(2, index, x)[:, :, :-1]
