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
from torch import Tensor

from visionmix.kernels.gpu import interpreting, launch, target
from visionmix.kernels.neighborhood_attention.schema import Arguments
from visionmix.kernels.neighborhood_attention.triton_box_kernels import (
    Box,
    box_bias_gradients_kernel,
    box_forward_kernel,
    box_key_gradients_kernel,
    box_query_gradients_kernel,
    box_table_kernel,
)
from visionmix.kernels.neighborhood_attention.triton_windows import Channels, Window, map_strides
from visionmix.kernels.neighborhood_attention.windows import box_widths, class_lengths

# Tokens of a tile: one of a warp's matrix instructions has 16 rows.
_ROWS = 16
# Channels of a head at most, so that they fit the registers. Three TF32 parts take three times as many.
_MOST_CHANNELS = {"tf32x3": 32, "ieee": 64, "tf32": 64}
# Bytes of a box's tokens that are copied to shared memory while a program works on the image before.
_MOST_AHEAD = 32 << 10
# A program goes over up to so many images, where that leaves so many programs: its places are found once, and its table
# is loaded once if the registers hold it.
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
class Tiling:
    """A tile and its box, and how a map is taken apart into such tiles.

    Attributes:
        box: the kernels' constants.
        kinds: kinds of tiles along each axis.
        tiles: tiles of the maps of all residue classes.
        times: how often the boxes' tokens are read.
    """

    box: Box
    kinds: tuple[int, ...]
    tiles: int
    times: float


def _tiles(axes: tuple[Axis, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the tiles, powers of two along each axis; the last one may be longer than the map."""
    most = [min(triton.next_power_of_2(axis.longest), _ROWS) for axis in axes[:-1]]
    powers = [[1 << p for p in range(_ROWS.bit_length()) if 1 << p <= n] for n in (*most, _ROWS)]
    for tile in product(*powers):
        if math.prod(tile) == _ROWS and all(axis.alike(t) for axis, t in zip(axes, tile, strict=True)):
            yield tile


@cache
def choose(axes: tuple[Axis, ...], circular: bool, inverse: bool, most: int) -> Tiling | None:
    """Return the tile and box that cost least, None if every box has more than `most` tokens."""

    def make(tile: tuple[int, ...]) -> Tiling:
        widths = [
            box_widths(axis.size, axis.kernel_size, axis.stride, axis.dilation, axis.causal, circular, t, inverse)
            for axis, t in zip(axes, tile, strict=True)
        ]
        width = tuple(max(w) for w in widths)
        columns = max(16, triton.next_power_of_2(math.prod(width)))
        margins = [axis.margins(circular, inverse) for axis in axes]
        before, after = zip(*margins, strict=True)
        kinds = [
            min(triton.cdiv(axis.longest, t), sum(triton.cdiv(m, t) for m in margin) + 2)
            * (1 if axis.dilation == 1 else 2)
            for axis, t, margin in zip(axes, tile, margins, strict=True)
        ]
        return Tiling(
            Box(tile, _ROWS, width, columns, before, after, inverse),
            tuple(kinds),
            math.prod(triton.cdiv(axis.longest, t) * axis.classes for axis, t in zip(axes, tile, strict=True)),
            math.prod(sum(w) / axis.size for axis, w in zip(axes, widths, strict=True)),
        )

    def cost(tiling: Tiling) -> tuple:
        # Instructions of all tiles: a key that is read takes about as many as five scores.
        box = tiling.box
        return tiling.tiles * (_ROWS * box.COLUMNS + 5 * math.prod(box.WIDTH)), box.TILE

    fitting = (tiling for tiling in map(make, _tiles(axes)) if most >= tiling.box.COLUMNS)
    return min(fitting, key=cost, default=None)


class Boxes:
    """The launches of one call.

    `outputs`, `queries` and `keys` are the tilings whose boxes the output and the gradients of queries and of keys take
    at once; None if none fits.
    """

    def __init__(self, a: Arguments, axes: tuple[Axis, ...], window: Window, channels: Channels, *others: Tensor):
        self.a, self.window, self.channels, self.precision = a, window, channels, channels.PRECISION
        types = {x.dtype for x in (a.query, a.key, a.value)}
        fits = (
            a.additional_keys is None
            and len(types) == 1
            and max(channels.BK, channels.BV) <= _MOST_CHANNELS[self.precision]
            and all(_extent(x) < 1 << 31 for x in (a.query, a.key, a.value, *others))
        )
        self.batch, self.heads = a.query.shape[0], a.query.shape[-2]
        self.group = self.heads // a.key.shape[-2]

        def find(inverse: bool, products: int) -> Tiling | None:
            return choose(axes, a.circular, inverse, self._most_columns(products)) if fits else None

        self.outputs, self.queries = find(False, 2), find(False, 3)
        # The gradients of shared keys are sums over heads.
        self.keys = find(True, 4) if self.group == 1 else None
        self.sizes = {f"N{axis}": n.size for axis, n in enumerate(axes)}

    def _table(self, tiling: Tiling) -> Tensor:
        """Return the tables of masks and biases, (kinds of tiles, heads or 1, rows of a tile, columns)."""
        a, bias = self.a, self.a.relative_position_bias
        shape = (math.prod(tiling.kinds), 1 if bias is None else self.heads)
        table = a.query.new_empty(*shape, _ROWS, tiling.box.COLUMNS, dtype=torch.float32)
        launch(
            box_table_kernel,
            shape,
            p_bias=None if bias is None else bias.contiguous(),
            p_table=table,
            **self.sizes,
            kinds=tiling.kinds,
            window=self.window,
            box=tiling.box,
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
        warps = max(1, _ROWS * box.COLUMNS // 1024)
        return 2 * warps if max(self.channels.BK, self.channels.BV) > 32 else warps

    def _stages(self, box: Box) -> int:
        """Return the images that a program has in flight; 2 take fewer registers, except in three TF32 parts."""
        if target().backend != "cuda" or self.precision == "tf32x3":
            return 1
        ahead = box.COLUMNS * (self.channels.BK + self.channels.BV) * self.a.query.element_size()
        return 2 if ahead <= _MOST_AHEAD else 1

    def _launch(self, kernel, tiling: Tiling, images: int, products: int, flops: int, **arguments) -> None:
        a, box, table = self.a, tiling.box, self._table(tiling)
        grid = (tiling.tiles, self.heads, triton.cdiv(self.batch, images))
        read = ("p_q", "p_do", "p_lse", "p_delta") if box.INVERSE else ("p_k", "p_v")
        launch(
            kernel,
            grid,
            p_q=a.query,
            p_k=a.key,
            p_v=a.value,
            p_table=table,
            **arguments,
            scale=a.scale,
            **self.sizes,
            kinds=tiling.kinds,
            table_heads=table.shape[1],
            batch=self.batch,
            images=images,
            s_q=map_strides(a.query),
            s_k=map_strides(a.key),
            s_v=map_strides(a.value),
            window=self.window,
            box=box,
            channels=self.channels,
            num_warps=self._warps(box, products),
            num_stages=self._stages(box),
            limited=False,
            passes={name: tiling.times for name in read if name in arguments or name in ("p_q", "p_k", "p_v")}
            | {"p_table": math.prod(grid) * _ROWS * box.COLUMNS / table.numel()},
            flops=flops,
        )

    def _images(self, tiling: Tiling, most: int) -> int:
        """Return the images that a program goes over, `most` of them at most."""
        # The interpreter takes one program after another.
        programs = 1 if interpreting() else _PROGRAMS
        images = min(self.batch, most, self.batch * self.heads * tiling.tiles // programs)
        return max(1, images, triton.cdiv(self.batch, _MOST_GROUPS))

    def forward(self, out: Tensor, lse: Tensor, flops: int) -> None:
        """Write the output and the log-sum-exp."""
        tiling, options = self.outputs, {"p_out": out, "p_lse": lse, "group": self.group}
        self._launch(box_forward_kernel, tiling, self._images(tiling, _IMAGES), 2, flops, **options)

    def query_gradients(self, given: dict, out: Tensor, grad_lse: Tensor, grad: Tensor, flops: int) -> Tensor | None:
        """Write the gradient of the query and `delta`; return that of the biases, (heads, distances) float32."""
        tiling, bias = self.queries, self.a.relative_position_bias
        box = tiling.box
        # The sums of the gradients of scores are written once a program.
        images = self._images(tiling, _IMAGES if bias is None else 4 * _IMAGES)
        groups = triton.cdiv(self.batch, images)
        sums = None
        if bias is not None:
            shape = (groups, self.heads, tiling.tiles, _ROWS, box.COLUMNS)
            sums = out.new_empty(shape, dtype=torch.float32)
        self._launch(
            box_query_gradients_kernel,
            tiling,
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
        distances = self.window.TABLE
        partial = out.new_empty(self.heads, tiling.tiles, distances, dtype=torch.float32)
        launch(
            box_bias_gradients_kernel,
            (tiling.tiles, self.heads, triton.cdiv(distances, _DISTANCES)),
            p_dtable=sums,
            p_dbias=partial,
            **self.sizes,
            groups=groups,
            window=self.window,
            box=box,
            BLOCK=_DISTANCES,
            num_warps=4,
        )
        return partial.sum(1)

    def key_gradients(self, given: dict, grad_key: Tensor, grad_value: Tensor, flops: int) -> None:
        """Write the gradients of key and value."""
        images = self._images(self.keys, _IMAGES)
        self._launch(box_key_gradients_kernel, self.keys, images, 4, flops, **given, p_dk=grad_key, p_dv=grad_value)


def _extent(x: Tensor) -> int:
    """Return how far apart elements of an image lie, or would if it were contiguous."""
    return max(math.prod(x.shape[1:]), sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)))
