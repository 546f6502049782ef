"""Softmax attention along rows, along columns, or both: axial attention."""

from typing import Any, Final

from timm.layers import use_fused_attn
from torch import Tensor, nn

from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads

_AXES = ("rows", "columns", "both")


class _LineAttention(nn.Module):
    """Multi-head softmax attention among the cells of each row: (batch, height, width, dim) to the same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # All rows of all images in one axis, so that PyTorch's fused attention takes them.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.dot_product(q, k, v, None, self.fused_attn)
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(0, (x.shape[0], x.shape[1])))


@register_mixer("axial")
class AxialAttention(nn.Module):
    """Multi-head softmax attention of every cell to those of its row, of its column, or of both.

        rows:    out = W_o softmax(q k^T * head_dim^-0.5) v  among the cells of a row,  with q, k, v = W x
        columns: the same among the cells of a column
        both:    the sum of one of each, with projections of their own

    Time and memory grow with ``height * width * (height + width)``. Blocks of rows and of columns in turns, as in the
    paper, see the whole map after two: ``mixer=dict(cycle=[dict(name="axial", axis="rows"), dict(name="axial",
    axis="columns")])``.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: Axial Transformers (Ho et al. 2019, arXiv 1912.12180).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        axis: "rows", "columns" or "both".
        qkv_bias: Whether the projections to q, k and v have biases.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `axis` is unknown.
    """

    along_rows: Final[bool]
    along_columns: Final[bool]

    def __init__(self, dim: int, num_heads: int = 3, axis: str = "both", qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if axis not in _AXES:
            raise ValueError(f"axis={axis!r} is unknown; give one of {', '.join(map(repr, _AXES))}")
        self.along_rows, self.along_columns = axis != "columns", axis != "rows"
        if self.along_rows:
            self.rows = _LineAttention(dim, num_heads, qkv_bias, **dd)
        if self.along_columns:
            self.columns = _LineAttention(dim, num_heads, qkv_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not self.along_columns:
            return self.rows(x)
        y = self.columns(x.transpose(1, 2)).transpose(1, 2)
        if self.along_rows:
            y = y + self.rows(x)
        return y
