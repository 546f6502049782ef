"""Neighborhood attention in Triton: tiles of queries and the boxes of keys that they see.

The union of the windows of a tile of queries, of one residue class, image and head, is a box of keys. The output and
the log-sum-exp are saved, and backward computes the probabilities anew: the gradients of keys from tiles of keys and
the boxes of queries that see them, without atomics. There are two ways to go through a box:

- *At once*, where all scores of a tile fit the registers (`triton_boxes.py` decides): softmax in one pass, masks and
  biases from a table that tiles share, programs that go over several images. The gradient of the biases is the sum of
  the scores' gradients over the images, which the program that forms those of the queries keeps in registers;
  `box_bias_gradients_kernel` gathers it.
- *In blocks*, for the rest (`triton_kernels.py`): an online softmax, the window's rules for each block.
  `extra_gradients_kernel` (additional keys) and `bias_gradients_kernel` write partial sums of chunks of queries.

Partial sums are added up here in a fixed order. So gradients repeat bit by bit.

As the products are dense, a NaN or an infinity in a value reaches every query of the tiles whose box holds it.

Hassani et al., 2025, Generalized Neighborhood Attention (arXiv 2504.16922).
"""

import math
from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.gpu import dot_precision, launch, target
from visionmix.kernels.neighborhood_attention import reference
from visionmix.kernels.neighborhood_attention.schema import Arguments, Gradients
from visionmix.kernels.neighborhood_attention.triton_boxes import Axis, Boxes
from visionmix.kernels.neighborhood_attention.triton_kernels import (
    Blocks,
    bias_gradients_kernel,
    extra_gradients_kernel,
    forward_kernel,
    key_gradients_kernel,
    query_gradients_kernel,
)
from visionmix.kernels.neighborhood_attention.triton_windows import Channels, Window, map_strides
from visionmix.kernels.neighborhood_attention.windows import box_widths, count_pairs

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A head's channels lie in registers, all at once; float32 ones in three TF32 parts on NVIDIA.
_MOST_CHANNELS = {"tf32": 128, "ieee": 128, "tf32x3": 64}
# Queries a program of `extra_gradients_kernel`: a multiple of every block.
_CHUNK = 1024


def _leaves_to_reference(a: Arguments) -> bool:
    channels = max(a.query.shape[-1], a.value.shape[-1])
    precision = dot_precision(a.query, a.key, a.value, a.additional_keys, a.additional_values)
    most = _MOST_CHANNELS[precision]
    if channels <= most:
        return False
    remedy = f"use heads of at most {most}"
    if precision == "tf32x3" and channels <= _MOST_CHANNELS["tf32"]:
        remedy += ", or half precision"
    dispatch.log_slow_path("neighborhood_attention", f"a head has {channels} channels", f"{remedy} for Triton")
    return True


def _tile(sizes: list[int], most: int) -> tuple[int, ...]:
    """Return a tile's tokens along each axis: powers of two, `most` in all and at least 16."""
    tile = [triton.next_power_of_2(n) for n in sizes]
    while math.prod(tile) > most:
        tile[tile.index(max(tile))] //= 2
    while math.prod(tile) < 16:
        tile[-1] *= 2
    return tuple(tile)


def _disc(kernel_size: tuple[int, ...]) -> tuple[int, int, int, int, bool]:
    """Return a circular window's weights of squared offsets, their limit, and whether sums need 64 bits."""
    radii = [(k + 1) // 2 for k in kernel_size]
    whole = math.prod(radii)
    weights = [(whole // r) ** 2 for r in radii]
    common = math.gcd(*weights, whole**2)
    limit = whole**2 // common
    return *(w // common for w in weights), limit, 3 * limit >= 1 << 31


class _Problem:
    """Sizes, tiles and the arguments that the kernels share."""

    def __init__(self, a: Arguments):
        query, key, value = a.query, a.key, a.value
        extra_key, extra_value, bias = a.additional_keys, a.additional_values, a.relative_position_bias
        self.a, self.query = a, query
        batch, *grid, self.heads, dk = query.shape
        self.key_heads, dv = value.shape[-2:]
        self.batch, self.tokens, axes = batch, math.prod(grid), len(grid)
        lead = (1,) * (3 - axes)
        causal = (*(False for _ in lead), *map(bool, a.is_causal))
        self.grid, *window = ((*lead, *values) for values in (grid, a.kernel_size, a.stride, a.dilation))
        kernel_size = window[0]
        disc = _disc(kernel_size) if a.circular else None
        self.window = Window(axes, *window, causal, disc, math.prod(2 * k - 1 for k in kernel_size))
        self.axes = tuple(Axis(*values) for values in zip(self.grid, *window, causal, strict=True))
        self.classes = [axis.classes for axis in self.axes]
        self.sizes = [axis.longest for axis in self.axes]
        precision = dot_precision(query, key, value, extra_key, extra_value)
        block_k, block_v = (max(16, triton.next_power_of_2(dim)) for dim in (dk, dv))
        # Channels that fill no 16-byte loads take more registers for their addresses.
        channels = max(block_k, block_v) * (2 if dk % 16 or dv % 16 else 1)
        self.rows, self.block = _blocks(channels, precision)
        self.tile = _tile(self.sizes, self.rows)
        self.extra = 0 if extra_key is None else extra_key.shape[1]
        self.inputs = {"p_q": query, "p_k": key, "p_v": value}
        self.options = {
            "p_extra_k": extra_key if self.extra else None,
            "p_extra_v": extra_value if self.extra else None,
            "s_ek": None if extra_key is None else map_strides(extra_key),
            "s_ev": None if extra_value is None else map_strides(extra_value),
        }
        self.table = None if bias is None else bias.contiguous()
        self.strides = {"s_q": map_strides(query), "s_k": map_strides(key), "s_v": map_strides(value)}
        self.scalars = {
            "scale": a.scale,
            **{f"N{axis}": n for axis, n in enumerate(self.grid)},
            "heads": self.heads,
            "group": self.heads // self.key_heads,
        }
        # The kernels that walk over boxes load all values as float32.
        self.channels = Channels(dk, dv, block_k, block_v, tl.float32, precision)
        self.constants = {
            "window": self.window,
            "blocks": Blocks(self.tile, self.block),
            "channels": self.channels,
        }
        self.num_warps = _warps(math.prod(self.tile), max(block_k, block_v), precision)

    @property
    def tile_count(self) -> int:
        """Tiles of the maps of all residue classes."""
        axes = zip(self.sizes, self.tile, self.classes, strict=True)
        return math.prod(triton.cdiv(size, tile) * classes for size, tile, classes in axes)

    def boxes(self, *others: Tensor) -> Boxes:
        """Return the launches of the kernels that take a tile's whole box at once, where one fits."""
        channels = self.channels._replace(TYPE=_TYPES[self.query.dtype])
        return Boxes(self.a, self.axes, self.window, channels, *others)

    def programs(self, heads: int) -> int:
        return self.batch * heads * self.tile_count

    def passes(self, names: list[str], heads: int, inverse: bool = False) -> dict[str, float]:
        """Return how often tensors are read in boxes by `heads` programs each."""
        circular, times = self.a.circular, 1.0
        for axis, tile in zip(self.axes, self.tile, strict=True):
            times *= sum(box_widths(*astuple(axis), circular, tile, inverse)) / axis.size
        return dict.fromkeys(names, heads * times)

    def flops(self, per_pair: int, extra: bool = True) -> int:
        """Return the operations of all pairs of a query and a key it sees."""
        window = self.window
        pairs = count_pairs(self.grid, window.KERNEL, window.STRIDE, window.DILATION, window.CAUSAL, self.a.circular)
        return self.batch * self.heads * (pairs + self.tokens * self.extra * extra) * per_pair

    def float(self, *shape: int) -> Tensor:
        return self.query.new_empty(shape, dtype=torch.float32)

    def extra_gradients(self, gradients: dict) -> tuple[Tensor, Tensor]:
        """Return the gradients of additional keys and values, float32."""
        chunks = triton.cdiv(self.tokens, _CHUNK)
        block = min(self.rows, max(16, triton.next_power_of_2(self.extra)))
        dk, dv, block_k, block_v, _, precision = self.channels
        grads = [self.float(chunks, self.batch, self.extra, self.key_heads, dim) for dim in (dk, dv)]
        blocks = triton.cdiv(self.extra, block)
        launch(
            extra_gradients_kernel,
            (self.batch * self.key_heads, chunks, blocks),
            p_q=self.query,
            **self.options,
            **gradients,
            p_dk=grads[0],
            p_dv=grads[1],
            **self.scalars,
            extra=self.extra,
            s_q=map_strides(self.query),
            BN=self.block,
            BE=block,
            CHUNK=_CHUNK,
            channels=self.channels,
            num_warps=_warps(block, max(block_k, block_v), precision),
            passes=dict.fromkeys(("p_q", "p_do", "p_lse", "p_delta"), blocks),
            flops=self.batch * self.heads * self.tokens * self.extra * (4 * dk + 4 * dv),
        )
        return tuple(grad.sum(0) for grad in grads)

    def bias_gradients(self, gradients: dict) -> Tensor:
        """Return the gradient of the table of position biases, (heads, entries) float32."""
        programs = self.programs(self.heads)
        # A tile leaves out the distances that none of its queries sees a key at.
        partial = torch.zeros_like(self.float(programs, self.window.TABLE))
        group = self.heads // self.key_heads
        launch(
            bias_gradients_kernel,
            (programs,),
            **self.inputs,
            p_bias=self.table,
            **gradients,
            p_dbias=partial,
            **self.scalars,
            **self.strides,
            **self.constants,
            num_warps=self.num_warps,
            limited=False,
            passes=self.passes(["p_k", "p_v"], group),
            flops=self.flops(2 * self.channels.DK + 2 * self.channels.DV, extra=False),
        )
        return partial.unflatten(0, (self.batch, self.heads, self.tile_count)).sum((0, 2))


def _blocks(channels: int, precision: str) -> tuple[int, int]:
    """Return the tokens of a tile and of a block that it walks over: what the registers hold, in float32.

    Products in three TF32 parts take three times the operands.
    """
    if precision == "tf32x3":
        return (32 if channels <= 32 else 16), 16
    rows = max(16, (64 if precision == "tf32" else 32) * 64 // max(channels, 64))
    # NVIDIA's assembler spills a few registers with larger blocks, except on Hopper.
    here = target()
    return rows, 16 if here.backend == "cuda" and here.arch != 90 else min(rows, 32)


def _warps(rows: int, channels: int, precision: str) -> int:
    """Return the warps a program, so that a tile's operands and sums fit the registers."""
    here = target()
    if precision == "tf32x3" and channels >= 64:  # compiled for sm_120, two warps spill
        return 4 if here.arch == 120 else 2
    # AMD's warps are twice as wide, and programs of 8 have half the registers per thread.
    if rows < 64 or here.backend == "hip":
        return 4
    return 8 if channels >= 64 or here.arch == 80 else 4


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp of the scores); shapes as `na2d`."""
    if _leaves_to_reference(a):
        return reference.forward(a)
    query, value, problem = a.query, a.value, _Problem(a)
    out = value.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = problem.float(*query.shape[:-1])
    flops = problem.flops(2 * query.shape[-1] + 2 * value.shape[-1])
    boxes = problem.boxes()
    if boxes.outputs is not None:
        boxes.forward(out, lse, flops)
        return out, lse
    launch(
        forward_kernel,
        (problem.programs(problem.heads),),
        **problem.inputs,
        **problem.options,
        p_bias=problem.table,
        p_out=out,
        p_lse=lse,
        **problem.scalars,
        extra=problem.extra,
        **problem.strides,
        **problem.constants,
        num_warps=problem.num_warps,
        limited=False,
        passes=problem.passes(["p_k", "p_v"], problem.scalars["group"]),
        flops=flops,
    )
    return out, lse


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value and the three options (empty where there is none), in their dtypes."""
    if _leaves_to_reference(a):
        return reference.backward(a, gradients)
    query, key, value = a.query, a.key, a.value
    options = (a.additional_keys, a.additional_values)
    grad_out, grad_lse, out, lse = gradients
    problem = _Problem(a)
    group, dk, dv = problem.scalars["group"], query.shape[-1], value.shape[-1]
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    delta = problem.float(*query.shape[:-1])
    shared = {
        **problem.inputs,
        "p_bias": problem.table,
        **problem.scalars,
        **problem.strides,
        **problem.constants,
        "num_warps": problem.num_warps,
        "limited": False,
    }
    given = {"p_lse": lse.contiguous(), "p_do": grad_out, "p_delta": delta, "s_o": map_strides(grad_out)}
    nothing = query.new_empty(0)
    extras = (nothing if x is None else x.new_zeros(x.shape) for x in options)
    bias, grad_bias = problem.table, nothing
    boxes = problem.boxes(grad_out)
    flops = problem.flops(4 * dk + 2 * dv)
    if boxes.queries is not None:
        of_bias = boxes.query_gradients(given, out.contiguous(), grad_lse.contiguous(), grad_query, flops)
        grad_bias = nothing if of_bias is None else of_bias
    else:
        launch(
            query_gradients_kernel,
            (problem.programs(problem.heads),),
            **shared,
            **given,
            **problem.options,
            p_out=out.contiguous(),
            p_dlse=grad_lse.contiguous(),
            p_dq=grad_query,
            extra=problem.extra,
            passes=problem.passes(["p_k", "p_v"], group),
            flops=flops,
        )
        if bias is not None:
            grad_bias = problem.bias_gradients(given)
    flops = problem.flops(4 * dk + 4 * dv, extra=False)
    if boxes.keys is not None:
        boxes.key_gradients(given, grad_key, grad_value, flops)
    else:
        launch(
            key_gradients_kernel,
            (problem.programs(problem.key_heads),),
            **shared,
            **given,
            p_dk=grad_key,
            p_dv=grad_value,
            passes=problem.passes(["p_q", "p_do", "p_lse", "p_delta"], 1, inverse=True),
            flops=flops,
        )
    if problem.extra:
        grads = problem.extra_gradients(given)
        extras = (grad.to(x.dtype) for grad, x in zip(grads, options, strict=True))
    if bias is not None:
        grad_bias = grad_bias.view_as(bias).to(bias.dtype)
    return grad_query, grad_key, grad_value, *extras, grad_bias
