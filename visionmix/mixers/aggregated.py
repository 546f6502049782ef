"""TransNeXt's mixers: cosine attention to neighbours and a pooled map in one softmax, and to all tokens."""

import math
from typing import Any

import torch
import torch.fx
from timm.layers import LayerNorm, trunc_normal_, use_fused_attn
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from visionmix.kernels.neighborhood_attention.halves import neighborhood_scores_op, neighborhood_sums_op
from visionmix.kernels.neighborhood_attention.tables import Window
from visionmix.layers import at_least_float32, pool_map, pool_windows
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention, DotProductAttention, check_heads
from visionmix.scans.cells import numbered

_TEMPERATURE = math.log(math.expm1(1 / 0.24))  # its softplus is 1 / 0.24
_HIDDEN = 512  # of the network of position biases, as published


class LogSpacedPositionBias(nn.Module):
    """A bias for each head, query and pooled key, by a small network of their distance in rows and columns.

        bias = fc2(relu(fc1(s(d)))),  s(d) = sign(d) log2(1 + |d|) / 3,  d = 8 (query - key) / (side - 1)

    A pooled key stands in the middle of its window. Sides are those of the map of pre-training, whatever the map.

    Source: Swin's second version (Liu et al. 2021, arXiv 2111.09883); of pooled keys, TransNeXt (Shi 2023, arXiv
    2311.17132).

    Args:
        num_heads: Heads.
        grid_size: Rows and columns of the map of pre-training.
    """

    undecayed = ("fc1.weight", "fc2.weight")

    def __init__(self, num_heads: int, grid_size: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.grid_size = [max(side, 2) for side in grid_size]  # a side of one cell has no distances
        self.fc1 = nn.Linear(2, _HIDDEN, **dd)
        self.fc2 = nn.Linear(_HIDDEN, num_heads, **dd)

    def forward(self, height: int, width: int, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the biases (height * width, rows * columns, heads) of a map's cells and its pooled ones.

        They are computed on the device and in the type of `like`.
        """
        down, row = _distances(height, rows, self.grid_size[0], like)
        across, column = _distances(width, columns, self.grid_size[1], like)
        pairs = torch.stack([down.unsqueeze(1).expand(-1, across.shape[0]), across.expand(down.shape[0], -1)], dim=-1)
        biases = self.fc2(F.relu(self.fc1(pairs.to(like.dtype)))).flatten(0, 1)
        # Of (height, width, rows, columns), by an embedding, whose gradient adds up in a fixed order on a GPU too.
        place = row.unsqueeze(1).unsqueeze(3) * across.shape[0] + column.unsqueeze(1)
        return F.embedding(place.flatten(2).flatten(0, 1), biases)


@torch.fx.wrap
def _distances(length: int, bins: int, built: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-spaced distances along an axis, each once, and where that of each cell and pooled cell stands.

    Shapes: (distances,), float32 as in the published code, and (length, bins), int64.
    """
    # Twice a distance is an integer; where all windows are of one size, it is odd for all pairs, or even for all.
    step, least, count = 1, -2 * length, 4 * length  # simple expressions, for graphs of all sizes
    if _divides(bins, length):
        step, least, count = 2, 1 - length - (bins - 1) * length // bins, 2 * length - length // bins
    first, after = pool_windows(length, bins, numbered(bins, like))
    twice = 2 * numbered(length, like).unsqueeze(1) - (first + after - 1)
    distance = (numbered(count, like) * step + least).to(torch.float32) / 2
    distance = distance / (built - 1) * 8
    return distance.sign() * (distance.abs() + 1).log2() / 3, (twice - least) // step


def _divides(bins: int, length: int) -> bool:
    """Return whether `bins` divides `length`, as far as a graph knows."""
    if torch.jit.is_scripting():
        return length % bins == 0
    divides = length % bins == 0
    return bool(divides) if isinstance(divides, Tensor) else statically_known_true(divides)


@register_mixer("length_scaled_cosine")
class LengthScaledCosineAttention(Attention):
    """Cosine attention of every token to all others, at a temperature that grows with their number.

        out = W_o softmax((q' + e) k'^T * softplus(t) * log(tokens) + bias) v,  with q, k, v = W x

    q' and k' have length 1. Each head has a learned temperature t, a learned addend e of all queries and a bias of
    position by `LogSpacedPositionBias`.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: TransNeXt (Shi 2023, arXiv 2311.17132).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        grid_size: Rows and columns of the map of pre-training, in which distances are counted.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    undecayed = ("temperature", "query_embedding")

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        grid_size: tuple[int, int] = (7, 7),
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, False, None, False, **dd)
        self.needs_map = True
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, dim // num_heads, **dd))
        self.position_bias = LogSpacedPositionBias(num_heads, grid_size, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the temperatures to softplus(t) = 1 / 0.24, and draw e from a truncated normal of deviation 0.02."""
        nn.init.constant_(self.temperature, _TEMPERATURE)
        trunc_normal_(self.query_embedding, std=0.02)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = F.normalize(at_least_float32(qk), dim=-1).chunk(2, dim=2)
        length = q.new_ones([height * width]).sum().log()
        q = (q + self.query_embedding) * F.softplus(self.temperature) * length
        q = q * (q.shape[-1] ** 0.5)  # which the attention divides by
        bias = self.position_bias(height, width, height, width, v).permute(2, 0, 1).to(v.dtype)
        q, k = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2)
        return self.dot_product(q, k, v.transpose(1, 2), bias, self.fused_attn).transpose(1, 2)


@register_mixer("aggregated")
class AggregatedAttention(nn.Module):
    """Cosine attention to the 3x3 cells around a query and to a pooled map, in one softmax.

    With ``q, k, v = W x`` and ``k_p, v_p = W p`` of the pooled map ``p = norm(pool(gelu(W_p x)))``, per head:

        a_n, a_p = softmax([s k'^T + b, s k_p'^T + bias]),  s = (q' + e) * softplus(t) * log(keys)
        out      = W_o ((a_n + q' T + c) v + a_p v_p)

    q', k' and k_p' have length 1; the number of keys is that of the neighbours inside the map and of pooled cells. Each
    head has a learned temperature t, an addend e of all queries, biases b of the neighbours and a bias of pooled cells
    by `LogSpacedPositionBias`. T and c, added after the softmax, make convolution kernels that depend on the query.

    Shapes: (batch, height, width, dim) to the same, for every height and width; the pooled map has ``height //
    pool_ratio`` rows and ``width // pool_ratio`` columns, or one.

    Source: TransNeXt (Shi 2023, arXiv 2311.17132).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        pool_ratio: Cells along each side of a pooled cell's window.
        grid_size: Rows and columns of the map of pre-training, in which distances are counted.
        qkv_bias: Whether the projections to q, k and v have biases.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `pool_ratio` is below 1.
    """

    undecayed = ("temperature", "query_embedding", "local_bias")

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        pool_ratio: int = 2,
        grid_size: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if pool_ratio < 1:
            raise ValueError(f"pool_ratio={pool_ratio} is too small; give 1 or more")
        self.num_heads = num_heads
        self.pool_ratio = pool_ratio
        head_dim = dim // num_heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.key_value = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.pool_proj = nn.Linear(dim, dim, **dd)
        self.pool_norm = LayerNorm(dim, eps=1e-5, **dd)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, head_dim, **dd))
        self.local_bias = nn.Parameter(torch.empty(num_heads, 9, **dd))
        self.position_bias = LogSpacedPositionBias(num_heads, grid_size, **dd)
        self.local_tokens = nn.Parameter(torch.empty(num_heads, head_dim, 9, **dd))
        self.local_weights = nn.Parameter(torch.empty(num_heads, 9, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        # The disc of 3 is the square, cut at the border of the map.
        self.window = Window((3, 3), (1, 1), (1, 1), (0, 0), circular=True).flat()
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the temperatures to softplus(t) = 1 / 0.24 and c to 0, and draw the other parameters of heads."""
        nn.init.constant_(self.temperature, _TEMPERATURE)
        nn.init.zeros_(self.local_weights)
        trunc_normal_(self.query_embedding, std=0.02)
        trunc_normal_(self.local_tokens, std=0.02)
        trunc_normal_(self.local_bias, std=0.0004)
        nn.init.normal_(self.pool_proj.weight, std=(2 / self.pool_proj.out_features) ** 0.5)  # a 1x1 convolution's

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows, columns = _pooled(height, self.pool_ratio), _pooled(width, self.pool_ratio)
        pooled = self.pool_norm(pool_map(F.gelu(self.pool_proj(x)), rows, columns)).flatten(1, 2)
        q = _unit(self.query(x).unflatten(-1, (self.num_heads, -1)))
        k, v = self.key_value(x).unflatten(-1, (2, self.num_heads, -1)).unbind(3)
        pooled_k, pooled_v = self.key_value(pooled).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        queries = (q + self.query_embedding) * F.softplus(self.temperature) * _log_keys(height, width, rows, columns, q)
        scores = neighborhood_scores_op(queries, _unit(k), self.window, 1.0, _unit(pooled_k), None)
        bias = self.position_bias(height, width, rows, columns, x).transpose(1, 2).unflatten(0, (height, width))
        bias = torch.cat([self.local_bias.to(bias.dtype).expand(height, width, -1, -1), bias], dim=-1)
        weights = (scores + bias).softmax(dim=-1)
        added = torch.einsum("bhwnd,ndk->bhwnk", q, self.local_tokens.to(q.dtype)) + self.local_weights
        weights = torch.cat([weights[..., :9] + added, weights[..., 9:]], dim=-1)
        out = neighborhood_sums_op(weights, v, self.window, pooled_v)
        return self.proj(out.flatten(3))


def _unit(x: Tensor) -> Tensor:
    """Return x (..., dim) divided by its length, in float32 at least."""
    return F.normalize(at_least_float32(x), dim=-1)


@torch.fx.wrap
def _pooled(length: int, ratio: int) -> int:
    if torch.jit.is_scripting():
        return max(length // ratio, 1)
    pooled = length // ratio
    return pooled.clamp(min=1) if isinstance(pooled, Tensor) else torch.sym_max(pooled, 1)  # traces count by tensors


@torch.fx.wrap
def _log_keys(height: int, width: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Return the logarithm of each query's number of keys, (height, width, 1, 1), float32 as in the published code."""
    count = _neighbours(height, like).unsqueeze(1) * _neighbours(width, like) + rows * columns
    return count.to(torch.float32).log().unsqueeze(2).unsqueeze(3)


def _neighbours(length: int, like: Tensor) -> Tensor:
    """Return the number of cells next to each cell of an axis, itself among them."""
    cell = numbered(length, like)
    return 1 + (cell > 0).to(torch.int64) + (cell < length - 1).to(torch.int64)
