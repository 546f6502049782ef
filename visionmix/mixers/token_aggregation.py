"""Attention inside groups of cells with like content, and to the groups' centres: CATANet's mixer."""

from typing import Any

import torch
import torch.fx
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import at_least_float32, pool_map
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads
from visionmix.scans.cells import numbered


@register_mixer("token_aggregation")
class TokenAggregation(nn.Module):
    """Softmax attention among cells that are alike, wherever they lie, and of each cell to the centres of all kinds.

    Every cell belongs to the centre c of the largest cosine with it. Cells are sorted by their centre, those of one
    centre in row-major order, and cut into groups of `group_size`. A group attends to itself and to the next:

        q, k, v = W x,    k', v' = W' c
        a   = softmax(q k^T * head^-0.5) v, over both groups  +  softmax(q k'^T * head^-0.5) v', over all centres
        out = W_2 W_1 a

    with ``head`` the channels of a head of q. Behind the last cell the sequence goes on backwards, to the end of the
    last group but one. Assignments have no gradient.

    Centres are a buffer that training moves and evaluation reads. A training step moves them `num_iters` times to the
    mean directions of the cells, of all images, that belong to them, the last time with gradients to the cells; the
    buffer follows as a moving average. They begin at random; a first training step sets out from means of stretches of
    the cells and takes what it finds.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: CATANet (Liu et al. 2025, arXiv 2503.06896). Its code refuses maps of between one and about two groups.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim` and of `qk_dim`.
        qk_dim: Channels of q and k; None for `dim`.
        num_centers: Centres.
        group_size: Cells of a group.
        num_iters: Moves of the centres in a training step.
        momentum: Share of the old centres in the moving average.
        stable: Whether cells of one centre stay in row-major order. The published code leaves their order to PyTorch's
            sort, whose order depends on the device and may change with its version.

    Raises:
        ValueError: `num_heads` does not divide `dim` and `qk_dim`, or `num_centers`, `group_size` or `num_iters` is
            below 1.
    """

    centers: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        qk_dim: int | None = None,
        num_centers: int = 16,
        group_size: int = 128,
        num_iters: int = 5,
        momentum: float = 0.999,
        stable: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        qk_dim = dim if qk_dim is None else qk_dim
        if qk_dim < 1 or qk_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide qk_dim={qk_dim}; give a divisor of both it and dim"
            )
        for name, value in (("num_centers", num_centers), ("group_size", group_size), ("num_iters", num_iters)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        self.num_heads = num_heads
        self.group_size = group_size
        self.num_iters = num_iters
        self.momentum = momentum
        self.stable = stable
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        self.parts = [qk_dim, qk_dim, dim]
        self.qkv = nn.Linear(dim, sum(self.parts), bias=False, **dd)
        self.center_kv = nn.Linear(dim, qk_dim + dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, bias=False, **dd)
        self.out = nn.Linear(dim, dim, bias=False, **dd)
        self.register_buffer("centers", torch.empty(num_centers, dim, **dd))
        self.register_buffer("started", torch.empty((), dtype=torch.bool, device=dd.get("device")))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the centres at random, to be replaced by the first training step."""
        with torch.no_grad():
            nn.init.normal_(self.centers)
            self.started.fill_(False)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        cells = x.flatten(1, 2)
        centers = self._moved_centers(cells) if self.training else self.centers
        with torch.no_grad():
            order, rank = _orders(cells, centers, self.stable)
        q, k, v = self.qkv(cells).split(self.parts, dim=-1)
        center_k, center_v = self.center_kv(centers.to(self.center_kv.weight.dtype)).split(self.parts[1:], dim=-1)
        to_centers = self._attend(q, center_k.expand(x.shape[0], -1, -1), center_v.expand(x.shape[0], -1, -1), None)
        own, both, bias = _grouped(order, self.group_size, q)
        # By way of all cells: a graph that told groups from images would be made anew where an image is one group.
        queries = _take(q, own).flatten(0, 1).unflatten(0, (-1, self.group_size))
        keys, values = [_take(each, both).flatten(0, 1).unflatten(0, (-1, 2 * self.group_size)) for each in (k, v)]
        to_groups = self._attend(queries, keys, values, bias.unsqueeze(1).unsqueeze(1))
        to_groups = to_groups.contiguous().view(-1, x.shape[3]).view(x.shape[0], -1, x.shape[3])
        y = _take(to_groups, rank) + to_centers
        return self.out(self.proj(y)).unflatten(1, (height, width))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Return the attended values of q, k and v (batch, tokens, heads * channels), with biases of the keys."""
        q, k, v = [each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v)]
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            y = self.dot_product(q, k, v, bias, False)
        return y.transpose(1, 2).flatten(2)

    def _moved_centers(self, x: Tensor) -> Tensor:
        """Return the centres (centers, dim) for a training step on x (batch, cells, dim), and keep their average."""
        cells = F.normalize(at_least_float32(x).flatten(0, 1), dim=-1)
        old = self.centers.to(cells.dtype)
        with torch.no_grad():
            stretches = at_least_float32(pool_map(x.mean(dim=0)[None, None], 1, old.shape[0]))[0, 0]
            centers = F.normalize(torch.where(self.started, old, stretches), dim=-1)
            for _ in range(self.num_iters - 1):
                centers = _moved(cells, centers)
        centers = _moved(cells, centers)
        with torch.no_grad():
            kept = torch.where(self.started, torch.lerp(centers, old, self.momentum), centers)
            self.centers.copy_(kept)
            self.started.fill_(True)
        return centers


@torch.fx.wrap
def _moved(cells: Tensor, centers: Tensor) -> Tensor:
    """Return each centre moved to the mean direction of the cells (cells, dim) nearest to it; one of no cell stays."""
    nearest = (cells.detach() @ centers.detach().t()).argmax(dim=1)
    sums = torch.zeros_like(centers).index_add(0, nearest, cells)
    counts = torch.zeros_like(centers[:, 0]).index_add(0, nearest, torch.ones_like(cells[:, 0]))
    return torch.where(counts.unsqueeze(1) > 0, F.normalize(sums, dim=-1), centers)


@torch.fx.wrap
def _orders(cells: Tensor, centers: Tensor, stable: bool) -> tuple[Tensor, Tensor]:
    """Return the cells (batch, cells) in the order of their centres, and the place of each cell in that order."""
    directions = F.normalize(at_least_float32(centers), dim=-1)
    key, place = (at_least_float32(cells) @ directions.t()).argmax(dim=-1), numbered(cells.shape[1], cells)
    if stable:
        key = key * cells.shape[1] + place  # no two alike, so that there is one order
    order = key.argsort(dim=1)
    return order, torch.zeros_like(order).scatter(1, order, place.expand_as(order))


@torch.fx.wrap
def _grouped(order: Tensor, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells of each group and of each group and the next, all groups in a row, and biases.

    Cells are (batch, groups * size) and (batch, groups * 2 * size). The biases (batch * groups, 2 * size) are those of
    a group's keys, -inf for places behind the sequence and its reverse.
    """
    batch, cells = order.shape
    groups = (cells + size - 1) // size
    place = numbered(groups * 2 * size, order)
    place = place - place // (2 * size) * size
    bias = torch.zeros(place.shape, dtype=like.dtype, device=like.device)
    bias = bias.masked_fill(place >= 2 * cells, float("-inf")).repeat(batch).unflatten(0, (-1, 2 * size))
    own, both = _mirrored(numbered(groups * size, order), cells), _mirrored(place, cells)
    return order.index_select(1, own), order.index_select(1, both), bias


def _mirrored(place: Tensor, count: int) -> Tensor:
    """Return places in a sequence that goes on backwards behind its `count` tokens."""
    return torch.where(place < count, place, (2 * count - 1 - place).clamp(min=0))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `index` (batch, taken) of x (batch, tokens, channels)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
