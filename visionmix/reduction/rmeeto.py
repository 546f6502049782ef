"""Merging of tokens in Vim."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionmix.reduction.matching import pair
from visionmix.reduction.methods import Method, chosen_layers, register_method
from visionmix.reduction.scans import check_scans
from visionmix.reduction.tokens import Tokens, merge
from visionmix.registry import is_int


@register_method("rmeeto")
class RMeeTo(Method):
    """Merge the `r` most similar pairs of tokens before some blocks of Vim; they keep their order.

    Similarity is the cosine of the branch that the block before has added to the tokens. Without the class token, those
    at even positions are set A, those at odd positions set B; the `r` tokens of A that are most like one of B are
    merged into it, the mean weighted by sizes. The class token goes to ``int(p (N - r) / N)``, p its place among the N
    tokens before. The published accuracies are those of models that were trained again, briefly, with the method.

    Source: R-MeeTo (Shi et al. 2024, arXiv 2412.12496).

    Args:
        blocks: The model's blocks; each needs a mixer that offers ``directions(x)`` and ``merged``, as
            `visionmix.mixers.BidirectionalMamba`.
        prefix_positions: Its class token, if any; it is never merged.
        r: Tokens to remove before each of `layers`: published with 5 for Vim-Ti and 11 for Vim-S. A block never removes
            more than half of the tokens.
        layers: Numbers of the blocks, from 0, before which tokens are merged; None for every second one from 2 on. 0 is
            refused, since no block has added anything before it.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable scans.
        ValueError: there are several prefix tokens, `r` is negative, numbers of blocks do not fit, or a mixer reads
            cells in another order than row by row.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        r: int = 5,
        layers: Sequence[int] | None = None,
        trace_source: bool = False,
    ) -> None:
        if not is_int(r):
            raise TypeError(f"r={r!r}: give a number of tokens")
        if r < 0:
            raise ValueError(f"r={r}: give 0 or more")
        self.r = r
        self.layers = chosen_layers(range(2, len(blocks), 2) if layers is None else layers, len(blocks))
        if 0 in self.layers:
            raise ValueError(f"layers={layers}: give numbers from 1 on; no block has added anything before block 0")
        self.trace_source = trace_source
        check_scans(self.name, blocks, prefix_positions)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        if index in self.layers and self.r:
            assert tokens.state is not None
            tokens = merged(tokens, tokens.state["branch"], self.r)
        branch = block.mixer.merged(*block.mixer.directions(block.norm1(tokens.x)))
        x = block.scale1(tokens.x, branch)
        if block.has_mlp:
            x = block.scale2(x, block.mlp(block.norm2(x)))
        return tokens._replace(x=x, state={"branch": branch})


def merged(tokens: Tokens, metric: Tensor, r: int) -> Tokens:
    """Return `tokens`, in their order, with the `r` pairs merged that are most similar in `metric`, (batch, tokens,
    features)."""
    count, prefix = int(tokens.x.shape[1]), tokens.prefix_positions
    r = min(r, (count - len(prefix)) // 2)
    if r <= 0:
        return tokens
    places = torch.arange(count, device=metric.device)
    cells = places
    for place in prefix:
        cells = torch.cat([places[:place], places[place + 1 :]])
    away, _, partner = pair(metric.detach().index_select(1, cells), r, 0)
    stays = torch.ones(metric.shape[0], cells.shape[0], dtype=torch.int64, device=metric.device)
    stays = stays.scatter(1, 2 * away, 0)
    target = stays.cumsum(dim=1) - 1
    target = target.scatter(1, 2 * away, target.gather(1, 2 * partner + 1))
    new = tuple(int(place * (count - r) / count) for place in prefix)
    for old, place in zip(prefix, new, strict=True):
        target = target + (target >= place)
        own = target.new_full((target.shape[0], 1), place)
        target = torch.cat([target[:, :old], own, target[:, old:]], dim=1)
    return merge(tokens, target, count - r)._replace(prefix_positions=new)
