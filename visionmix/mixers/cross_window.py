"""Attention inside the stripes of a map, vertical and horizontal ones: CSWin's mixer."""

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.mixers.registry import register_mixer


@register_mixer("cross_window")
class CrossWindowAttention(nn.Module):
    """Softmax attention inside stripes: half of the channels in vertical ones, half in horizontal ones.

    With ``q, k, v = W x``, split in halves, for each half and each stripe of it

        y   = softmax(q k^T * head_dim^-0.5) v + depthwise3x3(v)
        out = W_o [y of vertical stripes, y of horizontal stripes]

    where the convolution (LePE) sees zeros beyond the stripe. A stripe is `split_size` columns, or rows, over the whole
    height, or width. A map that stripes do not divide is padded by cells whose q, k and v are zero, half of them on
    each side; they are attended to, as in CSWin's code for segmentation.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: CSWin (Dong et al. 2021, arXiv 2107.00652).

    Args:
        dim: Channels; an even number where there are stripes.
        num_heads: Heads of both halves together; each has half of them, and at least one.
        split_size: Columns or rows of a stripe; None for attention over the whole map by all channels, as in CSWin's
            last stage.
        qkv_bias: Whether the projection to q, k and v has a bias.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: heads do not divide the channels they share, or `split_size` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        split_size: int | None = 7,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        branches = 1 if split_size is None else 2
        heads = max(num_heads // branches, 1)
        if dim % (branches * heads):
            raise ValueError(
                f"num_heads={num_heads} does not divide dim={dim}"
                + (" in two halves with half of the heads each" if branches == 2 else "")
                + "; give another number"
            )
        if split_size is not None and split_size < 1:
            raise ValueError(f"split_size={split_size} is too small; give 1 or more, or None for the whole map")
        dd = {"device": device, "dtype": dtype}
        self.branches = branches
        self.heads = heads
        self.split_size = split_size or 0
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.branches, -1))
        weight, bias = self.conv.weight.chunk(self.branches), self.conv.bias.chunk(self.branches)
        if self.branches == 1:
            y = _attend(qkv[..., 0, :], weight[0], bias[0], self.heads, height, width)
        else:
            columns = _attend(qkv[..., 0, :], weight[0], bias[0], self.heads, height, self.split_size)
            rows = _attend(qkv[..., 1, :], weight[1], bias[1], self.heads, self.split_size, width)
            y = torch.cat([columns, rows], dim=-1)
        return self.proj(y)


def _attend(qkv: Tensor, weight: Tensor, bias: Tensor, heads: int, rows: int, columns: int) -> Tensor:
    """Return what q, k and v, together (batch, height, width, 3, channels), give in windows of `rows` by `columns`."""
    batch, height, width, _, channels = qkv.shape
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    missing_rows, missing_columns = down * rows - height, across * columns - width
    top, left = missing_rows // 2, missing_columns // 2
    qkv = _pad(qkv, [top, missing_rows - top, left, missing_columns - left])
    windows = qkv.reshape(batch, down, rows, across, columns, 3, channels).transpose(2, 3)
    q, k, v = windows.reshape(-1, rows * columns, 3, heads, channels // heads).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, rows, columns, channels)
    v = v.transpose(1, 2).reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
    y = y + F.conv2d(v, weight, bias, padding=1, groups=channels).permute(0, 2, 3, 1)
    y = y.reshape(batch, down, across, rows, columns, channels).transpose(2, 3)
    return y.reshape(batch, down * rows, across * columns, channels)[:, top : top + height, left : left + width]


@torch.fx.wrap
def _pad(x: Tensor, amounts: list[int]) -> Tensor:
    """Return x (batch, height, width, 3, channels) with zeros: (above, below, on the left, on the right)."""
    above, below, left, right = amounts
    # A compiled graph pads always: a branch on the size would compile once more.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if above + below + left + right == 0:
            return x
    return F.pad(x, [0, 0, 0, 0, left, right, above, below])
