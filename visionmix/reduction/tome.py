"""Token merging."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionmix.reduction.attention import attention_block, check_attention
from visionmix.reduction.matching import match
from visionmix.reduction.methods import Method, register_method
from visionmix.reduction.tokens import Tokens, ones
from visionmix.registry import is_int


@register_method("tome")
class ToMe(Method):
    """Merge the `r` most similar pairs of tokens in each block, between its attention and its feed-forward.

    Similarity is the cosine of the attention's keys, averaged over the heads; see `match`. A token that stands for
    several cells draws as much attention as they did: ``softmax(q k^T / sqrt(d) + log(size))``. Nothing is trained.

    Source: ToMe (Bolya et al. 2022, arXiv 2210.09461).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens; they are never merged.
        r: Tokens to remove: an int for each block; a pair (r, slope), which goes linearly from ``r * (1 - slope)`` in
            the first block to ``r * (1 + slope)`` in the last, so that -1.0 removes most in the first; or a list of one
            int per block, with 0 for blocks beyond its end. A block never removes more than half of the tokens.
        prop_attn: Whether attention is proportional to the sizes.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: `r` is none of these, or a block has no readable attention.
        ValueError: a number is negative, the slope is outside -1 to 1, or the list is longer than there are blocks.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        r: int | tuple[int, float] | list[int],
        prop_attn: bool = True,
        trace_source: bool = False,
    ) -> None:
        self.r = schedule(r, len(blocks))
        self.prop_attn = prop_attn
        self.trace_source = trace_source
        check_attention(self.name, blocks, prefix_positions)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts = attention_block(block)
        bias = tokens.size.log().squeeze(2) if self.prop_attn and tokens.size is not None else None
        attended = parts.attention(tokens.x, bias)
        tokens = tokens._replace(x=attended.x)
        if self.r[index]:
            tokens = merged(tokens, attended.projected.k.detach().mean(dim=1), self.r[index])
        return tokens._replace(x=parts.feed_forward(tokens.x))


def merged(tokens: Tokens, metric: Tensor, r: int) -> Tokens:
    """Return `tokens` with the `r` pairs merged that are most similar in `metric`, (batch, tokens, features)."""
    merge, unmerge = match(metric, r, len(tokens.prefix_positions))
    size = ones(tokens.x) if tokens.size is None else tokens.size
    x, size = merge(tokens.x, tokens.size), merge(size, mode="sum")
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    source = None if tokens.source is None else tokens.moved(unmerge(places.unsqueeze(2)).squeeze(2))
    return tokens._replace(x=x, size=size, source=source)


def schedule(r: int | tuple[int, float] | list[int], depth: int) -> tuple[int, ...]:
    """Return how many tokens each of `depth` blocks removes; see `ToMe` for `r` and what is raised."""
    if isinstance(r, list) and len(r) == 2 and isinstance(r[1], float):
        r = (r[0], r[1])  # as YAML and JSON write a pair; a number of tokens is no float
    if isinstance(r, tuple) and len(r) == 2 and is_int(r[0]) and isinstance(r[1], int | float):
        r, slope = r
        if r < 0 or not -1 <= slope <= 1:
            raise ValueError(f"r=({r}, {slope}): give a number of tokens of at least 0 and a slope from -1 to 1")
        first = int(r * (1.0 - slope))
        grow = (2 * r - first - first) / max(depth - 1, 1)
        return tuple(int(first + grow * index) for index in range(depth))
    if not is_int(r) and not (isinstance(r, list) and all(is_int(value) for value in r)):
        raise TypeError(f"r={r!r}: give an int, a pair (int, slope) or a list of one int per block")
    amounts = list(r) if isinstance(r, list) else [r] * depth
    if len(amounts) > depth:
        raise ValueError(f"r={r} has {len(amounts)} entries and the model {depth} blocks; give at most one per block")
    if min(amounts, default=0) < 0:
        raise ValueError(f"r={r}: a block cannot remove a negative number of tokens; give 0 or more")
    return (*amounts, *[0] * (depth - len(amounts)))
