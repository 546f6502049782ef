"""Agent attention: a few pooled tokens that gather from all tokens, and that all tokens read."""

import math
from typing import Any, Final

import torch
import torch.fx
from timm.layers import trunc_normal_, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.graphs import may_branch_on_sizes
from visionmix.layers.grid import Grid, join_prefix, split_prefix
from visionmix.layers.half_precision import at_least_float32
from visionmix.layers.maps import pool_map
from visionmix.layers.sequence import SequenceMixer
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads

_TABLE_SIDE = 7


@register_mixer("agent")
class AgentAttention(SequenceMixer):
    """Softmax attention in two steps, through a few agents, at a cost linear in the tokens.

    With ``q, k, v = W x`` and the agents ``a = adaptive_average_pool(q)``, `num_agents` of them on a square grid, per
    head:

        gathered = softmax(a k^T * head_dim^-0.5 + B_k) v
        out      = W_o (softmax(q a^T * head_dim^-0.5 + B_q) gathered + depthwise3x3(v))

    B_k and B_q are learned biases of agent and cell: a 7x7 table resampled bilinearly to the map, plus one term per row
    and one per column, stored at the built map's size and resampled linearly to any other. Tokens that are not cells
    (class tokens) take part in both attentions, with a bias of their own, but neither in the agents nor in the
    convolution.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim), class tokens and all.

    Source: Agent Attention (Han et al. 2023, arXiv 2312.08874).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        num_agents: Number of agents, a square number.
        qkv_bias: Whether the projection to q, k and v has a bias.
        class_bias: Whether tokens that are not cells have learned biases; otherwise theirs are 0.
        grid_size: Rows and columns of the map that the biases are built for.
        attn_drop: Dropout rate of the weights of both attentions.
        proj_drop: Dropout rate of the result.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `num_agents` is not a square number.
    """

    class_bias: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        num_agents: int = 49,
        qkv_bias: bool = True,
        class_bias: bool = False,
        grid_size: tuple[int, int] = (14, 14),
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        side = math.isqrt(max(num_agents, 0))
        if num_agents < 1 or side * side != num_agents:
            raise ValueError(f"num_agents={num_agents} is not a square number; give 1, 4, 9, 16 and so on")
        self.num_heads = num_heads
        self.side = side
        self.class_bias = class_bias
        self.fused_attn = use_fused_attn()
        self.gather = DotProductAttention(attn_drop)
        self.read = DotProductAttention(attn_drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

        def bias(*sizes: int) -> nn.Parameter:
            return nn.Parameter(trunc_normal_(torch.zeros(num_heads, num_agents, *sizes, **dd), std=0.02))

        self.key_table = bias(_TABLE_SIDE, _TABLE_SIDE)
        self.key_rows, self.key_columns = bias(grid_size[0]), bias(grid_size[1])
        self.query_table = bias(_TABLE_SIDE, _TABLE_SIDE)
        self.query_rows, self.query_columns = bias(grid_size[0]), bias(grid_size[1])
        if class_bias:
            self.key_class, self.query_class = bias(1), bias(1)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim).

        Raises:
            ValueError: `grid` has lost cells, so that there is no map to pool and convolve.
        """
        if grid.indices is not None:
            raise ValueError("agent attention pools a whole map and cannot serve where cells are dropped or merged")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        cells, prefix = split_prefix(q, grid.prefix_positions)
        agents = self._heads(
            pool_map(cells.unflatten(1, (grid.height, grid.width)), self.side, self.side).flatten(1, 2)
        )
        key_bias = _cell_bias(self.key_table, self.key_rows, self.key_columns, grid.height, grid.width)
        query_bias = _cell_bias(self.query_table, self.query_rows, self.query_columns, grid.height, grid.width)
        cells, _ = split_prefix(v, grid.prefix_positions)
        local = self.conv(cells.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if len(grid.prefix_positions) > 0:
            key_prefix = key_bias.new_zeros(self.num_heads, len(grid.prefix_positions), self.side * self.side)
            query_prefix = key_prefix
            if self.class_bias:
                key_prefix = key_prefix + self.key_class.transpose(1, 2)
                query_prefix = query_prefix + self.query_class.transpose(1, 2)
            key_bias = join_prefix(key_bias, key_prefix, grid.prefix_positions)
            query_bias = join_prefix(query_bias, query_prefix, grid.prefix_positions)
            local = join_prefix(local, torch.zeros_like(prefix), grid.prefix_positions)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        gathered = self.gather(agents, k, v, key_bias.transpose(1, 2), self.fused_attn)
        out = self.read(q, agents, gathered, query_bias, self.fused_attn)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2) + local))

    def _heads(self, x: Tensor) -> Tensor:
        """Return (batch, heads, tokens, head_dim) of (batch, tokens, dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the rows' and columns' biases themselves, so that `grid_size` becomes the built size."""
        with torch.no_grad():
            for step in ("key", "query"):
                for axis, length in zip(("rows", "columns"), grid_size, strict=True):
                    bias = getattr(self, f"{step}_{axis}")
                    setattr(self, f"{step}_{axis}", nn.Parameter(_resample_line(bias, length).contiguous()))

    @torch.jit.ignore
    def fit_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a file's biases of rows or columns resampled to the built size; other tensors come back unchanged."""
        own = getattr(self, name)
        if name.endswith(("_rows", "_columns")) and tensor.ndim == 3 and tensor.shape[:2] == own.shape[:2]:
            return _resample_line(tensor, own.shape[2])
        return tensor


def _resample_line(bias: Tensor, length: int) -> Tensor:
    """Return `bias` (heads, agents, cells) resampled linearly to (heads, agents, length)."""
    if may_branch_on_sizes():
        if bias.shape[2] == length:
            return bias
    # As a map of one column: on a GPU, PyTorch's gradient of the bilinear mode is deterministic, that of the linear
    # mode is not.
    return F.interpolate(bias.unsqueeze(3), size=[length, 1], mode="bilinear").squeeze(3)


@torch.fx.wrap
def _cell_bias(table: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Return the biases (heads, cells, agents) of a map of `height` by `width` cells."""
    # In float32, whose sums along both axes took half as long as those of half precision.
    rows, columns = at_least_float32(rows), at_least_float32(columns)
    lines = _resample_line(rows, height).unsqueeze(3) + _resample_line(columns, width).unsqueeze(2)
    # In place on the resampled table, which no gradient needs.
    bias = F.interpolate(at_least_float32(table), size=[height, width], mode="bilinear").add_(lines)
    return bias.to(table.dtype).flatten(2).transpose(1, 2)
