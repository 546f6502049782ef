"""Token reduction written as its papers define it: token by token, one image at a time."""

import math

import torch
from torch import Tensor, nn


def merge_groups(metric: Tensor, r: int, prefix: int) -> list[list[int]]:
    """Return, for each token that is left of one image (tokens, features), the tokens that ToMe merges into it."""
    count = len(metric)
    free_even = [token for token in range(0, count, 2) if token >= prefix]
    free_odd = [token for token in range(1, count, 2) if token >= prefix]
    best = {}
    for token in free_even:
        cosines = [torch.cosine_similarity(metric[token], metric[other], dim=0).item() for other in free_odd]
        best[token] = (max(cosines), free_odd[cosines.index(max(cosines))]) if free_odd else (-math.inf, None)
    ranked = sorted(free_even, key=lambda token: -best[token][0])
    away = ranked[: min(r, (count - prefix) // 2)]
    if not away:
        return [[token] for token in range(count)]
    left = ranked[len(away) :] if prefix == 0 else [token for token in range(0, count, 2) if token not in away]
    order = left + list(range(1, count, 2))
    if prefix > 1:
        order = list(range(prefix)) + [token for token in order if token >= prefix]
    return [[token] + [gone for gone in away if best[gone][1] == token] for token in order]


def _join(members: list[list[int]], group: list[int]) -> list[int]:
    return [member for token in group for member in members[token]]


def attention(layer: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return output (tokens, channels), weights and keys (heads, tokens, ...) of timm's attention on one image."""
    heads = layer.num_heads
    q, k, v = (part.reshape(len(x), heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if size is not None:
        logits = logits + size.log()
    weights = logits.softmax(-1)
    return layer.proj(layer.norm((weights @ v).transpose(0, 1).reshape(len(x), -1))), weights, k


def tome(model: nn.Module, x: Tensor, amounts: list[int]) -> tuple[Tensor, list[list[int]]]:
    """Return the tokens of one image (tokens, channels) behind the blocks, and which first ones each is the mean of."""
    prefix = model.num_prefix_tokens
    size, members = None, [[token] for token in range(len(x))]
    for block, r in zip(model.blocks, amounts, strict=True):
        mixed, _, keys = attention(block.attn, block.norm1(x), size)
        x = x + block.ls1(mixed)
        if r:
            groups = merge_groups(keys.mean(0), r, prefix)
            old = torch.ones(len(x), dtype=x.dtype) if size is None else size
            x = torch.stack([(x[group] * old[group, None]).sum(0) / old[group].sum() for group in groups])
            size = torch.stack([old[group].sum() for group in groups])
            members = [_join(members, group) for group in groups]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, members


def evit(model: nn.Module, x: Tensor, rates: list[float], fuse: bool) -> tuple[Tensor, list[list[int]]]:
    """Return the tokens of one image (tokens, channels) behind the blocks, and which of the first each holds."""
    prefix = model.num_prefix_tokens
    members = [[token] for token in range(len(x))]
    for block, rate in zip(model.blocks, rates, strict=True):
        mixed, weights, _ = attention(block.attn, block.norm1(x), None)
        x = x + block.ls1(mixed)
        scores = weights[:, 0].mean(0)
        ranked = sorted(range(prefix, len(x)), key=lambda token: -scores[token].item())
        keep = math.ceil(rate * len(ranked))
        if keep == len(ranked):
            ranked = list(range(prefix, len(x)))
        kept, gone = list(range(prefix)) + ranked[:keep], ranked[keep:]
        fused = [sum(scores[token] * x[token] for token in gone)] if fuse and gone else []
        x = torch.stack([*x[kept], *fused])
        members = [members[token] for token in kept] + [_join(members, gone) for _ in fused]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, members
