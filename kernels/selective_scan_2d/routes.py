"""The index tables of a set of scan orders: which cells each step reads and which step each cell takes back."""

from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce

import numpy as np
import torch
from torch import Tensor

from visionmix import scans
from visionmix.kernels.selective_scan_2d.schema import Arguments
from visionmix.private_api import outside_of_tracing
from visionmix.scans.order_names import split_orders


def count_steps(orders: str, height: int, width: int) -> int:
    """Return the steps of the longest order on a grid, whose sizes may be symbolic."""
    return reduce(torch.sym_max, (scans.num_steps(name, height, width) for name in split_orders(orders)))


def steps_of(a: Arguments) -> int:
    """Return the steps of the longest order of a call, as `count_steps` or as given."""
    return count_steps(a.orders, *a.x.shape[1:3]) if a.cells is None else a.cells.shape[2]


@dataclass
class Routes:
    """K orders of a grid, padded at the end to as many steps as the longest has.

    Attributes:
        index: int64 (K, steps), the cell of x read at each step, -1 for a padded step.
        place: int64 (K, steps), the cell of delta, B and C read at each step, -1 for a padded step.
        inverse: int64 (routes, cells), the step at which a cell is read, counted over all orders, order x steps + step;
            -1 for a cell that is not read. An order has one route; n orders joined by "+" have n.
    """

    index: np.ndarray
    place: np.ndarray
    inverse: np.ndarray

    @cached_property
    def of_maps(self) -> np.ndarray:
        """(K x steps,): positions in maps of (cells x K), one map per order, -1 for a padded step."""
        orders = np.arange(len(self.place))[:, None]
        return np.where(self.place < 0, -1, self.place * len(self.place) + orders).reshape(-1)

    @cached_property
    def index_back(self) -> np.ndarray:
        """(reads, cells): the steps that read each cell, counted over all orders."""
        return _readers(self.index.reshape(-1), self.inverse.shape[1])

    @cached_property
    def of_maps_back(self) -> np.ndarray:
        """(reads, cells x K): the steps that read each position of the maps."""
        return _readers(self.of_maps, self.inverse.shape[1] * len(self.index))

    @cached_property
    def inverse_back(self) -> np.ndarray:
        """(reads, K x steps): the positions of (routes x cells) that take back each step."""
        return _readers(self.inverse.reshape(-1), self.index.size)


def _readers(index: np.ndarray, size: int) -> np.ndarray:
    """Return, for each of `size` places, the positions of `index` that name it: (most, size), filled up with -1."""
    places = np.argsort(index, kind="stable")
    places = places[index[places] >= 0]
    named = index[places]
    counts = np.bincount(named, minlength=size)
    rank = np.arange(len(named)) - (np.cumsum(counts) - counts)[named]
    readers = np.full((max(1, counts.max(initial=0)), size), -1)
    readers[rank, named] = places
    return readers


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def routes(orders: str, height: int, width: int, permute: str) -> Routes:
    """Return the tables of the orders, names joined by commas, on a grid.

    For `permute="input"` place is the raster: step t reads cell t, and a step beyond the last cell is padded.

    They are NumPy arrays: while a graph is being traced they are computed all the same, and enter it as constants.

    Raises:
        ValueError: an order's name is unknown.
    """
    with outside_of_tracing(), torch.inference_mode(False):
        found = [scans.order(name, height, width) for name in split_orders(orders)]
        indices, inverses = [order.index.numpy() for order in found], [order.inverse.numpy() for order in found]
    steps = max(len(index) for index in indices)
    index = np.stack([np.pad(index, (0, steps - len(index)), constant_values=-1) for index in indices])
    inverse = np.concatenate(
        [
            np.where(inverse < 0, -1, inverse + steps * number).reshape(-1, height * width)
            for number, inverse in enumerate(inverses)
        ]
    )
    raster = np.where(np.arange(steps) < height * width, np.arange(steps), -1)
    place = index if permute == "all" else np.broadcast_to(raster, index.shape)
    return Routes(index, place, inverse)


def take(x: Tensor, index: np.ndarray) -> Tensor:
    """Return `x[:, index]`, zero where the index is -1: (batch, n, features) to (batch, index.size, features)."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    flat = torch.tensor(np.where(index < 0, x.shape[1], index).reshape(-1), device=x.device)
    return padded.index_select(1, flat)


def take_sum(x: Tensor, index: np.ndarray) -> Tensor:
    """Return the sum of `take` over the first axis of `index`."""
    return take(x, index).unflatten(1, index.shape).sum(1)
