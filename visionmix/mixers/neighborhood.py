"""Neighborhood attention, dilated and circular: every token attends to a window around itself."""

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


@torch.fx.wrap
def _pad_to(x: Tensor, least: int, value: Tensor | None) -> Tensor:
    """Return x (batch, height, width, dim) with `value` (dim,), or zeros, below and right up to `least` a side."""
    # A compiled graph pads always: a branch on the size would compile once more.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if x.shape[1] >= least and x.shape[2] >= least:
            return x
        sides = [0, 0, 0, max(0, least - x.shape[2]), 0, max(0, least - x.shape[1])]
    else:
        sides = [0, 0, 0, torch.sym_max(0, least - x.shape[2]), 0, torch.sym_max(0, least - x.shape[1])]
    padded = F.pad(x, sides)
    if value is None:
        return padded
    outside = 1.0 - F.pad(x.new_ones(1, x.shape[1], x.shape[2], 1), sides)
    return padded + outside * value.to(x.dtype)


@torch.fx.wrap
def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """Return the first `height` rows and `width` columns of x (batch, rows, columns, dim)."""
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        return x[:, :height, :width]
    # A copy, whose strides do not depend on whether the map was padded.
    return torch.narrow_copy(torch.narrow_copy(x, 1, 0, height), 2, 0, width)


class _Neighborhood(nn.Module):
    """Projections, heads and position bias around neighborhood attention: what the mixers of this file share."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        circular: bool,
        position_bias: bool,
        qkv_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.kernel_size = [kernel_size, kernel_size]
        self.dilation = [dilation, dilation]
        self.circular = circular
        # A circular window is cut off at the border; a square one is shifted, so the map must hold it.
        self.least = 1 if circular else kernel_size * dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.position_bias = None
        if position_bias:
            side = 2 * kernel_size - 1
            self.position_bias = nn.Parameter(torch.empty(num_heads, side, side, **dd))
            self.position_bias._no_weight_decay = True
            self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the position bias to what it begins as."""
        if self.position_bias is not None:
            trunc_normal_(self.position_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        # A token of zeros becomes the projection's bias.
        q, k, v = _pad_to(self.qkv(x), self.least, self.qkv.bias).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        out, _ = neighborhood_attention_op(
            q,
            k,
            v,
            self.kernel_size,
            [1, 1],
            self.dilation,
            [0, 0],
            self.scale,
            None,
            None,
            self.position_bias,
            self.circular,
        )
        return self.proj(_crop(out.flatten(3), height, width))


@register_mixer("na")
class NeighborhoodAttention(_Neighborhood):
    """Softmax attention of every token to the `kernel_size` x `kernel_size` tokens nearest to it, with a position bias.

        out = W_o softmax(q k^T * head_dim^-0.5 + bias) v  over the window,  with q, k, v = W x

    The window of a token near the border is shifted inwards, so that it always holds as many. With a dilation only
    every dilation-th row and column counts. A map smaller than ``kernel_size * dilation`` is padded by zeros at the
    bottom and on the right before the projection, so that padded tokens are attended to, with the projection's bias
    for key and value: what the published weights were trained with.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: NAT (Hassani et al. 2022, arXiv 2204.07143); dilation, DiNAT (Hassani and Shi 2022, arXiv 2209.15001).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Rows and columns of the window.
        dilation: Rows and columns from one token of the window to the next.
        position_bias: Whether a learned bias for each relative position and head is added before the softmax.
        qkv_bias: Whether the projection to q, k and v has a bias.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `kernel_size` or `dilation` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 7,
        dilation: int = 1,
        position_bias: bool = True,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation, False, position_bias, qkv_bias, device, dtype)


@register_mixer("dina")
class DilatedNeighborhoodAttention(_Neighborhood):
    """`NeighborhoodAttention` with the largest dilation that fits the map it is built for, so that windows span it.

    Shapes, source and errors are those of `NeighborhoodAttention`.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Rows and columns of the window.
        dilation: Rows and columns from one token of the window to the next; None for the largest that fits.
        grid_size: Rows and columns of the map that `dilation` is to fit.
        position_bias: Whether a learned bias for each relative position and head is added before the softmax.
        qkv_bias: Whether the projection to q, k and v has a bias.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 7,
        dilation: int | None = None,
        grid_size: tuple[int, int] = (14, 14),
        position_bias: bool = True,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dilation is None:
            dilation = max(1, min(grid_size) // max(1, kernel_size))
        super().__init__(dim, num_heads, kernel_size, dilation, False, position_bias, qkv_bias, device, dtype)


@register_mixer("circular_na")
class CircularNeighborhoodAttention(_Neighborhood):
    """Softmax attention of every token to the tokens less than ``(kernel_size + 1) / 2`` away from it.

    The window is round, and at the border cut off rather than shifted.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: CLEAR (Liu et al. 2024, arXiv 2412.16112).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Diameter of the window in tokens; an odd number.
        position_bias: Whether a learned bias for each relative position and head is added before the softmax.
        qkv_bias: Whether the projection to q, k and v has a bias.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `kernel_size` is even or below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 7,
        position_bias: bool = False,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; a round window needs an odd diameter")
        super().__init__(dim, num_heads, kernel_size, 1, True, position_bias, qkv_bias, device, dtype)
