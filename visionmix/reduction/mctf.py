"""Merging of tokens by several criteria, with the attention computed one step ahead."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from visionmix.kernels.dispatch import full_precision
from visionmix.layers import at_least_float32
from visionmix.reduction.attention import attention_block, attention_weights, check_attention
from visionmix.reduction.methods import Method, chosen_layers, quarters, register_method, share_of
from visionmix.reduction.tokens import Tokens, argsorted, merge, ones, summed, take_heads
from visionmix.registry import check_finite, check_positive, is_int, is_number

_LEAST = 10  # tokens that merging leaves


@register_method("mctf")
class MCTF(Method):
    """Merge tokens that are similar, uninformative and small, in some blocks, before their attention.

    With tokens x, the attention m that each receives (the mean weight of its key over heads and queries) and the sizes
    s, tokens i and j attract each other by

        w_ij = ((1 + cos(x_i, x_j)) / 2)^(1 / tau_similarity) * (u_i u_j)^(1 / tau_informativeness)
               * (v_i v_j)^(1 / tau_size),    u = min(m) / m,  v = min(s) / s

    Tokens at even positions are set A, those at odd positions set B. Half of the `r` merges take tokens of A to those
    of B that attract them most, the others take tokens of B to those that are left of A; without `bidirectional` all
    go from A to B. A merged token is ``sum(m s x) / sum(m s)``. Afterwards comes what is left of A, in its order,
    then what is left of B, in falling order of attraction (in its order without `bidirectional`).

    The block's attention is not computed again for the merged tokens: the map that weighed them has its columns summed
    and its rows averaged in the same way, and mixes the values of the merged tokens. A token that stands for several
    cells draws as much attention as they did, as in ToMe.

    In training, ``forward_train`` adds the consistency loss: the squared distance of the class token's features to
    those of a pass that merges a random number of tokens, from 0 to below `r_teacher`. (The published code counts it
    only where the class is predicted with confidence, which needs labels.)

    Source: MCTF (Lee et al. 2024, arXiv 2403.10030). `"mctf"` alone has the settings of its published DeiT models.

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens; they are never merged.
        r: Tokens to remove in each of `layers`: an int, or a fraction below 1 of the tokens after the prefix. No block
            removes more than half of them, or leaves fewer than ten tokens.
        layers: Numbers of the blocks, from 0, that merge; None for all but the first.
        tau_similarity: Temperature of the similarity.
        tau_informativeness: Temperature of the attention received.
        tau_size: Temperature of the sizes.
        bidirectional: Whether half of the merges goes from B to A.
        one_step_ahead: Whether the merged map of attention is used; otherwise it is computed from the merged tokens,
            and their sizes.
        r_teacher: As `r`, the limit for the consistency loss; 0 for a teacher that merges nothing.
        consistency_weight: Weight of the consistency loss; 0 for none, and no second pass.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable attention.
        ValueError: a number is out of range, or numbers of blocks do not fit.
    """

    has_losses = True

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        r: float = 16,
        layers: Sequence[int] | None = None,
        tau_similarity: float = 1.0,
        tau_informativeness: float = 20.0,
        tau_size: float = 40.0,
        bidirectional: bool = True,
        one_step_ahead: bool = True,
        r_teacher: float = 0,
        consistency_weight: float = 1.0,
        trace_source: bool = False,
    ) -> None:
        for name, value in (("r", r), ("r_teacher", r_teacher)):
            if not is_number(value) or (value >= 1 and not (is_int(value) or value.is_integer())):
                raise TypeError(f"{name}={value!r}: give a number of tokens, or a fraction below 1")
        check_finite(r=r, r_teacher=r_teacher, consistency_weight=consistency_weight, least=0)
        check_positive(tau_similarity=tau_similarity, tau_informativeness=tau_informativeness, tau_size=tau_size)
        self.r = r
        self.layers = chosen_layers(range(1, len(blocks)) if layers is None else layers, len(blocks))
        self.tau_similarity, self.tau_informativeness, self.tau_size = tau_similarity, tau_informativeness, tau_size
        self.bidirectional = bidirectional
        self.one_step_ahead = one_step_ahead
        self.r_teacher = r_teacher
        self.consistency_weight = float(consistency_weight)
        self.trace_source = trace_source
        check_attention(self.name, blocks, prefix_positions)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts = attention_block(block)
        bias = None if tokens.size is None else tokens.size.log().squeeze(2)
        r = self._removed(tokens) if index in self.layers else 0
        if r == 0:
            x = parts.attention(tokens.x, bias).x
            return tokens._replace(x=parts.feed_forward(x))
        q, k = parts.queries_keys(parts.open(tokens.x))
        weights = attention_weights(q, k, bias)
        received = weights.detach().mean(dim=(1, 2))
        size = ones(tokens.x) if tokens.size is None else tokens.size
        share = received.unsqueeze(2) * (size / size.amax(dim=1, keepdim=True))
        target = self._target(tokens, received, r)
        tokens = merge(tokens, target, tokens.x.shape[1] - r, share)
        if not self.one_step_ahead:
            x = parts.attention(tokens.x, tokens.size.log().squeeze(2)).x
            return tokens._replace(x=parts.feed_forward(x))
        # The merged map times the values, without that map: its columns are summed, so that every key has the value of
        # the token that it is merged into, and its rows are averaged, so that the mixed values may be.
        v, gate = parts.values(parts.open(tokens.x))
        each = parts.mix_by(weights, take_heads(v, target))
        part = share / summed(share, target, v.shape[2]).gather(1, target.unsqueeze(2))
        mixed = summed(each * part.to(each.dtype), target, v.shape[2])
        return tokens._replace(x=parts.feed_forward(parts.close(tokens.x, mixed, gate)))

    def losses(self, model: nn.Module, images: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        if not self.consistency_weight:
            return {}
        teacher = copy.copy(self)
        teacher.r = self._drawn()
        with torch.no_grad():
            whole = model.run_with(teacher, images)
        distance = (model.norm(whole.x[:, 0]) - model.norm(tokens.x[:, 0])).square().mean()
        return {"consistency": self.consistency_weight * distance}

    def _drawn(self) -> float:
        if not self.r_teacher:
            return 0
        r = torch.rand(()).item() * self.r_teacher
        return r if self.r_teacher < 1 else int(r)

    def _removed(self, tokens: Tokens) -> int:
        count = tokens.x.shape[1]
        free = count - len(tokens.prefix_positions)
        r = share_of(free, self.r) if self.r < 1 else int(self.r)
        return max(0, min(r, free // 2, count - _LEAST))

    def _target(self, tokens: Tokens, received: Tensor, r: int) -> Tensor:
        """Return the new position of every token, int64 (batch, tokens)."""
        attraction = self._attraction(tokens.x.detach(), received, tokens.size)
        prefix, count = len(tokens.prefix_positions), tokens.x.shape[1]
        even, odd = (count + 1) // 2, count // 2
        attraction[:, : (prefix + 1) // 2] = -math.inf
        attraction[:, :, : prefix // 2] = -math.inf
        first = r // 2 if self.bidirectional else r
        best, partner = attraction.max(dim=2)
        ranked = argsorted(best)
        gone, stay = ranked[:, :first], ranked[:, first:]
        stay = stay.sort(dim=1).values if prefix else stay
        places = torch.arange(count, device=stay.device).expand(stay.shape[0], -1)
        target = places.new_empty(stay.shape[0], count)
        if self.bidirectional:
            left = attraction.gather(1, stay.unsqueeze(2).expand(-1, -1, odd)).transpose(1, 2)
            best, back = left.max(dim=2)
            ranked = argsorted(best)
            of_odd = places.new_empty(stay.shape[0], odd)
            of_odd = of_odd.scatter(1, ranked[:, : r - first], back.gather(1, ranked[:, : r - first]))
            of_odd = of_odd.scatter(1, ranked[:, r - first :], places[:, even - first : count - r])
        else:
            of_odd = places[:, even - first : count - r]
        of_even = places.new_empty(stay.shape[0], even).scatter(1, stay, places[:, : even - first])
        of_even = of_even.scatter(1, gone, of_odd.gather(1, partner.gather(1, gone)))
        target[:, ::2], target[:, 1::2] = of_even, of_odd
        return target

    def _attraction(self, x: Tensor, received: Tensor, size: Tensor | None) -> Tensor:
        """Return ``w_ij`` between sets A and B, (batch, tokens of A, tokens of B)."""
        with full_precision(x.device):
            unit = normalize(at_least_float32(x), dim=-1)
            cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        # Rounding takes the cosine of opposite tokens below -1.
        attraction = ((cosine + 1) / 2).clamp(min=0) ** (1 / self.tau_similarity)
        pairs = [(1 / at_least_float32(received), self.tau_informativeness)]
        if size is not None:
            pairs.append((1 / size.squeeze(2), self.tau_size))
        for value, tau in pairs:
            value = value / value.amax(dim=1, keepdim=True)
            attraction = attraction * (value[:, ::2].unsqueeze(2) * value[:, 1::2].unsqueeze(1)) ** (1 / tau)
        return attraction


@register_method("mctf_fast")
class MCTFFast(MCTF):
    """`MCTF` with the published fast setting: 35 percent of the tokens go in each of three blocks.

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens; they are never merged.
        r: Tokens to remove in each of `layers`.
        layers: Numbers of the blocks that merge; None for those a quarter, a half and three quarters of the way (3, 6,
            9 of 12).
        **options: Those of `MCTF`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        r: float = 0.35,
        layers: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            blocks, prefix_positions, r=r, layers=quarters(len(blocks)) if layers is None else layers, **options
        )
