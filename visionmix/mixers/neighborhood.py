"""Neighborhood attention, dilated and circular: every token attends to a window around itself."""

from typing import Any, Final

import torch
import torch.fx
from timm.layers import trunc_normal_, use_fused_attn
from torch import Tensor, nn

from visionmix.graphs import may_branch_on_sizes
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads
from visionmix.mixers.window import into_windows


class _Neighborhood(nn.Module):
    """Projections, heads and position bias around neighborhood attention, shared by the mixers of this file."""

    undecayed = ("position_bias",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        circular: bool,
        position_bias: bool,
        qkv_bias: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.kernel_size = [kernel_size, kernel_size]
        self.dilation = [dilation, dilation]
        self.span = kernel_size * dilation
        self.circular = circular
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.position_bias = None
        if position_bias:
            side = 2 * kernel_size - 1
            self.position_bias = nn.Parameter(torch.empty(num_heads, side, side, **dd))
            self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the position bias from a truncated normal of deviation 0.02."""
        if self.position_bias is not None:
            trunc_normal_(self.position_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._projected(x)
        return self.proj(self._attend(x, q, k, v, None, None))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v (..., heads, channels) of x (..., dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """Return the attended values (batch, height, width, dim), with more keys and values for all cells or None."""
        # Key and value of the padding are the projection of a token of zeros. The sum is over one token or none: it
        # drops the axis, and where no cell is missing it gives zeros that nothing reads.
        padding = self.qkv(_padding(x, self.span)).sum(dim=0).unflatten(0, (3, self.num_heads, -1))
        _, key_padding, value_padding = padding.unbind(0)
        out, _ = neighborhood_attention_op(
            q,
            k,
            v,
            self.kernel_size,
            [1, 1],
            self.dilation,
            [0, 0],
            self.scale,
            keys,
            values,
            self.position_bias,
            self.circular,
            key_padding,
            value_padding,
        )
        return out.flatten(3)


@torch.fx.wrap
def _padding(x: Tensor, span: int) -> Tensor:
    """Return zeros (1, dim), or (0, dim) where the map x (batch, height, width, dim) is as large as a window's span."""
    count = 1
    if may_branch_on_sizes():
        if not torch.jit.is_tracing():
            count = int(x.shape[1] < span or x.shape[2] < span)
    return x.new_zeros([count, x.shape[3]])


@register_mixer("na")
class NeighborhoodAttention(_Neighborhood):
    """Softmax attention of every token to the `kernel_size` x `kernel_size` tokens nearest to it, with a position bias.

        out = W_o softmax(q k^T * head_dim^-0.5 + bias) v  over the window,  with q, k, v = W x

    The window of a token near the border is shifted inwards, so that it always holds the same number of tokens. With a
    dilation only every dilation-th row and column counts. A map smaller than ``kernel_size * dilation`` is padded with
    zeros at the bottom and on the right before the projection. Padded tokens are attended to, with the projection's
    bias for key and value, as when the published weights were trained.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: NAT (Hassani et al. 2022, arXiv 2204.07143); dilation, DiNAT (Hassani and Shi 2022, arXiv 2209.15001).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Rows and columns of the window.
        dilation: Rows and columns from one token of the window to the next.
        position_bias: Whether a learned bias for each relative position and head is added before the softmax.
        qkv_bias: Whether the projection to q, k and v has a bias.

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
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation, False, position_bias, qkv_bias, **dd)


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
        **dd: Any,
    ) -> None:
        if dilation is None:
            dilation = max(1, min(grid_size) // max(1, kernel_size))
        super().__init__(dim, num_heads, kernel_size, dilation, False, position_bias, qkv_bias, **dd)


@register_mixer("circular_na")
class CircularNeighborhoodAttention(_Neighborhood):
    """Softmax attention of every token to the tokens less than ``(kernel_size + 1) / 2`` away from it.

    The window is round; at the border it is cut off rather than shifted. With `down_factor` every token sees a smaller
    map too, whose keys and values are those of squares of `down_factor` cells a side, summed with learned weights, the
    same for all channels, which begin as those of the mean. Squares at the bottom and on the right that the map does
    not fill are filled with keys and values of 0.

    Shapes: (batch, height, width, dim) to the same, for every height and width. `forward_with_text` takes text beside
    the map.

    Source: CLEAR (Liu et al. 2024, arXiv 2412.16112), whose windows have the radius ``(kernel_size + 1) / 2``. Its maps
    are multiples of `down_factor`.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Diameter of the window in tokens; an odd number.
        position_bias: Whether a learned bias for each relative position and head is added before the softmax.
        qkv_bias: Whether the projection to q, k and v has a bias.
        down_factor: Rows and columns of cells that a cell of the smaller map stands for; None for no smaller map.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `kernel_size` is even or below 1, or `down_factor` is below 1.
    """

    down_factor: Final[int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 7,
        position_bias: bool = False,
        qkv_bias: bool = True,
        down_factor: int | None = None,
        **dd: Any,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; a round window needs an odd diameter")
        if down_factor is not None and down_factor < 1:
            raise ValueError(f"down_factor={down_factor} is too small; give 1 or more, or None for no smaller map")
        super().__init__(dim, num_heads, kernel_size, 1, True, position_bias, qkv_bias, **dd)
        self.down_factor = down_factor or 0
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.register_parameter("down_weight", None)
        if self.down_factor:
            area = self.down_factor**2
            self.down_weight = nn.Parameter(torch.full((self.down_factor, self.down_factor), 1 / area, **dd))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._projected(x)
        if self.down_factor:
            return self.proj(self._attend(x, q, k, v, self._smaller(k), self._smaller(v)))
        return self.proj(self._attend(x, q, k, v, None, None))

    @torch.jit.export
    def forward_with_text(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map and the mixed text (batch, tokens, dim).

        All cells see all of the text. The text sees itself and every cell, but not the smaller map.

        Args:
            x: The map (batch, height, width, dim).
            text: The text (batch, tokens, dim), projected as cells are.
        """
        q, k, v = self._projected(x)
        text_q, text_k, text_v = self._projected(text)
        keys, values = text_k, text_v
        if self.down_factor:
            keys, values = torch.cat([keys, self._smaller(k)], dim=1), torch.cat([values, self._smaller(v)], dim=1)
        mixed = self.proj(self._attend(x, q, k, v, keys, values))
        everything = [torch.cat([text_k, k.flatten(1, 2)], dim=1), torch.cat([text_v, v.flatten(1, 2)], dim=1)]
        heads = [each.transpose(1, 2) for each in (text_q, everything[0], everything[1])]
        y = self.dot_product(heads[0], heads[1], heads[2], None, self.fused_attn)
        return mixed, self.proj(y.transpose(1, 2).flatten(2))

    def _smaller(self, x: Tensor) -> Tensor:
        """Return keys or values (batch, height, width, heads, channels) of the smaller map, (batch, cells, ...)."""
        side, weight = self.down_factor, self.down_weight
        if weight is None:  # for torch.jit.trace, which compiles `forward_with_text` and all that stands in it
            return x.flatten(1, 2)[:, :0]
        # By way of all cells: a graph that told squares from images would be made anew where an image is one square.
        squares = into_windows(x.flatten(3), side).flatten(0, 1).unflatten(0, (-1, side * side))
        y = (squares * weight.to(x.dtype).reshape(side * side, 1)).sum(dim=1)
        return y.view(x.shape[0], -1, y.shape[1]).unflatten(-1, (self.num_heads, -1))
