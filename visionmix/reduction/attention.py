"""A block as its two branches, with the attention's keys and weights in between."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from visionmix.backbones.block import Block as MapBlock
from visionmix.backbones.block import TokenBlock
from visionmix.mixers.softmax import SoftmaxAttention


class Attended(NamedTuple):
    """The result of an attention.

    Attributes:
        x: Its output, (batch, tokens, channels).
        keys: Its keys as they enter the product, (batch, heads, tokens, head channels).
        weights: Attention weights of the first queries asked for, (batch, heads, queries, tokens), or None.
    """

    x: Tensor
    keys: Tensor
    weights: Tensor | None


class AttentionBlock(NamedTuple):
    """The branches of a block, each with its norm, scale, stochastic depth and residual.

    Attributes:
        attention: ``attention(x, key_bias=None, queries=0)`` returns `Attended`, with ``x + branch(x)`` as its `x`.
        feed_forward: ``feed_forward(x)`` returns ``x + branch(x)``.
    """

    attention: Callable[..., Attended]
    feed_forward: Callable[[Tensor], Tensor]


def _timm_attention(layer: Attention, x: Tensor, key_bias: Tensor | None, queries: int) -> Attended:
    batch, tokens, _ = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = layer.q_norm(q), layer.k_norm(k)
    mixed, weights = _attend(q, k, v, key_bias, queries, layer.fused_attn, layer.attn_drop)
    mixed = layer.norm(mixed)
    gate = getattr(layer, "gate", None)  # newer versions of timm have it
    if gate is not None:
        mixed = mixed * gate(x).sigmoid()
    return Attended(layer.proj_drop(layer.proj(mixed)), k, weights)


def _softmax_mixer(mixer: SoftmaxAttention, x: Tensor, key_bias: Tensor | None, queries: int) -> Attended:
    qkv = mixer.qkv(x)
    heads = qkv[..., : 3 * mixer.dim].unflatten(-1, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)
    mixed, weights = _attend(q, k, v, key_bias, queries, mixer.fused_attn)
    return Attended(mixer.close(mixed, qkv[..., 3 * mixer.dim :] if mixer.gate else None), k, weights)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    queries: int,
    fused: bool,
    dropout: nn.Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``softmax(q k^T / sqrt(head channels) + key_bias) v``, (batch, tokens, channels), and its weights.

    Args:
        q: Queries, (batch, heads, tokens, head channels); so are `k` and `v`.
        key_bias: Added to the logits of every query, (batch, tokens).
        queries: Number of first queries whose weights are returned.
        fused: Whether PyTorch's fused attention is used.
        dropout: Of the weights.
    """
    bias = None if key_bias is None else key_bias.to(q.dtype)[:, None, None, :]
    if fused:
        drop = dropout.p if dropout is not None and dropout.training else 0.0
        # The scale is the default one; a bias of one row is read by every query.
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        weights = _weights(q[:, :, :queries], k, bias) if queries else None
    else:
        full = _weights(q, k, bias)
        mixed = (full if dropout is None else dropout(full)) @ v
        weights = full[:, :, :queries] if queries else None
    return mixed.transpose(1, 2).flatten(2), weights


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


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

    attended = partial(_timm_attention, block.attn)
    if forward is ResPostBlock.forward:
        return AttentionBlock(
            _residual(_same, attended, lambda x, y: x + block.drop_path1(block.norm1(y))),
            lambda x: x + block.drop_path2(block.norm2(block.mlp(x))),
        )
    return AttentionBlock(
        _residual(block.norm1, attended, lambda x, y: x + block.drop_path1(block.ls1(y))),
        lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
    )


def _softmax_block(block: MapBlock) -> AttentionBlock:
    check_reads_tokens(block)
    if type(block.mixer) is not SoftmaxAttention or block.mixer.needs_map:
        need = "reads a map" if type(block.mixer) is SoftmaxAttention else "is not softmax attention"
        raise TypeError(
            f"a mixer of class {type(block.mixer).__qualname__} {need}, so that this reduction cannot be applied; "
            f"SoftmaxAttention without rotary and lepe can be reduced"
        )
    return AttentionBlock(
        _residual(block.norm1, partial(_softmax_mixer, block.mixer), block.scale1),
        lambda x: block.scale2(x, block.mlp(block.norm2(x))) if block.has_mlp else x,
    )


def check_reads_tokens(block: MapBlock) -> None:
    """Raise TypeError where a part of `block` beside the mixer reads the whole map."""
    parts = [getattr(block, name) for name in ("pos", "mlp") if hasattr(block, name)]
    for part in parts:
        if part is not getattr(block, "mlp", None) or getattr(part, "needs_map", False):
            raise TypeError(f"a block with a {type(part).__qualname__} reads whole maps and cannot be reduced")


def _residual(opening: Callable, attended: Callable, closing: Callable) -> Callable[..., Attended]:
    """Return attention with a residual: ``closing(x, y)`` adds the branch's result y to x."""

    def attention(x: Tensor, key_bias: Tensor | None = None, queries: int = 0) -> Attended:
        found = attended(opening(x), key_bias, queries)
        return found._replace(x=closing(x, found.x))

    return attention


def _same(x: Tensor) -> Tensor:
    return x
