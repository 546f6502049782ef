"""Pruning of tokens by learned predictors."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.fx
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import at_least_float32
from visionmix.reduction.attention import attention_block, check_attention
from visionmix.reduction.evit import schedule
from visionmix.reduction.methods import Method, chosen_layers, quarters, register_method, share_of
from visionmix.reduction.tokens import Tokens, argsorted, keep
from visionmix.registry import check_finite, is_number, nearest

_EPS = 1e-6  # of sums of attention weights in training, as published


@register_method("dynamicvit")
class DynamicViT(Method, nn.Module):
    """Keep the tokens that a small predictor finds worth keeping, before some blocks.

    The predictor makes of each token x, with z = gelu(W norm(x)), the logits of keeping and dropping it,

        p = log_softmax(mlp([first half of z, mean over tokens of the second half of z]))

    Of the N tokens that the image had at first, ``int(rate * N)`` with the highest logits stay, but at least one, in
    falling order. In training all stay: decisions are drawn (Gumbel softmax, straight through), and a dropped token is
    seen by itself alone.

    The predictors are parameters of the method, the reduced model's ``reduction.predictors``, and must be trained. In
    training, ``forward_train`` adds the squared difference between the share of tokens that each predictor keeps and
    its rate, and, with a `teacher`, the divergence KL(teacher || student) of the logits and the mean squared distance
    of the tokens that are left from the teacher's.

    Source: DynamicViT (Rao et al. 2021, arXiv 2106.02034).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens; they always stay.
        keep_rate: Share of the tokens that stay at the first predictor, whose powers are those of the others; or a list
            of the shares of the first number of tokens, falling.
        layers: Numbers of the blocks, from 0, before which tokens are dropped; None for those a quarter, a half and
            three quarters of the way (3, 6, 9 of 12).
        teacher: A `VisionTransformer` of timm of the same width, tokens and classes, for the distillation losses, or
            the name of one, whose published weights are fetched at the first training step. It is no part of the model,
            and goes to the device of the images.
        ratio_weight: Weight of the loss of shares.
        distill_weight: Weight of each of both distillation losses.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable attention.
        ValueError: a rate is outside (0, 1], a weight is negative, numbers of blocks do not fit, or timm has no model
            of the teacher's name.
    """

    has_losses = True

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        keep_rate: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        teacher: str | nn.Module | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        trace_source: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        depth = len(blocks)
        self.layers = chosen_layers(quarters(depth) if layers is None else layers, depth)
        if is_number(keep_rate):
            keep_rate = [keep_rate ** (stage + 1) for stage in range(len(self.layers))]
        rates = schedule(keep_rate, self.layers, depth)
        self.keep_rate = [rates[layer] for layer in self.layers]
        check_finite(ratio_weight=ratio_weight, distill_weight=distill_weight, least=0)
        _check_teacher(teacher)
        self.ratio_weight, self.distill_weight = float(ratio_weight), float(distill_weight)
        self.__dict__["teacher"] = teacher  # not by setattr, which would make it a part of the model
        self.trace_source = trace_source
        check_attention(self.name, blocks, prefix_positions)
        qkv = attention_block(blocks[0]).layer.qkv
        like = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
        self.predictors = nn.ModuleList(Predictor(qkv.in_features, **like) for _ in self.layers)

    def cut(self, count: int) -> "DynamicViT":
        left = [stage for stage, layer in enumerate(self.layers) if layer < count]
        self.layers, self.keep_rate = [self.layers[each] for each in left], [self.keep_rate[each] for each in left]
        self.predictors = nn.ModuleList(self.predictors[each] for each in left)
        return self

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        if index in self.layers:
            stage, prefix = self.layers.index(index), len(tokens.prefix_positions)
            count = _share(tokens.grid[0] * tokens.grid[1], self.keep_rate[stage])
            scores = self.predictors[stage](tokens.x[:, prefix:])[..., 0].detach()
            best = argsorted(scores)[:, :count]
            places = torch.arange(prefix, device=best.device).expand(best.shape[0], -1)
            tokens = keep(tokens, torch.cat([places, prefix + best], dim=1), tokens.prefix_positions)
        parts = attention_block(block)
        return tokens._replace(x=parts.feed_forward(parts.attention(tokens.x).x))

    def train_step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts, state, prefix = attention_block(block), dict(tokens.state or {}), len(tokens.prefix_positions)
        if index in self.layers:
            stage = self.layers.index(index)
            before = state.get("stays", torch.ones_like(tokens.x[:, prefix:, 0]))
            logits = self.predictors[stage](tokens.x[:, prefix:], before)
            state["stays"] = before * F.gumbel_softmax(logits, hard=True)[..., 0]
            state[f"share_{stage}"] = state["stays"].mean(dim=1)
        if "stays" not in state:
            return tokens._replace(x=parts.feed_forward(parts.attention(tokens.x).x))
        projected = parts.project(parts.open(tokens.x))
        stays = F.pad(state["stays"], [prefix, 0], value=1.0)
        mixed = parts.mix_by(_masked_weights(projected.q, projected.k, stays), projected.v)
        x = parts.feed_forward(parts.close(tokens.x, mixed, projected.gate))
        return tokens._replace(x=x, state=state)

    def losses(self, model: Any, images: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        state = tokens.state
        if state is None or not self.predictors:
            return {}
        shares = [(state[f"share_{stage}"] - rate).square().mean() for stage, rate in enumerate(self.keep_rate)]
        found = {"ratio": self.ratio_weight * torch.stack(shares).mean()}
        if self.__dict__["teacher"] is None:
            return found
        teacher = self._teacher(images.device)
        prefix = len(tokens.prefix_positions)
        with torch.no_grad():
            expected = teacher.forward_features(images)
            logits = teacher.forward_head(expected)
        x = model.norm(tokens.x)
        own = model.forward_head(x).log_softmax(dim=1)
        expected = expected[:, teacher.num_prefix_tokens :]
        theirs, ours = (expected.shape[1:], logits.shape[1:]), (x[:, prefix:].shape[1:], own.shape[1:])
        if theirs != ours:
            raise ValueError(
                f"teacher has {_sizes(*theirs)}, and the model {_sizes(*ours)}; give a teacher of the model's patches, "
                f"width and classes"
            )
        kept = (state["stays"].detach() > 0.5).unsqueeze(2)
        distance = (x[:, prefix:] - expected).square().mean(dim=2, keepdim=True)
        divergence = F.kl_div(own, logits.log_softmax(dim=1), reduction="batchmean", log_target=True)
        found["logits"] = self.distill_weight * divergence
        found["tokens"] = self.distill_weight * (distance * kept).sum() / kept.sum().clamp(min=1)
        return found

    def _teacher(self, device: torch.device) -> VisionTransformer:
        teacher = self.__dict__["teacher"]
        if isinstance(teacher, str):
            if "_fetched" not in self.__dict__:
                fetched = timm.create_model(teacher, pretrained=True).eval().requires_grad_(False)
                _check_teacher(fetched)
                self.__dict__["_fetched"] = fetched
            teacher = self.__dict__["_fetched"]
        return teacher.to(device)


@torch.fx.wrap  # a traced size is no number
def _share(count: int, rate: float) -> int:
    return max(1, share_of(count, rate))


class Predictor(nn.Module):
    """The logits, as a log-softmax, of keeping and dropping each token; see `DynamicViT`.

    Shapes: (batch, tokens, dim) to (batch, tokens, 2); the second argument is the weight of each token in the mean,
    (batch, tokens), or None for one each.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.fc1 = nn.Linear(dim, dim // 2, **dd)
        self.fc2 = nn.Linear(dim // 2, dim // 4, **dd)
        self.fc3 = nn.Linear(dim // 4, 2, **dd)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        own, shared = F.gelu(self.proj(self.norm(x))).chunk(2, dim=2)
        if weight is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            # An image may have dropped all its tokens: their mean is then 0. Any other sum is at least 1.
            count = weight.sum(dim=1).clamp(min=1)[:, None, None]
            mean = (shared * weight.unsqueeze(2)).sum(dim=1, keepdim=True) / count
        z = torch.cat([own, mean.expand_as(shared)], dim=2)
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(z))))).log_softmax(dim=-1)


def _masked_weights(q: Tensor, k: Tensor, stays: Tensor) -> Tensor:
    """Return attention weights (batch, heads, queries, keys) of keys times `stays` (batch, keys) and of each query's
    own."""
    logits = at_least_float32((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3))
    own = torch.eye(stays.shape[1], device=q.device, dtype=logits.dtype)
    seen = stays.to(logits.dtype)[:, None, None, :]
    weights = (logits - logits.amax(dim=3, keepdim=True)).exp() * (seen + (1 - seen) * own)
    return ((weights + _EPS / stays.shape[1]) / (weights.sum(dim=3, keepdim=True) + _EPS)).to(q.dtype)


def _sizes(tokens: tuple[int, ...], logits: tuple[int, ...]) -> str:
    return f"{tokens[0]} tokens of {tokens[1]} channels and {logits[0]} classes"


def _check_teacher(teacher: object) -> None:
    """Raise TypeError or ValueError unless `teacher` is a VisionTransformer of timm, a model's name, or None."""
    if isinstance(teacher, str):
        name = teacher.partition(".")[0]
        if not timm.is_model(name):
            raise ValueError(f"teacher={teacher!r} is no model of timm{nearest(name, timm.list_models())}")
    elif teacher is not None and not isinstance(teacher, VisionTransformer):
        raise TypeError(f"teacher is a {type(teacher).__qualname__}; give a VisionTransformer of timm, or its name")
