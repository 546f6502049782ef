"""A block as its two branches, and its attention in three moves: project, mix, close."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.backbones.block import Block as MapBlock
from visionmix.backbones.block import TokenBlock
from visionmix.mixers.softmax import SoftmaxAttention
from visionmix.reduction.tokens import Tokens


class Projected(NamedTuple):
    """The projections of an attention.

    Attributes:
        q: Queries, (batch, heads, tokens, head channels).
        k: Keys, likewise.
        v: Values, likewise.
        gate: Factor of the mixed values, (batch, tokens, channels), or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None


class Attended(NamedTuple):
    """The result of an attention.

    Attributes:
        x: Its output, (batch, tokens, channels).
        projected: Its projections.
        weights: Attention weights of the first queries asked for, (batch, heads, queries, tokens), or None.
    """

    x: Tensor
    projected: Projected
    weights: Tensor | None


class AttentionBlock:
    """The branches of a block, each with its norm, scale, stochastic depth and residual.

    ``attention(x)`` is ``close(x, *mix(project(open(x))))``: a method may merge or drop tokens between the moves.

    Args:
        block: The block.
        layer: Its attention, whose `qkv` has the rows of queries, keys and values, one behind the other, and of a gate.
    """

    def __init__(self, block: nn.Module, layer: nn.Module) -> None:
        self.block, self.layer = block, layer

    def open(self, x: Tensor) -> Tensor:
        """Return the tokens that the attention reads, (batch, tokens, channels)."""
        raise NotImplementedError

    def close(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """Return ``x + branch``, of the `mixed` values (batch, tokens, channels) and their gate."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return ``x + branch(x)`` of the feed-forward, (batch, tokens, channels)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Projected:
        """Return the projections of `open`'s tokens."""
        qkv, gate = self.layer.qkv(x).tensor_split([3 * x.shape[2]], dim=2)
        q, k, v = self._heads(qkv).unbind(0)
        return Projected(*self._normalised(q, k), v, self._gate(x, gate))

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys alone."""
        q, k = self._heads(self._rows(x, 0, 2 * x.shape[2])).unbind(0)
        return self._normalised(q, k)

    def values(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the values alone, and their gate."""
        v, gate = self._rows(x, 2 * x.shape[2], self.layer.qkv.out_features).tensor_split([x.shape[2]], dim=2)
        return self._heads(v).squeeze(0), self._gate(x, gate)

    def mix(
        self, projected: Projected, key_bias: Tensor | None = None, queries: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``softmax(q k^T / sqrt(head channels) + key_bias) v``, (batch, tokens, channels), and its weights.

        Args:
            projected: Of the layer.
            key_bias: Added to the logits of every query, (batch, tokens).
            queries: Number of first queries whose weights are returned.
        """
        q, k, v, _ = projected
        if self.layer.fused_attn:
            dropout = self._dropout()
            drop = dropout.p if dropout is not None and dropout.training else 0.0
            # The scale is the default one; a bias of one row is read by every query.
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_row(key_bias, q), dropout_p=drop)
            weights = attention_weights(q[:, :, :queries], k, key_bias) if queries else None
            return mixed.transpose(1, 2).flatten(2), weights
        full = attention_weights(q, k, key_bias)
        return self.mix_by(full, v), full[:, :, :queries] if queries else None

    def mix_by(self, weights: Tensor, v: Tensor) -> Tensor:
        """Return the values (batch, tokens, channels), mixed by attention weights (batch, heads, tokens, tokens)."""
        dropout = self._dropout()
        return ((weights if dropout is None else dropout(weights)) @ v).transpose(1, 2).flatten(2)

    def attention(self, x: Tensor, key_bias: Tensor | None = None, queries: int = 0) -> Attended:
        """Return ``x + branch(x)`` of the attention; see `mix` for the rest."""
        projected = self.project(self.open(x))
        mixed, weights = self.mix(projected, key_bias, queries)
        return Attended(self.close(x, mixed, projected.gate), projected, weights)

    def _dropout(self) -> nn.Dropout | None:
        return None

    def _normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def _gate(self, x: Tensor, rows: Tensor) -> Tensor | None:
        """Return the gate of tokens `x`, for which `qkv` has given the `rows` behind the values."""
        return None

    def _heads(self, rows: Tensor) -> Tensor:
        """Return rows (batch, tokens, parts * channels) as (parts, batch, heads, tokens, head channels)."""
        each = self.layer.qkv.in_features // self.layer.num_heads
        return rows.unflatten(-1, (-1, self.layer.num_heads, each)).permute(2, 0, 3, 1, 4)

    def _rows(self, x: Tensor, first: int, last: int) -> Tensor:
        qkv = self.layer.qkv
        return F.linear(x, qkv.weight[first:last], None if qkv.bias is None else qkv.bias[first:last])


class _TimmBlock(AttentionBlock):
    """timm's pre-norm ViT block with its plain attention."""

    def open(self, x: Tensor) -> Tensor:
        return self.block.norm1(x)

    def close(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        return x + self.block.drop_path1(self.block.ls1(self._branch(mixed, gate)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.block.drop_path2(self.block.ls2(self.block.mlp(self.block.norm2(x))))

    def _branch(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        mixed = self.layer.norm(mixed)
        return self.layer.proj_drop(self.layer.proj(mixed if gate is None else mixed * gate))

    def _dropout(self) -> nn.Dropout | None:
        return self.layer.attn_drop

    def _normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.q_norm(q), self.layer.k_norm(k)

    def _gate(self, x: Tensor, rows: Tensor) -> Tensor | None:
        gate = getattr(self.layer, "gate", None)  # newer versions of timm have it
        return None if gate is None else gate(x).sigmoid()


class _TimmPostBlock(_TimmBlock):
    """timm's post-norm ViT block, as Swin V2 has it."""

    def open(self, x: Tensor) -> Tensor:
        return x

    def close(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        return x + self.block.drop_path1(self.block.norm1(self._branch(mixed, gate)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.block.drop_path2(self.block.norm2(self.block.mlp(x)))


class _SoftmaxBlock(AttentionBlock):
    """This library's block of tokens with the mixer "softmax"."""

    def open(self, x: Tensor) -> Tensor:
        return self.block.norm1(x)

    def close(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        return self.block.scale1(x, self.layer.close(mixed, gate))

    def feed_forward(self, x: Tensor) -> Tensor:
        block = self.block
        return block.scale2(x, block.mlp(block.norm2(x))) if block.has_mlp else x

    def _dropout(self) -> nn.Dropout | None:
        return self.layer.dot_product.attn_drop

    def _gate(self, x: Tensor, rows: Tensor) -> Tensor | None:
        return rows if self.layer.gate else None


def attention_weights(q: Tensor, k: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """Return ``softmax(q k^T / sqrt(head channels) + key_bias)``, (batch, heads, queries, keys).

    Args:
        q: Queries, (batch, heads, queries, head channels).
        k: Keys, (batch, heads, keys, head channels).
        key_bias: Added to the logits of every query, (batch, keys).
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if key_bias is None else logits + _row(key_bias, q)).softmax(dim=-1)


def mask_bias(tokens: Tokens) -> Tensor | None:
    """Return a bias of keys, (batch, tokens), that hides what `tokens.mask` says is not there; None where all is."""
    if tokens.mask is None:
        return None
    return torch.zeros_like(tokens.x[..., 0]).masked_fill(~tokens.mask, -math.inf)


def _row(key_bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if key_bias is None else key_bias.to(q.dtype)[:, None, None, :]


def attention_block(block: nn.Module) -> AttentionBlock:
    """Return the branches of `block`.

    These are timm's pre-norm and post-norm ViT blocks with its plain attention, and this library's blocks of tokens
    with the mixer "softmax" where it needs no map.

    Raises:
        TypeError: `block` is none of these.
    """
    forward = type(block).forward
    if forward in (MapBlock.forward, TokenBlock.forward):
        return _softmax_block(block)
    if forward not in (Block.forward, ResPostBlock.forward):
        raise TypeError(
            f"blocks of class {type(block).__qualname__} cannot be reduced; those of class Block, ResPostBlock (timm) "
            f"and the plain skeleton's own (visionmix) can"
        )
    if type(block.attn).forward is not Attention.forward:
        raise TypeError(
            f"an attention of class {type(block.attn).__qualname__} cannot be reduced; timm.layers.Attention can"
        )
    return (_TimmPostBlock if forward is ResPostBlock.forward else _TimmBlock)(block, block.attn)


def check_attention(
    name: str, blocks: Sequence[nn.Module], prefix_positions: tuple[int, ...], class_token: bool = False
) -> None:
    """Refuse a model that the method `name` cannot look into.

    Args:
        name: Of the method.
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens, which must be the first of the sequence.
        class_token: Whether the method needs one.

    Raises:
        TypeError: a block has no readable attention.
        ValueError: prefix tokens are elsewhere, or there are none where one is needed.
    """
    for block in blocks:
        attention_block(block)
    if class_token and not prefix_positions:
        raise ValueError(
            f"method {name!r} scores tokens by the class token, and this model has none; take a model that has one, or "
            f"a method such as 'tome'"
        )
    if prefix_positions != tuple(range(len(prefix_positions))):
        raise ValueError(
            f"method {name!r} needs the prefix tokens first; this model has them at {prefix_positions}: build it with "
            f"prefix_tokens='first'"
        )


def _softmax_block(block: MapBlock) -> AttentionBlock:
    check_reads_tokens(block)
    if type(block.mixer) is not SoftmaxAttention or block.mixer.needs_map:
        need = "reads a map" if type(block.mixer) is SoftmaxAttention else "is not softmax attention"
        raise TypeError(
            f"a mixer of class {type(block.mixer).__qualname__} {need}, so that this reduction cannot be applied; "
            f"SoftmaxAttention without rotary and lepe can be reduced, and selective scans by method 'ssm_prune'"
        )
    return _SoftmaxBlock(block, block.mixer)


def check_reads_tokens(block: MapBlock) -> None:
    """Raise TypeError where a part of `block` beside the mixer reads the whole map."""
    parts = [getattr(block, name) for name in ("pos", "mlp") if hasattr(block, name)]
    for part in parts:
        if part is not getattr(block, "mlp", None) or getattr(part, "needs_map", False):
            raise TypeError(f"a block with a {type(part).__qualname__} reads whole maps and cannot be reduced")
