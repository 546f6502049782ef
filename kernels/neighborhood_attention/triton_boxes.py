"""Where a tile's whole box of keys fits one block of scores, and the launches of the kernels for such boxes.

`choose` finds the tile and box, or None, and the general kernels of `triton_kernels.py` run. That is so for kernels of
more than about 13 x 13, for wide heads, additional keys and inputs of several dtypes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionmix.kernels.gpu import dot_precision, interpreting, launch, target
from visionmix.kernels.neighborhood_attention.schema import Arguments
from visionmix.kernels.neighborhood_attention.triton_box_kernels import (
    box_bias_gradients_kernel,
    box_forward_kernel,
    box_key_gradients_kernel,
    box_query_gradients_kernel,
    box_table_kernel,
)
from visionmix.kernels.neighborhood_attention.windows import box_widths, class_lengths

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Tokens of a tile: one of a warp's matrix instructions has 16 rows.
_ROWS = 16
# Channels of a head at most, so that they fit the registers. Three TF32 parts take three times as many.
_MOST_CHANNELS = {"tf32x3": 32, "ieee": 64, "tf32": 64}
# Bytes of a box's tokens that are copied to shared memory while a program works on the image before.
_MOST_AHEAD = 32 << 10
# A program goes over up to so many images, since its table is loaded once, where that leaves so many programs.
_IMAGES, _PROGRAMS = 8, 4096
# Programs along the last axis of a grid at most.
_MOST_GROUPS = (1 << 16) - 1
# Distances that a program of `box_bias_gradients_kernel` sums up.
_DISTANCES = 64


@dataclass(frozen=True)
class Axis:
    """One axis of the map: what the window and the map are along it."""

    size: int
    kernel_size: int
    stride: int
    dilation: int
    causal: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest residue class."""
        return max(class_lengths(self.size, self.dilation))

    @property
    def classes(self) -> int:
        """Residue classes that hold any token."""
        return min(self.size, self.dilation)

    def alike(self, tile: int) -> bool:
        """Return whether tiles away from the ends look alike: groups of `stride` queries must not straddle them."""
        return tile % self.stride == 0 or tile >= self.longest

    def margins(self, circular: bool, inverse: bool) -> tuple[int, int]:
        """Return how near (the start, the end) of the axis a tile's windows are cut or shifted."""
        k = self.kernel_size
        if inverse:
            return k - 1 + self.stride, k - 1 + self.stride
        if circular:
            return k // 2, 0 if self.causal else k // 2
        return (k - 1, 0) if self.causal else (k // 2, k - 1 - k // 2)


@dataclass(frozen=True)
class Box:
    """A tile of tokens, the box of those on the other side, and how many kinds of tiles there are along each axis.

    Attributes:
        tile: tokens of a tile along each axis.
        box: tokens of the largest box along each axis.
        columns: scores of a row, padded to a power of two.
        before: how near the start of an axis a tile's windows are cut or shifted.
        after: how near the end.
        kinds: kinds of tiles along each axis.
        tiles: tiles of the maps of all residue classes.
        inverse: whether the tile holds keys and the box queries.
        times: how often the box's tokens are read.
    """

    tile: tuple[int, ...]
    box: tuple[int, ...]
    columns: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    kinds: tuple[int, ...]
    tiles: int
    inverse: bool
    times: float

    @property
    def constants(self) -> dict:
        """The constants of the kernels."""
        return {
            "TILE": self.tile,
            "BOX": self.box,
            "COLUMNS": self.columns,
            "BEFORE": self.before,
            "AFTER": self.after,
        }


def _tiles(axes: tuple[Axis, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the tiles, powers of two along each axis; the last one may be longer than the map."""
    most = [min(triton.next_power_of_2(axis.longest), _ROWS) for axis in axes[:-1]]
    powers = [[1 << p for p in range(_ROWS.bit_length()) if 1 << p <= n] for n in (*most, _ROWS)]
    for tile in product(*powers):
        if math.prod(tile) == _ROWS and all(axis.alike(t) for axis, t in zip(axes, tile, strict=True)):
            yield tile


@cache
def choose(axes: tuple[Axis, ...], circular: bool, inverse: bool, most: int) -> Box | None:
    """Return the tile and box that cost least, None if every box has more than `most` tokens."""

    def make(tile: tuple[int, ...]) -> Box:
        widths = [
            box_widths(axis.size, axis.kernel_size, axis.stride, axis.dilation, axis.causal, circular, t, inverse)
            for axis, t in zip(axes, tile, strict=True)
        ]
        box = tuple(max(w) for w in widths)
        margins = [axis.margins(circular, inverse) for axis in axes]
        kinds = [
            min(triton.cdiv(axis.longest, t), sum(triton.cdiv(m, t) for m in margin) + 2)
            * (1 if axis.dilation == 1 else 2)
            for axis, t, margin in zip(axes, tile, margins, strict=True)
        ]
        return Box(
            tile,
            box,
            max(16, triton.next_power_of_2(math.prod(box))),
            tuple(before for before, _ in margins),
            tuple(after for _, after in margins),
            tuple(kinds),
            math.prod(triton.cdiv(axis.longest, t) * axis.classes for axis, t in zip(axes, tile, strict=True)),
            inverse,
            math.prod(sum(w) / axis.size for axis, w in zip(axes, widths, strict=True)),
        )

    def cost(box: Box) -> tuple:
        # Instructions of all tiles: a key that is read takes about as many as five scores.
        return box.tiles * (_ROWS * box.columns + 5 * math.prod(box.box)), box.tile

    fitting = (box for box in map(make, _tiles(axes)) if box.columns <= most)
    return min(fitting, key=cost, default=None)


class Boxes:
    """The launches of one call.

    `outputs`, `queries` and `keys` are the boxes that the output and the gradients of queries and of keys take at once;
    None if none fits.
    """

    def __init__(self, a: Arguments, axes: tuple[Axis, ...], disc: tuple | None, *others: Tensor):
        self.a, self.disc = a, disc
        types = {x.dtype for x in (a.query, a.key, a.value)}
        self.precision = dot_precision(a.query, a.key, a.value)
        dk, dv = a.query.shape[-1], a.value.shape[-1]
        block_k, block_v = (max(16, triton.next_power_of_2(dim)) for dim in (dk, dv))
        fits = (
            a.additional_keys is None
            and len(types) == 1
            and max(block_k, block_v) <= _MOST_CHANNELS[self.precision]
            and all(_extent(x) < 1 << 31 for x in (a.query, a.key, a.value, *others))
        )
        self.batch, self.heads = a.query.shape[0], a.query.shape[-2]
        self.group = self.heads // a.key.shape[-2]

        def find(inverse: bool, products: int) -> Box | None:
            return choose(axes, a.circular, inverse, self._most_columns(products)) if fits else None

        self.outputs, self.queries = find(False, 2), find(False, 3)
        # The gradients of shared keys are sums over heads.
        self.keys = find(True, 4) if self.group == 1 else None
        self.sizes = {f"N{axis}": n.size for axis, n in enumerate(axes)}
        self.window = {
            "KERNEL": tuple(axis.kernel_size for axis in axes),
            "STRIDE": tuple(axis.stride for axis in axes),
            "DILATION": tuple(axis.dilation for axis in axes),
            "CAUSAL": tuple(axis.causal for axis in axes),
        }
        self.channels = {"DK": dk, "DV": dv, "BK": block_k, "BV": block_v}
        self.products = {"TYPE": _TYPES[a.query.dtype], "PRECISION": self.precision}

    def _table(self, box: Box) -> Tensor:
        """Return the tables of masks and biases, (kinds of tiles, heads or 1, rows of a tile, columns)."""
        a, bias = self.a, self.a.relative_position_bias
        shape = (math.prod(box.kinds), 1 if bias is None else self.heads)
        table = a.query.new_empty(*shape, _ROWS, box.columns, dtype=torch.float32)
        launch(
            box_table_kernel,
            shape,
            p_bias=None if bias is None else bias.contiguous(),
            p_table=table,
            **self.sizes,
            kinds=box.kinds,
            **box.constants,
            INVERSE=box.inverse,
            AXES=a.query.dim() - 3,
            **self.window,
            DISC=self.disc,
            num_warps=4,
        )
        return table

    def _most_columns(self, products: int) -> int:
        """Return the tokens of a box at most, in kernels of so many products."""
        if self.precision != "tf32x3":
            return 256
        # Compiled for sm_120, three products spill where they do not for others.
        return 128 if products == 2 or (products == 3 and target().arch != 120) else 64

    def _warps(self, box: Box, products: int) -> int:
        """Return the warps of a program of so many products: 32 scores a thread, fewer where operands take more."""
        if self.precision == "tf32x3":
            return 4 if products == 2 else 8
        warps = max(1, _ROWS * box.columns // 1024)
        return 2 * warps if max(self.channels["BK"], self.channels["BV"]) > 32 else warps

    def _stages(self, box: Box) -> int:
        """Return the images that a program has in flight; 2 take fewer registers, except in three TF32 parts."""
        if target().backend != "cuda" or self.precision == "tf32x3":
            return 1
        ahead = box.columns * (self.channels["BK"] + self.channels["BV"]) * self.a.query.element_size()
        return 2 if ahead <= _MOST_AHEAD else 1

    def _launch(self, kernel, box: Box, images: int, products: int, flops: int, **arguments) -> None:
        a, table = self.a, self._table(box)
        programs = box.tiles * self.heads * triton.cdiv(self.batch, images)
        read = ("p_q", "p_do", "p_lse", "p_delta") if box.inverse else ("p_k", "p_v")
        launch(
            kernel,
            (box.tiles, self.heads, triton.cdiv(self.batch, images)),
            p_q=a.query,
            p_k=a.key,
            p_v=a.value,
            p_table=table,
            **arguments,
            scale=a.scale,
            **self.sizes,
            kinds=box.kinds,
            table_heads=table.shape[1],
            batch=self.batch,
            images=images,
            s_q=map_strides(a.query),
            s_k=map_strides(a.key),
            s_v=map_strides(a.value),
            **self.channels,
            **box.constants,
            **self.window,
            CIRCULAR=a.circular,
            **self.products,
            num_warps=self._warps(box, products),
            num_stages=self._stages(box),
            limited=False,
            passes={name: box.times for name in read if name in arguments or name in ("p_q", "p_k", "p_v")}
            | {"p_table": programs * _ROWS * box.columns / table.numel()},
            flops=flops,
        )

    def _images(self, box: Box, most: int) -> int:
        """Return the images that a program goes over, `most` of them at most."""
        # The interpreter takes one program after another.
        programs = 1 if interpreting() else _PROGRAMS
        images = min(self.batch, most, self.batch * self.heads * box.tiles // programs)
        return max(1, images, triton.cdiv(self.batch, _MOST_GROUPS))

    def forward(self, out: Tensor, lse: Tensor, flops: int) -> None:
        """Write the output and the log-sum-exp."""
        box, options = self.outputs, {"p_out": out, "p_lse": lse, "group": self.group}
        self._launch(box_forward_kernel, box, self._images(box, _IMAGES), 2, flops, **options)

    def query_gradients(self, given: dict, out: Tensor, grad_lse: Tensor, grad: Tensor, flops: int) -> Tensor | None:
        """Write the gradient of the query and `delta`; return that of the biases, (heads, distances) float32."""
        box, bias = self.queries, self.a.relative_position_bias
        # The sums of the gradients of scores are written once a program.
        images = self._images(box, _IMAGES if bias is None else 4 * _IMAGES)
        groups = triton.cdiv(self.batch, images)
        sums = None
        if bias is not None:
            shape = (groups, self.heads, box.tiles, _ROWS, box.columns)
            sums = out.new_empty(shape, dtype=torch.float32)
        self._launch(
            box_query_gradients_kernel,
            box,
            images,
            3,
            flops,
            **given,
            p_out=out,
            p_dlse=grad_lse,
            p_dq=grad,
            p_dtable=sums,
            group=self.group,
        )
        if sums is None:
            return None
        distances = math.prod(2 * k - 1 for k in self.window["KERNEL"])
        partial = out.new_empty(self.heads, box.tiles, distances, dtype=torch.float32)
        launch(
            box_bias_gradients_kernel,
            (box.tiles, self.heads, triton.cdiv(distances, _DISTANCES)),
            p_dtable=sums,
            p_dbias=partial,
            **self.sizes,
            groups=groups,
            TILE=box.tile,
            BOX=box.box,
            COLUMNS=box.columns,
            BLOCK=_DISTANCES,
            **self.window,
            CIRCULAR=self.a.circular,
            num_warps=4,
        )
        return partial.sum(1)

    def key_gradients(self, given: dict, grad_key: Tensor, grad_value: Tensor, flops: int) -> None:
        """Write the gradients of key and value."""
        box = self.keys
        images = self._images(box, _IMAGES)
        self._launch(box_key_gradients_kernel, box, images, 4, flops, **given, p_dk=grad_key, p_dv=grad_value)


def map_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of a (batch, *grid, heads, dim) tensor, 0 for axes that a map of fewer than three lacks."""
    batch, *axes, head, dim = x.stride()
    return batch, *[0] * (3 - len(axes)), *axes, head, dim


def _extent(x: Tensor) -> int:
    """Return how far apart elements of an image lie, or would if it were contiguous."""
    return max(math.prod(x.shape[1:]), sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)))
