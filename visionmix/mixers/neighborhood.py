"""Neighborhood attention, dilated and circular: every token attends to a window around itself."""

from typing import Any

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionmix.graphs import may_branch_on_sizes
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
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
            None,
            None,
            self.position_bias,
            self.circular,
            key_padding,
            value_padding,
        )
        return self.proj(out.flatten(3))


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

    The window is round; at the border it is cut off rather than shifted.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: CLEAR (Liu et al. 2024, arXiv 2412.16112).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        kernel_size: Diameter of the window in tokens; an odd number.
        position_bias: Whether a learned bias for each relative position and head is added before the softmax.
        qkv_bias: Whether the projection to q, k and v has a bias.

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
        **dd: Any,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; a round window needs an odd diameter")
        super().__init__(dim, num_heads, kernel_size, 1, True, position_bias, qkv_bias, **dd)
