"""Pruning without training, by the rank of tokens in the graph of attention and by their similarity."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from visionmix.layers import at_least_float32
from visionmix.reduction.attention import attention_block, attention_weights, check_attention
from visionmix.reduction.evit import schedule
from visionmix.reduction.methods import Method, chosen_layers, register_method, share_of
from visionmix.reduction.tokens import Tokens, argsorted, keep, take
from visionmix.registry import is_int

# In thirds of the model's blocks from the first to the last: how often scores are passed on.
_ITERATIONS = {"early": 30, "middle": 5, "late": 1}
_VARIANCES = (0.01, 0.7)  # of a head's scores, over their mean of 1, that count
_EARLY_TEMPERATURE = 0.5  # of the logits that variant "2022" ranks by


@register_method("zero_tprune")
class ZeroTPrune(Method):
    """Prune, after some blocks, tokens that are much like others, then those of the least importance.

    A token's importance is its page rank in the graph whose edges are the attention weights A: scores s pass along
    them, ``s = A^T s``, in each head, and are combined by the root of their mean square over the heads. They begin with
    most weight on the class token, ``1 + N / 2`` to 1 of each of N tokens. Heads whose scores, scaled to a mean of 1,
    have a variance outside [0.01, 0.7] are left out, unless all are.

    Guided by it, the `similar` tokens go of the less important half whose keys, averaged over the heads, are most like
    one of the other half's by the cosine; then the ranks of the tokens that are left are computed anew in their own
    graph, and ``int(keep_rate * N)`` of these N stay, but at least one, in their order. Nothing is trained.

    From the paper: the ranking, its number of rounds (30 in the first three of 12 blocks, 5, and 1 in the last three),
    the filter of heads, the partition by importance and pruning by similarity between two rankings. Decided here, where
    it could not be read: the variance is that of scores with a mean of 1, and the default `layers`, `keep_rates` and
    `similar` are such that 65 percent of DeiT-S's operations are left, as by the paper's settings.

    ``variant="2022"`` is the first author's early public code: no pruning by similarity; scores begin alike, pass
    along ``softmax(2 q k^T / sqrt(d))`` five times, and no head is left out.

    Source: Zero-TPrune (Wang et al. 2023, arXiv 2305.17328).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens, the class token first; they always stay.
        layers: Numbers of the blocks, from 0, after which tokens are pruned; None for the five that end 1, 3, 6, 9 and
            11 twelfths of the way.
        keep_rates: Share of the tokens that stay by importance after each of them; None for 1, 0.9, 0.8, 0.7 and 1.
        similar: Tokens that go by similarity after each of them.
        variant: "paper" or "2022".
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable attention.
        ValueError: the model has no prefix token, a rate is outside (0, 1], numbers of blocks do not fit, or `variant`
            is unknown.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        layers: Sequence[int] | None = None,
        keep_rates: Sequence[float] | None = None,
        similar: int = 13,
        variant: str = "paper",
        trace_source: bool = False,
    ) -> None:
        depth = len(blocks)
        if variant not in ("paper", "2022"):
            raise ValueError(f"variant={variant!r} is unknown; give 'paper' or '2022'")
        if not is_int(similar):
            raise TypeError(f"similar={similar!r}: give a number of tokens")
        if similar < 0:
            raise ValueError(f"similar={similar}: give 0 or more")
        if layers is None:
            layers = sorted({max(0, math.ceil(depth * part / 12) - 1) for part in (1, 3, 6, 9, 11)})
        layers = chosen_layers(layers, depth)
        if keep_rates is None:
            keep_rates = (1.0, 0.9, 0.8, 0.7, 1.0)[: len(layers)]
        self.keep_rates = schedule(keep_rates, layers, depth, "keep_rates")
        self.layers = layers
        self.similar = similar if variant == "paper" else 0
        self.variant = variant
        self.trace_source = trace_source
        self.depth = depth
        check_attention(self.name, blocks, prefix_positions, class_token=True)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts = attention_block(block)
        if index not in self.layers:
            return tokens._replace(x=parts.feed_forward(parts.attention(tokens.x).x))
        projected = parts.project(parts.open(tokens.x))
        q, k = projected.q, projected.k
        if self.variant == "2022":
            mixed, _ = parts.mix(projected)
            graph = attention_weights(q.detach() / _EARLY_TEMPERATURE, k.detach())
        else:
            weights = attention_weights(q, k)
            mixed, graph = parts.mix_by(weights, projected.v), weights.detach()
        x = parts.feed_forward(parts.close(tokens.x, mixed, projected.gate))
        kept = self._kept(at_least_float32(graph), k.detach().mean(dim=1), len(tokens.prefix_positions), index)
        tokens = tokens._replace(x=x)
        return tokens if kept.shape[1] == x.shape[1] else keep(tokens, kept, tokens.prefix_positions)

    def _kept(self, graph: Tensor, keys: Tensor, prefix: int, index: int) -> Tensor:
        """Return the tokens that stay, int64 (batch, tokens), in their order and those of the prefix first.

        Args:
            graph: (batch, heads, tokens, tokens).
            keys: (batch, tokens, features).
            prefix: Tokens that always stay.
            index: The block's number.
        """
        batch, count = keys.shape[:2]
        kept = torch.arange(count, device=keys.device).expand(batch, -1)
        similar = min(self.similar, (count - prefix) // 2)
        if similar:
            ranks = self._ranks(graph, index)[:, prefix:]
            kept = _without_similar(ranks, keys, prefix, similar)
        stay = max(1, share_of(kept.shape[1] - prefix, self.keep_rates[index]))
        if stay < kept.shape[1] - prefix:
            ranks = self._ranks(graph, index, kept if similar else None)[:, prefix:]
            best = argsorted(ranks)[:, :stay].sort(dim=1).values
            kept = torch.cat([kept[:, :prefix], kept.gather(1, prefix + best)], dim=1)
        return kept

    def _ranks(self, graph: Tensor, index: int, kept: Tensor | None = None) -> Tensor:
        """Return the tokens' importance, (batch, tokens), in a graph (batch, heads, tokens, tokens).

        With `kept`, int64 (batch, kept), that of these tokens in the graph of theirs alone.
        """
        batch, heads, _, tokens = graph.shape
        scores = graph.new_ones(batch, heads, 1, tokens)
        inside = leaves = None
        if kept is not None:
            # Of the whole graph, so that its part need not be copied: what leaves a token stays among those kept.
            inside = graph.new_zeros(batch, tokens).scatter(1, kept, 1.0)[:, None, None, :]
            leaves = inside / (graph @ inside.transpose(2, 3)).transpose(2, 3)
            tokens = kept.shape[1]
        if self.variant == "2022":
            rounds = 5
        else:
            scores = torch.cat([scores[..., :1] + tokens / 2, scores[..., 1:]], dim=3)
            part = (index + 1) / self.depth
            rounds = _ITERATIONS["early" if part <= 0.25 else "middle" if part <= 0.75 else "late"]
        if inside is not None:
            scores = scores * inside
        scores = scores / scores.sum(dim=3, keepdim=True)
        for _ in range(rounds):
            scores = scores @ graph if inside is None else ((scores * leaves) @ graph) * inside
        scores = scores.squeeze(2)
        if kept is not None:
            scores = scores.gather(2, kept.unsqueeze(1).expand(-1, heads, -1))
        squares = scores.square()
        if self.variant == "2022":
            return squares.mean(dim=1).sqrt()
        variance = (scores * tokens).var(dim=2, correction=0)
        counts = (variance >= _VARIANCES[0]) & (variance <= _VARIANCES[1])
        counts = counts | ~counts.any(dim=1, keepdim=True)
        return (squares * counts.unsqueeze(2)).sum(dim=1).sqrt()


def _without_similar(ranks: Tensor, keys: Tensor, prefix: int, similar: int) -> Tensor:
    """Return the tokens, in their order, but for the `similar` of the less important half most like the other half."""
    batch, count = ranks.shape
    ranked = prefix + argsorted(ranks)
    important, others = ranked[:, : count - count // 2], ranked[:, count - count // 2 :]
    unit = normalize(at_least_float32(keys), dim=-1)
    likeness = (take(unit, others) @ take(unit, important).transpose(1, 2)).amax(dim=2)
    gone = others.gather(1, argsorted(likeness)[:, :similar])
    leaves = torch.zeros(batch, prefix + count, dtype=torch.int64, device=keys.device).scatter(1, gone, 1)
    return argsorted(leaves, descending=False)[:, : prefix + count - similar]
