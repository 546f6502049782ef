"""Token sequences in scan orders, inside graphs."""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels import dispatch
from visionmix.kernels.exported import is_symbolic
from visionmix.private_api import outside_of_tracing
from visionmix.scans import direction_names, order
from visionmix.scans.cells import numbered
from visionmix.scans.order_names import split_order
from visionmix.scans.orders import symbolic_order


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def _constant_order(name: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    with outside_of_tracing(), torch.inference_mode(False):
        index, inverse = order(name, height, width)
        return index.numpy(), inverse.numpy()


def sequence_order(order: str) -> str:
    """Return the first direction of `order`, a scan order or a set of directions: one that reads each cell once.

    Raises:
        ValueError: there is no such order, or it joins several.
    """
    name = direction_names(order)[0]
    if len(split_order(name)) > 1:
        raise ValueError(f"order={order!r} reads cells more than once; give an order that is not joined of several")
    return name


def chosen_orders(directions: Sequence[str], order: str | None, published_inverse: bool) -> tuple[str, ...]:
    """Return the names of a mixer's scan orders: `directions`, or where `order` is given its directions instead.

    Args:
        directions: Names of scan orders.
        order: A scan order, or a set of directions; None for `directions`.
        published_inverse: Whether orders by columns are brought back as LocalMamba's published code does it, by the
            inverse for square maps alone ("column_unswapped").

    Raises:
        ValueError: there is no such order, or no direction.
    """
    if isinstance(directions, str) or not directions:
        raise ValueError(f"directions={directions!r} must be a sequence of scan orders; give at least one name in it")
    for name in directions:
        try:
            direction_names(name)
        except ValueError as error:
            raise ValueError(f"directions={list(directions)!r}: {error}") from error
    names = tuple(directions) if order is None else direction_names(order)
    return (
        tuple(re.sub(r"^column(?!_unswapped)", "column_unswapped", name) for name in names)
        if published_inverse
        else names
    )


def scan_order(name: str, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, inverse) as `visionmix.scans.order`, on the device of `like`.

    They come from the library's op, or enter the graph as constants where it must do without such ops.
    """
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        # torch.jit.trace, and with it fvcore, knows no device among an op's arguments.
        if dispatch.bypassed() and is_symbolic(height, width):
            index, inverse = symbolic_order(name, height, width)
            return index.to(like.device), inverse.to(like.device)
        if dispatch.bypassed() or torch.jit.is_tracing():
            index, inverse = _constant_order(name, int(height), int(width))
            return torch.tensor(index, device=like.device), torch.tensor(inverse, device=like.device)
    return torch.ops.visionmix.scan_order(name, height, width, like.device)


def _with(numbers: Tensor, at: int, value: int) -> Tensor:
    """Return `numbers` with `value` before number `at`, or behind the last."""
    one = torch.full([1], value, dtype=numbers.dtype, device=numbers.device)
    return torch.cat([numbers[:at], one, numbers[at:]])


@torch.fx.wrap
def token_order(name: str, height: int, width: int, prefix: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of a sequence of a map's cells in row-major order and, at the positions `prefix`, other tokens.

    The others keep their positions; the cells are read in the order called `name` around them.

    Args:
        name: An order as `visionmix.scans.order` takes it, which reads no cell twice.
        height: Rows of the map.
        width: Columns of the map.
        prefix: Positions of the other tokens, rising.
        like: A tensor on the device where the order is wanted.

    Returns:
        index, int64 (steps,), the position read at each step, -1 for a padded step; inverse, int64 (tokens,), the step
        at which each position is read, -1 for one that is not.
    """
    index, inverse = scan_order(name, height, width, like)
    for at in prefix:
        step = index[:at].shape[0]  # less than `at` where an order reads some of the cells only
        index = _with(torch.where(index >= at, index + 1, index), at, at)
        inverse = _with(torch.where(inverse >= step, inverse + 1, inverse), at, step)
    return index, inverse


def turns_order(name: str, count: int, height: int, width: int, behind: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of a sequence of `count` tokens in each cell of a map, all of a cell before the next cell's.

    A name that ends in "_reversed" reads all of that backwards, the last token of a cell first.

    Args:
        name: An order as `visionmix.scans.order` takes it, which reads no cell twice.
        count: Tokens in a cell, such as frames or levels.
        height: Rows of the map.
        width: Columns of the map.
        behind: Whether the inverse takes the sequence for `count` maps, one behind the other.
        like: A tensor on the device where the order is wanted.

    Returns:
        index, the token ``cell * count + place`` read at each step, -1 for a padded step; inverse, the step at which
        each token is read, -1 for one that is not.
    """
    return _turns_order(name, count, height, width, behind, like)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _turns_order(name: str, count: int, height: int, width: int, behind: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    back = name.endswith("_reversed")
    cells, steps = scan_order(name[: len(name) - len("_reversed")] if back else name, height, width, like)
    place = numbered(count, like)
    length = cells.shape[0] * count
    index = torch.where(cells.unsqueeze(1) < 0, -1, cells.unsqueeze(1) * count + place).flatten()
    if behind:
        inverse = torch.where(steps < 0, -1, steps + place.unsqueeze(1) * cells.shape[0]).flatten()
    else:
        inverse = torch.where(steps.unsqueeze(1) < 0, -1, steps.unsqueeze(1) * count + place).flatten()
    if back:
        index, inverse = index.flip(0), torch.where(inverse < 0, -1, length - 1 - inverse)
    return index, inverse


@torch.fx.wrap
def take(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[:, index]`` of a sequence (batch, tokens, channels), zeros where the index is -1."""
    return F.pad(x, [0, 0, 0, 1]).index_select(1, torch.where(index < 0, x.shape[1], index))
