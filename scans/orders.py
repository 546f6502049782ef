"""An order by its name, cached per device, and the op that gives it inside a graph."""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch

from visionmix.scans.grammar import Part, check_depth, check_name, check_sizes, num_steps, parse


class ScanOrder(NamedTuple):
    """A scan order of a grid of `cells = height * width * depth` cells.

    `tokens[..., index, :]` is the sequence (where no step is padded) and `sequence[..., inverse, :]` the grid again.

    Attributes:
        index: int64 (steps,), the cell `(row * width + column) * depth + level` read at each step, -1 for a padded
            step.
        inverse: int64 (cells,), the step at which each cell is read, -1 for a cell that is never read (skip scans).
            The inverse of n orders joined with "+" is (n * cells,): for each of them in turn, the step at which it
            reads each cell.
    """

    index: torch.Tensor
    inverse: torch.Tensor


def _invert(index: torch.Tensor, cells: int) -> torch.Tensor:
    # Padded steps write to the last place, which is dropped.
    inverse = torch.full((cells + 1,), -1, device="cpu")
    place = torch.where(index < 0, cells, index)
    return inverse.scatter(0, place, torch.arange(index.shape[0], device="cpu"))[:cells]


def _modify(order: ScanOrder, modifier: str, height: int, width: int, depth: int) -> ScanOrder:
    """Return the order, one of a grid of height x width x depth, with one modifier applied to it."""
    index, inverse = order
    if modifier == "reversed":
        return ScanOrder(index.flip(0), torch.where(inverse < 0, -1, index.shape[0] - 1 - inverse))
    cells = torch.arange(height * width * depth, device="cpu").view(height, width, depth)
    # source[cell] is the cell of the unmodified grid that comes to lie there; target is its inverse.
    source = {"transposed": cells.transpose(0, 1), "hflip": cells.flip(1), "vflip": cells.flip(0)}[modifier].reshape(-1)
    target = _invert(source, source.shape[0])
    return ScanOrder(torch.where(index < 0, -1, target[index.clamp(min=0)]), inverse[source])


def _build_part(part: Part, height: int, width: int, depth: int) -> ScanOrder:
    if part.modifiers.count("transposed") % 2:
        height, width = width, height
    size = (height, width, depth) if part.base.volumetric else (height, width)
    index = part.base.build(*size, *part.numbers)
    order = ScanOrder(index, index if part.base.self_inverse else _invert(index, height * width * depth))
    for modifier in part.modifiers:
        order = _modify(order, modifier, height, width, depth)
        if modifier == "transposed":
            height, width = width, height
    return order


def _build(name: str, height: int, width: int, depth: int) -> ScanOrder:
    orders = [_build_part(part, height, width, depth) for part in parse(name)]
    index = torch.cat([order.index for order in orders])
    inverses, before = [], 0
    for order in orders:
        inverses.append(torch.where(order.inverse < 0, -1, order.inverse + before))
        before = before + order.index.shape[0]
    return ScanOrder(index, torch.cat(inverses))


def symbolic_order(name: str, height: int, width: int) -> ScanOrder:
    """Return an order of a grid whose sizes are symbols of a graph that is being exported, computed inside the graph.

    Raises:
        ValueError: the order is built piece by piece, in a number of pieces that depends on the size.
    """
    if any(part.base.recursive for part in parse(name)):
        raise ValueError(
            f"scan order {name!r} cannot be exported with dynamic height and width, since it is built of pieces whose "
            "number depends on them; export with a fixed height and width, or choose another order"
        )
    return _build(name, height, width, 1)


class _Cache:
    """The orders used last, up to a total of `limit` bytes."""

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self.orders: OrderedDict[tuple, ScanOrder] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, name: str, height: int, width: int, depth: int, device: torch.device) -> ScanOrder:
        key = (name, height, width, depth, device)
        with self.lock:
            if key in self.orders:
                self.orders.move_to_end(key)
                return self.orders[key]
        # Made outside inference mode: a tensor of inference mode could not take part in a later training step.
        with torch.inference_mode(False):
            order = ScanOrder(*(tensor.to(device) for tensor in _build(name, height, width, depth)))
        with self.lock:
            if key not in self.orders:
                self.orders[key] = order
                self.bytes += _size(order)
            while self.bytes > self.limit:
                self.bytes -= _size(self.orders.popitem(last=False)[1])
        return order


def _size(order: ScanOrder) -> int:
    return order.index.nbytes + order.inverse.nbytes


_cache = _Cache(limit=256 * 2**20)


torch.library.define(
    "visionmix::scan_order",
    "(str name, SymInt height, SymInt width, Device? device=None, SymInt depth=1) -> (Tensor index, Tensor inverse)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("visionmix::scan_order", "default")
def _scan_order(
    name: str, height: int, width: int, device: torch.device | None = None, depth: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    check_sizes(height=height, width=width, depth=depth)
    check_depth(name, depth)
    device = torch.device("cpu") if device is None else torch.empty(0, device=device).device  # "cuda" -> "cuda:0"
    index, inverse = _cache.get(name, height, width, depth, device)
    # Copies, for a compiled graph may write its next result into the memory of an op's output once that has been read.
    return index.clone(), inverse.clone()


@torch.library.register_fake("visionmix::scan_order")
def _(
    name: str, height: int, width: int, device: torch.device | None = None, depth: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.empty(num_steps(name, height, width, depth), dtype=torch.int64, device=device or "cpu")
    return index, index.new_empty(len(parse(name)) * height * width * depth)


def order(name: str, height: int, width: int, depth: int = 1, *, device: torch.device | str | None = None) -> ScanOrder:
    """Return the scan order called `name` of a grid of any size.

    The names are `names()`, followed by numbers where they take them (`window_7`, `atrous_2`) and by modifiers
    (`hilbert_transposed_reversed`); see `visionmix.scans.grammar`. The orders used last are cached for each device;
    every call returns copies, which may be written to.

    Args:
        name: the order. "raster", "column", "snake", "morton" and "u_order" also order grids with a depth.
        height: rows of the grid, from 1 up.
        width: columns of the grid, from 1 up.
        depth: levels of the grid, from 1 up.
        device: device of the tensors; None for the CPU.

    Returns:
        index, int64 (steps,), and inverse, int64 (cells,): see `ScanOrder`.

    Raises:
        TypeError: the name is not a str, or a size is not an int.
        ValueError: no order has that name (the message names the nearest), a size is below 1, the order is
            two-dimensional and depth is not 1, or PyTorch knows no such device.
    """
    check_name(name)
    check_sizes(height=height, width=width, depth=depth)
    remedy = "give a name of PyTorch's such as 'cpu' or 'cuda:0'"
    if isinstance(device, bool) or not (device is None or isinstance(device, (str, int, torch.device))):
        raise TypeError(f"device={device!r} is of type {type(device).__name__}; {remedy}")
    try:
        device = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown; {remedy}") from error
    return ScanOrder(*torch.ops.visionmix.scan_order(name, height, width, device, depth))
