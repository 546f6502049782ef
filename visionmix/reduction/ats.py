"""Sampling of tokens in proportion to their scores, as many as each image needs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionmix.layers import at_least_float32
from visionmix.reduction.attention import attention_block, attention_weights, check_attention, mask_bias
from visionmix.reduction.methods import Method, chosen_layers, register_method
from visionmix.reduction.tokens import Tokens, argsorted, keep, take, take_heads
from visionmix.registry import is_int


@register_method("ats")
class ATS(Method):
    """Sample the tokens that attend, in some blocks, evenly over the cumulative distribution of their scores.

    A token's score is the attention that the class token pays it, summed over the heads, times the length of its value,
    all heads together. Scores are normalised and sorted, the smallest first; their cumulative sum is scaled to
    [0, 1], and each of `samples` points, evenly spaced from its smallest number above 0 to 1, takes the token that lies
    nearest. A token that is taken twice stays once, so images keep different numbers: shorter sequences are padded at
    their end (`Tokens.mask`), and an image's result does not depend on the others of its batch. The tokens that stay,
    in rising order of score, attend to all tokens; the others end here. Nothing is trained.

    The published code lets padding enter the scaling of scores, so that results depend on the batch; `released` does
    the same. (It also adds 1e-6 to sums of attention weights, which is left out here.) The number of tokens depends on
    the images, so the model does not compile to one graph.

    Source: ATS (Fayyaz et al. 2021, arXiv 2111.15667).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens, the class token first; they always stay.
        layers: Numbers of the blocks, from 0, that sample; None for those from a quarter of the way on (3 to 11 of 12).
        samples: Points of the distribution, and so the most tokens that stay besides the prefix; None for one a cell,
            which is the most.
        released: Whether padding enters the scaling, as in the published code.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable attention.
        ValueError: the model has no prefix token, `samples` is below 2, or numbers of blocks do not fit.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        layers: Sequence[int] | None = None,
        samples: int | None = None,
        released: bool = False,
        trace_source: bool = False,
    ) -> None:
        depth = len(blocks)
        self.layers = chosen_layers(range(depth // 4, depth) if layers is None else layers, depth)
        if samples is not None and not is_int(samples):
            raise TypeError(f"samples={samples!r}: give a number of points, or None for one a cell")
        if samples is not None and samples < 2:
            raise ValueError(f"samples={samples}: give 2 or more")
        self.samples = samples
        self.released = released
        self.trace_source = trace_source
        check_attention(self.name, blocks, prefix_positions, class_token=True)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts = attention_block(block)
        bias = mask_bias(tokens)
        if index not in self.layers:
            return tokens._replace(x=parts.feed_forward(parts.attention(tokens.x, bias).x))
        projected = parts.project(parts.open(tokens.x))
        scores = self._scores(projected.q, projected.k, projected.v, bias)
        prefix = len(tokens.prefix_positions)
        mask = None if tokens.mask is None else tokens.mask[:, prefix:]
        order, stays = self._sampled(scores[:, prefix:].detach(), mask, tokens.grid[0] * tokens.grid[1])
        count = max(1, int(stays.any(dim=0).sum()))  # of the image that keeps most, where there is one
        places = torch.arange(prefix, device=order.device).expand(order.shape[0], -1)
        kept = torch.cat([places, prefix + order[:, :count]], dim=1)
        left = torch.cat([places >= 0, stays[:, :count]], dim=1)
        mixed, _ = parts.mix(projected._replace(q=take_heads(projected.q, kept)), bias)
        gate = None if projected.gate is None else take(projected.gate, kept)
        tokens = keep(tokens, kept, tokens.prefix_positions, left)
        return tokens._replace(x=parts.feed_forward(parts.close(tokens.x, mixed, gate)))

    def _scores(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        weights = attention_weights(q[:, :, :1], k, bias)[:, :, 0].sum(dim=1)
        return at_least_float32(weights) * at_least_float32(v).square().sum(dim=(1, 3)).sqrt()

    def _sampled(self, scores: Tensor, mask: Tensor | None, cells: int) -> tuple[Tensor, Tensor]:
        """Return the tokens, those that stay first, in rising order of `scores`, and which of these places stay.

        Args:
            scores: (batch, tokens after the prefix).
            mask: Which of these are there.
            cells: Of the map.
        """
        there = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
        scores = scores * there
        # Padding comes first, and has a place of 0 in the distribution, which no point takes.
        ranked = argsorted(torch.where(there, scores, -1.0), descending=False)
        total = (scores.gather(1, ranked) / scores.sum(dim=1, keepdim=True)).cumsum(dim=1)
        own = there.gather(1, ranked)
        least = total if self.released else total.masked_fill(~own, math.inf)
        least = least.amin(dim=1, keepdim=True)
        place = ((total - least) / (total[:, -1:] - least)).clamp(min=0)
        first = place.masked_fill(place == 0, math.inf).amin(dim=1, keepdim=True)
        points = (cells if self.samples is None else min(self.samples, cells)) - 1
        points = first + torch.arange(points + 1, device=scores.device) * (1 - first) / points
        taken = (points.unsqueeze(2) - place.unsqueeze(1)).abs().argmin(dim=2)
        stays = (torch.zeros_like(ranked).scatter(1, taken, 1) > 0) & own
        front = argsorted((~stays).to(torch.int64), descending=False)
        return ranked.gather(1, front), stays.gather(1, front)
