"""Pruning of the tokens that the class token does not look at."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionmix.reduction.attention import attention_block, check_attention
from visionmix.reduction.methods import Method, chosen_layers, quarters, register_method, share_of
from visionmix.reduction.tokens import Tokens, argsorted, take
from visionmix.registry import is_number


@register_method("evit")
class EViT(Method):
    """Keep the tokens that the class token attends to most, in some blocks, between attention and feed-forward.

    A token's score is the attention weight that the class token gives it, averaged over the heads. Of the N tokens
    after the prefix, ``ceil(keep_rate * N)`` with the highest scores stay, in falling order of score (equal ones by
    position). The others are summed up, weighted by their scores, in one token at the end of the sequence, which from
    there on is a token like any other; with ``fuse=False`` they are dropped. No parameters are added, but the published
    accuracies are those of models trained with the method.

    Source: EViT (Liang et al. 2022, arXiv 2202.07800).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens, the class token first; they always stay.
        keep_rate: Share of the tokens that stay in each of `layers`; or a list with one for each of them or, where
            `layers` is not given, one per block.
        layers: Numbers of the blocks, from 0, that prune; None for those a quarter, a half and three quarters of the
            way (3, 6, 9 of 12).
        fuse: Whether the tokens that do not stay are fused into one.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable attention.
        ValueError: the model has no prefix token, a rate is outside (0, 1], or numbers of blocks do not fit.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        keep_rate: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        fuse: bool = True,
        trace_source: bool = False,
    ) -> None:
        self.keep_rate = schedule(keep_rate, layers, len(blocks))
        self.fuse = fuse
        self.trace_source = trace_source
        check_attention(self.name, blocks, prefix_positions, class_token=True)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts = attention_block(block)
        prefix = len(tokens.prefix_positions)
        rate, count = self.keep_rate[index], tokens.x.shape[1] - prefix
        keep = share_of(count, rate, up=True)
        prunes = keep < count
        attended = parts.attention(tokens.x, queries=1 if prunes else 0)
        tokens = tokens._replace(x=attended.x)
        if prunes:
            tokens = pruned(tokens, attended.weights[:, :, 0, prefix:].mean(dim=1), keep, self.fuse)
        return tokens._replace(x=parts.feed_forward(tokens.x))


def pruned(tokens: Tokens, scores: Tensor, keep: int, fuse: bool) -> Tokens:
    """Return only the prefix and the tokens of the `keep` highest `scores`, (batch, tokens after the prefix).

    With `fuse` the others' sum, weighted by their scores, comes last.
    """
    prefix = len(tokens.prefix_positions)
    batch, count = scores.shape
    ranked = argsorted(scores)
    kept, gone = ranked[:, :keep], ranked[:, keep:]
    parts = [tokens.x[:, :prefix], take(tokens.x, prefix + kept)]
    if fuse:
        weights = scores.gather(1, gone).unsqueeze(1)
        parts.append(weights.to(tokens.x.dtype) @ take(tokens.x, prefix + gone))
    if tokens.source is None:
        return tokens._replace(x=torch.cat(parts, dim=1))
    places = torch.arange(prefix, prefix + count, device=scores.device).expand(batch, -1)
    places = torch.where(places < prefix + keep, places, prefix + keep if fuse else -1)
    position = torch.cat([torch.arange(prefix, device=scores.device).expand(batch, -1), places], dim=1)
    position = position.scatter(1, prefix + ranked, places)
    rest = tokens.rest if fuse else tokens.cells()
    return tokens._replace(x=torch.cat(parts, dim=1), source=tokens.moved(position), rest=rest)


def schedule(
    keep_rate: float | Sequence[float], layers: Sequence[int] | None, depth: int, name: str = "keep_rate"
) -> tuple[float, ...]:
    """Return the share of tokens that each of `depth` blocks keeps, by an option called `name`; see `EViT`."""
    rates = [keep_rate] if isinstance(keep_rate, int | float) else keep_rate
    if not isinstance(rates, list | tuple) or not all(is_number(rate) for rate in rates):
        raise TypeError(f"{name}={keep_rate!r}: give a number, or a list of them")
    if not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"{name}={keep_rate}: a share of the tokens that stay must lie in (0, 1]")
    if layers is None and rates is keep_rate and len(rates) == depth:
        return tuple(rates)
    chosen = chosen_layers(quarters(depth) if layers is None else layers, depth)
    if rates is not keep_rate:
        rates = rates * len(chosen)
    if len(rates) != len(chosen):
        raise ValueError(
            f"{name}={keep_rate} has {len(rates)} entries; give one for each of the blocks {list(chosen)} that prune"
            + (f", or one for each of all {depth}" if layers is None else "")
        )
    rate_of = dict(zip(chosen, rates, strict=True))
    return tuple(rate_of.get(index, 1.0) for index in range(depth))
