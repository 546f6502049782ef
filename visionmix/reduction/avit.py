"""Tokens that halt when they have been computed long enough."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionmix.layers import at_least_float32
from visionmix.reduction.attention import attention_block
from visionmix.reduction.methods import Method, register_method
from visionmix.reduction.tokens import Tokens
from visionmix.registry import check_finite, check_positive, is_number

_THRESHOLD = 0.99  # a token halts once its scores sum up to more
_MASKED = -1000.0  # added to the logits of halted keys, as published


@register_method("avit")
class AViT(Method):
    """Let every token halt when its halting scores, summed up over the blocks, exceed 0.99.

    After block i the token x_i has the score ``h_i = sigmoid(gate_scale x_i[0] - gate_center)``, made from its first
    channel; the last block's score is 1. A token that has halted draws no attention. The model's result is the mean of
    a token's states, ``sum h_i x_i``, the score of the block where it halts being what is missing to 1.

    Tokens that have halted are masked, not removed, so all shapes are constant; what is saved is `Tokens.mask`'s, for
    hardware that skips them. ``Tokens.state["blocks"]`` counts the blocks that each token ran, (batch, tokens). No
    parameters are added, but the model must be trained with the method: otherwise few tokens halt or all do.

    In training, ``forward_train`` adds two losses: the ponder loss, the mean over tokens of the blocks they ran and
    of the remainders, and the divergence KL(target || scores) of the blocks' mean scores, normalised, from a normal
    distribution around `target_depth` of deviation 1, which is scaled so that all but 0.02 of it lies before that
    depth. (The mean of a block's scores leaves the class token out; the published code leaves out the first image.)

    Source: A-ViT (Yin et al. 2021, arXiv 2112.07658).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens; they halt like others.
        gate_scale: Factor of the first channel.
        gate_center: Subtracted from it; published with 30 for DeiT-T and 75 for DeiT-S.
        ponder_weight: Weight of the ponder loss.
        prior_weight: Weight of the divergence from the target.
        target_depth: Number of the block, from 0, around which tokens shall halt, 1 or more; None for two thirds of the
            depth (8 of 12).
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is no number, or a block has no readable attention.
        ValueError: `gate_scale` is not above 0, a number is not finite, a weight is negative, or `target_depth` lies
            outside the model.
    """

    has_losses = True

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        ponder_weight: float = 5e-4,
        prior_weight: float = 1e-3,
        target_depth: float | None = None,
        trace_source: bool = False,
    ) -> None:
        check_positive(gate_scale=gate_scale)
        check_finite(gate_scale=gate_scale, gate_center=gate_center)
        check_finite(ponder_weight=ponder_weight, prior_weight=prior_weight, least=0)
        self.depth = len(blocks)
        self.target_depth = max(1, 2 * self.depth / 3) if target_depth is None else target_depth
        if not is_number(self.target_depth):
            raise TypeError(f"target_depth={target_depth!r}: give a number of blocks")
        if not 1 <= self.target_depth <= self.depth:
            raise ValueError(f"target_depth={target_depth!r}: give a number from 1 to {self.depth}")
        self.gate_scale, self.gate_center = float(gate_scale), float(gate_center)
        self.ponder_weight, self.prior_weight = float(ponder_weight), float(prior_weight)
        self.trace_source = trace_source
        for block in blocks:
            attention_block(block)

    def begin(self, tokens: Tokens) -> Tokens:
        zero = torch.zeros_like(tokens.x[..., 0], dtype=at_least_float32(tokens.x).dtype)
        state = {"score": zero, "remainder": zero + 1, "ponder": zero, "blocks": zero}
        state["output"] = torch.zeros_like(tokens.x)
        state["scores"] = zero.new_zeros(0)
        return tokens._replace(mask=zero == 0, state=state)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        assert tokens.mask is not None
        assert tokens.state is not None
        parts, running, state = attention_block(block), tokens.mask, tokens.state
        bias = torch.zeros_like(state["score"]).masked_fill(~running, _MASKED)
        # A token that has halted keeps its last value, for maps between the blocks.
        x = torch.where(running.unsqueeze(2), parts.feed_forward(parts.attention(tokens.x, bias).x), tokens.x)
        if index == self.depth - 1:
            score = torch.ones_like(state["score"])
        else:
            score = torch.sigmoid(at_least_float32(x[..., 0]) * self.gate_scale - self.gate_center)
        total = state["score"] + score
        goes_on = running & (total < _THRESHOLD)
        share = torch.where(goes_on, score, state["remainder"]) * running
        cells = score[:, len(tokens.prefix_positions) :]
        new = {
            "score": total,
            "remainder": torch.where(goes_on, state["remainder"] - score, state["remainder"]),
            "ponder": state["ponder"] + running + torch.where(goes_on, 0, state["remainder"]) * running,
            "blocks": state["blocks"] + running,
            "output": state["output"] + x * share.unsqueeze(2).to(x.dtype),
            "scores": torch.cat([state["scores"], cells.mean().reshape(1)]),
        }
        return tokens._replace(x=x, mask=goes_on, state=new)

    def end(self, tokens: Tokens) -> Tokens:
        assert tokens.state is not None
        return tokens._replace(x=tokens.state["output"], mask=None)

    def losses(self, model: nn.Module, images: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        assert tokens.state is not None
        scores = tokens.state["scores"]
        scores = (scores / scores.sum()).clamp(0.01, 0.99)
        depth = torch.arange(self.depth, device=scores.device)
        target = torch.exp(-0.5 * (depth - self.target_depth).square()) / math.sqrt(2 * math.pi)
        target = target * (0.98 / target[: int(self.target_depth)].sum())
        # Far from it the target is 0 in float32.
        prior = (torch.xlogy(target, target) - target * scores.log()).mean()
        return {"ponder": self.ponder_weight * tokens.state["ponder"].mean(), "prior": self.prior_weight * prior}
