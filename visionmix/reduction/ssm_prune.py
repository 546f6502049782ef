"""Pruning of tokens in state-space models, whose states cross the places of dropped tokens."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from visionmix.reduction.evit import schedule
from visionmix.reduction.methods import Method, register_method, share_of
from visionmix.reduction.scans import check_map_scans, check_scans, scans_sequences
from visionmix.reduction.tokens import Tokens, argsorted, take
from visionmix.reduction.tokens import keep as keep_tokens


@register_method("ssm_prune")
class SSMPrune(Method):
    """After some blocks, keep the tokens with the largest scan outputs; states still cross the gaps.

    A token's score is the sum over the scans and their channels of ``max(0, y)``, y the scan's output at that token, in
    Vim the gated one. Of N tokens besides the class token, ``ceil(keep_rate * N)`` with the highest scores stay, in
    their order. From there on tokens are read in the orders of the whole sequence or map, with the class token in its
    own place. On its way from one token to the next the state decays once for every place between them, by
    ``exp(softplus(b) A)``, as a token of zeros there would make it. Nothing is trained, but the published accuracies
    are those of models trained with the method.

    In PlainMamba and VMamba, whose scans read a map, convolutions see the map with zeros in the places of dropped
    tokens. In VMamba a stage ends with the whole map, dropped tokens with their last values, and the next one begins
    with all of its own. PlainMamba's published scan takes x in an order, and the rest in raster order
    (`visionmix.mixers.PlainScan`, `permute`): the t-th of the tokens that are left in either.

    From the paper: the score with its clipping, and that a token's neighbourhood, traversal and decay remain those of
    the whole sequence. Decided here, where the paper is silent and only the code for Vim is public: the scores of all
    directions are added; the step of a place without a token is that of a token of zeros (its own step is no longer
    computed); Vim's convolution sees the tokens that are left, that of maps zeros between them; a head that pools
    over a map pools over the last values of all its cells; and `layers`. With ``keep_rate=0.635`` PlainMamba-L3 has
    41.5 % fewer operations at 224 pixels; the paper's has 41.6 %.

    Source: Zhan et al. 2024, Exploring Token Pruning in Vision State Space Models (arXiv 2409.18962).

    Args:
        blocks: The model's blocks; each needs a mixer that offers ``directions(x, positions)`` and ``merged``, as
            `visionmix.mixers.BidirectionalMamba`, or on maps, from the first that prunes to its stage's end,
            ``scan_kept`` and ``close``, as `visionmix.mixers.PlainScan` and `CrossScan`.
        prefix_positions: Its class token, if any; it always stays.
        keep_rate: Share of the tokens that stay after each of `layers`; or a list with one for each of them or, where
            `layers` is not given, one per block.
        layers: Numbers of the blocks, from 0 through all stages, that prune; None for those that end 5, 10 and 15
            twenty-fourths of the way, which are 4, 9 and 14 of Vim's 24, in a model of several stages of each stage's.
        align: Whether states cross the gaps; otherwise the tokens that are left form a sequence of their own, with the
            class token in its middle.
        released: Whether to do what the published code does, which differs from its paper: no alignment; the score is
            the plain sum over channels of the backward scan alone, read from the sequence's end, so that tokens are
            scored by those opposite; the number of tokens that stay, the class token included, is odd; and the class
            token is looked for in the middle of all tokens, so that after the first pruning, where the number of cells
            is odd, the token after it is taken for it. (It keeps the class token in the first image of a batch only;
            here it stays in all.)
        trace_source: Whether every pass follows which token holds which cell.
        depths: Numbers of blocks of the model's stages; None for one stage.

    Raises:
        TypeError: an option is of another type, or a block has no readable scans.
        ValueError: there are several prefix tokens, a rate is outside (0, 1], numbers of blocks do not fit, a mixer
            reads cells in another order than row by row, or `released` is asked for with scans of maps.
    """

    knows_stages = True

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        keep_rate: float | Sequence[float] = 0.8,
        layers: Sequence[int] | None = None,
        align: bool = True,
        released: bool = False,
        trace_source: bool = False,
        depths: Sequence[int] | None = None,
    ) -> None:
        depths = [len(blocks)] if depths is None else list(depths)
        firsts = [0, *accumulate(depths[:-1])]
        if layers is None and isinstance(keep_rate, int | float):
            places = {(first, depth, part) for first, depth in zip(firsts, depths, strict=True) for part in (5, 10, 15)}
            layers = sorted({first + max(0, depth * part // 24 - 1) for first, depth, part in places})
        self.keep_rate = schedule(keep_rate, layers, len(blocks))
        self.align = align and not released
        self.released = released
        self.trace_source = trace_source
        self._of_maps = not prefix_positions and not any(map(scans_sequences, blocks))
        if not self._of_maps:
            check_scans(self.name, blocks, prefix_positions)
            return
        if released:
            raise ValueError("released=True does what the published code does, which is for Vim alone; leave it out")
        for first, depth in zip(firsts, depths, strict=True):
            prunes = (index for index in range(first, first + depth) if self.keep_rate[index] < 1)
            check_map_scans(self.name, blocks[next(prunes, first + depth) : first + depth])

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        return (self._map_step if self._of_maps else self._sequence_step)(block, tokens, index)

    def _map_step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        count = tokens.x.shape[1]
        keep, kept = self._kept(self.keep_rate[index], count), tokens.position
        if kept is None:
            if keep >= count:
                return tokens._replace(x=block(tokens.x.unflatten(1, tokens.grid)).flatten(1, 2))
            kept = torch.arange(count, device=tokens.x.device).expand(len(tokens.x), -1)
        x = tokens.x.unsqueeze(1)  # a map of one row, for layers that know maps
        merge = "none" if keep < count else None
        y, z = block.mixer.scan_kept(block.norm1(x).squeeze(1), kept, tokens.grid, self.align, merge)
        scores = None
        if keep < count:
            scores, y = y.detach().clamp(min=0).sum(dim=(2, 3)), y.sum(dim=2)
        x = block.scale1(x, block.mixer.close(y, z).unsqueeze(1))
        if block.has_mlp:
            x = block.scale2(x, block.mlp(block.norm2(x)))
        tokens = tokens._replace(x=x.squeeze(1))
        return tokens if scores is None else pruned(tokens, scores, keep)

    def _sequence_step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        x, order = block.norm1(tokens.x), None
        if self.align and tokens.position is not None:
            # All but the class token are in their order already; it stands where heads look for it.
            order = tokens.position.argsort(dim=1)
            forward, backward = block.mixer.directions(take(x, order), tokens.position.gather(1, order))
        else:
            forward, backward = block.mixer.directions(x)
        mixed = block.mixer.merged(forward, backward)
        back = None if order is None else order.argsort(dim=1)
        x = block.scale1(tokens.x, mixed if back is None else take(mixed, back))
        if block.has_mlp:
            x = block.scale2(x, block.mlp(block.norm2(x)))
        tokens = tokens._replace(x=x)
        count = x.shape[1] - len(tokens.prefix_positions)
        keep = self._kept(self.keep_rate[index], count)
        if keep >= count:
            return tokens
        scores = self._scores(forward.detach(), backward.detach())
        if self.released:
            middle = tuple(x.shape[1] // 2 if place else 0 for place in tokens.prefix_positions)
            tokens = tokens._replace(prefix_positions=middle)
        return pruned(tokens, scores if back is None else scores.gather(1, back), keep)

    def _kept(self, rate: float, count: int) -> int:
        keep = share_of(count, rate, up=True)
        return keep if rate == 1 or not self.released else max(1, keep - keep % 2)

    def _scores(self, forward: Tensor, backward: Tensor) -> Tensor:
        if self.released:
            return backward.sum(dim=2).flip(1)
        return forward.clamp(min=0).sum(dim=2) + backward.clamp(min=0).sum(dim=2)


def pruned(tokens: Tokens, scores: Tensor, keep: int) -> Tokens:
    """Return only the tokens of the `keep` highest `scores`, (batch, tokens), and the class token.

    They stay in their order, with the class token at the front if it was there and else in the middle.
    """
    batch, count, _ = tokens.x.shape
    places = torch.arange(count, device=scores.device).expand(batch, -1)
    for place in tokens.prefix_positions:
        scores = scores.masked_fill(places == place, -math.inf)
    kept = argsorted(scores)[:, :keep].sort(dim=1).values
    prefix = tuple(keep // 2 if place else 0 for place in tokens.prefix_positions)
    for place, new in zip(tokens.prefix_positions, prefix, strict=True):
        kept = torch.cat([kept[:, :new], places[:, place : place + 1], kept[:, new:]], dim=1)
    return keep_tokens(tokens._replace(position=places if tokens.position is None else tokens.position), kept, prefix)
