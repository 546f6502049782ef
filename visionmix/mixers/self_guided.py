"""Attention that weighs the cells of a map, and attention that merges those of little weight: SG-Former's mixers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import LayerNorm, use_fused_attn
from torch import Tensor, nn

from visionmix.layers import pad
from visionmix.layers.maps import channels_first
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads
from visionmix.mixers.window import into_windows, out_of_windows
from visionmix.scans.cells import numbered

# Which quarters of the ranked cells each part takes, by the number of parts.
_QUARTERS = {0: (), 1: (4,), 2: (2, 2), 3: (1, 2, 1), 4: (1, 1, 1, 1)}


class _LocallyEnhanced(nn.Module):
    """The end of both mixers, ``W_o (y + depthwise3x3(W_l x))``, from the attended values y and the input x."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.lepe_linear = nn.Linear(dim, dim, **dd)
        self.lepe_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _project(self, y: Tensor, x: Tensor) -> Tensor:
        local = self.lepe_conv(self.lepe_linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(y + local)


@register_mixer("hybrid_scale")
class HybridScaleAttention(_LocallyEnhanced):
    """Softmax attention at two scales, which also returns how much attention every cell receives.

    Half of the channels attend to the whole map at a lower resolution, half to the cells of their own window:

        p        = gelu(norm(conv(x))), with kernel and stride sr_ratio
        y_global = softmax(q_1 k_1^T * head_dim^-0.5) v_1,  q_1 = W_1 x,  k_1, v_1 = W_2 p
        y_local  = softmax(q_2 k_2^T * head_dim^-0.5) v_2 inside windows,  q_2, k_2, v_2 = W_3 x
        out      = W_o ([y_global, y_local] + depthwise3x3(W_l x))

    The significance of a cell is the mean weight, over heads and queries, of the cell of p that covers it, plus its own
    mean weight in its window.

    A map that `sr_ratio` or `window_size` does not divide is padded with zeros at the bottom and on the right: in x
    before the convolution, in q_2, k_2 and v_2 inside windows. The zeros are attended to: weights do not grow in a
    window that lies half outside, and significance stays comparable between windows.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: SG-Former (Ren et al. 2023, arXiv 2308.12216).

    Args:
        dim: Channels, an even number.
        num_heads: Number of heads. Each half of the channels has half of them or, if the number is odd, all of them at
            half the width.
        sr_ratio: Rows and columns of cells that one cell of p stands for.
        window_size: Rows and columns of a window.
        qkv_bias: Whether W_1, W_2 and W_3 have biases.

    Raises:
        ValueError: `dim` is odd, the heads do not divide their half of it, or `sr_ratio` or `window_size` is below 1.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, sr_ratio: int = 2, window_size: int = 7, qkv_bias: bool = True, **dd: Any
    ) -> None:
        heads = num_heads if num_heads % 2 else num_heads // 2
        if dim % 2 or heads < 1 or dim // 2 % heads:
            raise ValueError(
                f"num_heads={num_heads} does not suit dim={dim}: each half of the channels, {dim / 2:g}, has {heads} "
                "heads; give an even dim and heads that divide it"
            )
        for name, value in (("sr_ratio", sr_ratio), ("window_size", window_size)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        super().__init__(dim, **dd)
        self.heads = heads
        self.scale = (dim // 2 // heads) ** -0.5
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.global_q = nn.Linear(dim, dim // 2, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.global_kv = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.local_qkv = nn.Linear(dim, dim // 2 * 3, bias=qkv_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_significance(x)[0]

    def with_significance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map and the significance of its cells, (batch, height, width), without a gradient."""
        coarse, coarse_weights = self._attend_globally(x)
        fine, fine_weights = self._attend_in_windows(x)
        return self._project(torch.cat([coarse, fine], dim=-1), x), coarse_weights + fine_weights

    def _attend_globally(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, height, width, _ = x.shape
        side = self.sr_ratio
        bottom, right = (height + side - 1) // side * side - height, (width + side - 1) // side * side - width
        pooled = self.sr(channels_first(pad(x, [0, 0, 0, right, 0, bottom]))).permute(0, 2, 3, 1)
        pooled = self.act(self.norm(pooled))
        q = self.global_q(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.global_kv(pooled).flatten(1, 2).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        y = (weights @ v).transpose(1, 2).flatten(2).unflatten(1, (height, width))
        received = weights.detach().mean(dim=[1, 2]).unflatten(1, (pooled.shape[1], pooled.shape[2]))
        return y, _enlarged(received, height, width, side)

    def _attend_in_windows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, width, dim = x.shape
        side = self.window_size
        # Windows of all images share one axis, or a graph would be compiled again where an image is one window.
        cells = into_windows(self.local_qkv(x), side).flatten(0, 1)
        q, k, v = cells.reshape(-1, side * side, 3, self.heads, dim // 2 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)  # (windows, heads, queries, keys)
        y = (weights @ v).transpose(1, 2).contiguous().view(-1, dim // 2).view(batch, -1, dim // 2)
        received = weights.detach().mean(dim=[1, 2]).view(-1).view(batch, -1).unsqueeze(-1)
        return out_of_windows(y, height, width, side), out_of_windows(received, height, width, side).squeeze(-1)


@register_mixer("self_guided")
class SelfGuidedAttention(_LocallyEnhanced):
    """Softmax attention of all cells to few keys, each merged from cells of about the same significance.

    Cells are ranked by their significance, the lowest first, and the ranking is cut into parts. In a part of group size
    g, every g cells that follow in rank are merged to one, with a weight for each place in the group:

        u_j = sum over i < g of w_i x[rank g j + i] + b
        k, v = W_2 u,   q = W_1 x
        out = W_o (softmax(q k^T * head_dim^-0.5) v + depthwise3x3(W_l x))

    With three group sizes the parts are the lowest quarter, the middle half and the highest quarter of the ranking;
    with two they are its halves, with four its quarters, and with one the whole ranking. Without group sizes no cells
    are merged.

    Group sizes are the same for maps of all sizes, so larger maps have more keys. A part whose n cells do not fill
    whole groups is stretched to the s places that do: place t takes the cell of rank ``floor(t n / s)``. Some cells
    then stand in two places in a row, and every key is merged from a whole group. In a map of few cells a part may be
    empty, and makes no key.

    The call's second argument is the significance (batch, height, width), as `HybridScaleAttention` gives it; without
    it, cells are ranked by the length of x. It has no gradient.

    The published code ranks a row-major copy of the map for half of the heads and a column-major one for the others:
    these rankings differ only among cells whose significance is the same to the last bit.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: SG-Former (Ren et al. 2023, arXiv 2308.12216).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        group_sizes: Cells that are merged in each part, from the lowest ranks up; at most four numbers.
        qkv_bias: Whether W_1 and W_2 have biases.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `group_sizes` has more than four numbers or one below 1.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, group_sizes: Sequence[int] = (49, 14, 7), qkv_bias: bool = True, **dd: Any
    ) -> None:
        check_heads(dim, num_heads)
        if len(group_sizes) not in _QUARTERS or min(group_sizes, default=1) < 1:
            raise ValueError(f"group_sizes={group_sizes!r} do not fit; give at most four numbers, each 1 or more")
        super().__init__(dim, **dd)
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.group_sizes = list(group_sizes)
        self.quarters = list(_QUARTERS[len(group_sizes)])
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.merges = nn.ModuleList(nn.Linear(size, 1, **dd) for size in group_sizes)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)

    def forward(self, x: Tensor, significance: Tensor | None = None) -> Tensor:
        _, height, width, _ = x.shape
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys = self._merged(x.flatten(1, 2), significance)
        k, v = self.kv(keys).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.dot_product(q, k, v, None, self.fused_attn).transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self._project(y, x)

    def _merged(self, tokens: Tensor, significance: Tensor | None) -> Tensor:
        """Return the merged cells (batch, keys, dim), to be projected to k and v, of all cells (batch, cells, dim)."""
        if len(self.merges) == 0:
            return tokens
        batch, _, dim = tokens.shape
        if significance is None:
            significance = torch.linalg.vector_norm(tokens.detach(), dim=-1)
        ranking = significance.flatten(1).argsort(dim=1)
        merged = torch.jit.annotate(list[Tensor], [])
        begin = 0
        for index, merge in enumerate(self.merges):
            size, end = self.group_sizes[index], begin + self.quarters[index]
            cells = ranking.index_select(1, _ranks(tokens, begin, end, size)).unsqueeze(-1)
            # Groups of all images in one axis: a graph exported where an image has one group would serve no more.
            taken = tokens.gather(1, cells.expand(-1, -1, dim))
            count = taken.shape[1] // size
            keys = merge(_regrouped(taken, batch * count, size).transpose(1, 2)).squeeze(-1)
            merged.append(_regrouped(keys.unsqueeze(1), batch, count))
            begin = end
        return torch.cat(merged, dim=1)


@torch.fx.wrap
def _enlarged(x: Tensor, height: int, width: int, side: int) -> Tensor:
    """Return x (batch, rows, columns) with side x side cells for each of its cells, cut to (batch, height, width)."""
    # By index: a slice of a repeated map would compile one graph for sizes that `side` divides and another for the
    # rest.
    row, column = numbered(height, x), numbered(width, x)
    return x.index_select(1, row // side).index_select(2, column // side)


@torch.fx.wrap
def _regrouped(x: Tensor, count: int, size: int) -> Tensor:
    """Return contiguous x (images, rows, dim) as (count, size, dim)."""
    dim = x.shape[2]
    if torch.jit.is_scripting():
        return x.view(count, size, dim)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # Strides alone: SymPy takes ten seconds over each index that Inductor makes of a view whose sizes are symbols.
        return x.as_strided((count, size, dim), (size * dim, dim, 1))
    return x.view(-1).view(count, size, dim)


@torch.fx.wrap
def _ranks(tokens: Tensor, begin: int, end: int, size: int) -> Tensor:
    """Return the ranks that fill the groups of the part from quarter `begin` to quarter `end`, int64."""
    cells = tokens.shape[1]
    first, count = cells * begin // 4, cells * end // 4 - cells * begin // 4
    places = (count + size - 1) // size * size
    return first + numbered(places, tokens) * count // places
