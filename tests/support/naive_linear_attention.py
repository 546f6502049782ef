"""Linear attention by its definition: every query weighs every key by itself, and every head is convolved apart."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import resample_map


def projected(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v (batch, height, width, dim), k with the mixer's positions."""
    q, k, v = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, dim=-1)
    return q, k + resample_map(mixer.pos_embed.weight, x.shape[1], x.shape[2], "bilinear"), v


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, epsilon: float) -> Tensor:
    """Return ``(q k^T) v / (sum of q k^T over the keys + epsilon)`` in each head, (batch, height * width, dim)."""
    q, k, v = (each.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    scores = q @ k.transpose(-2, -1)
    return (scores @ v / (scores.sum(dim=-1, keepdim=True) + epsilon)).transpose(1, 2).flatten(2)


def convolved(x: Tensor, layer: nn.Module, heads: int = 1) -> Tensor:
    """Return the depthwise convolution of x (batch, height, width, dim), with the layer's kernels for every head."""
    padding = layer.weight.shape[-1] // 2
    parts = [
        F.conv2d(part.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=padding, groups=part.shape[-1])
        for part in x.chunk(heads, dim=-1)
    ]
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)


def turned(x: Tensor, height: int, width: int) -> Tensor:
    """Return x (tokens, dim), pairs of all its channels turned by row in the first half, by column in the second."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[1] // 2
    for cell in range(height * width):
        for pair in range(2 * count):
            angle = (cell // width if pair < count else cell % width) * 10000.0 ** -(pair % count / count)
            pairs[cell, pair] = pairs[cell, pair] * complex(math.cos(angle), math.sin(angle))
    return torch.view_as_real(pairs).flatten(1)


def turned_attention(qk: Tensor, v: Tensor, heads: int, height: int, width: int) -> Tensor:
    """Return the attended values of an image, v (cells, dim), by q and k (cells, 2 dim) that are turned as a whole."""
    q, k = qk.chunk(2, dim=-1)
    turned_q, turned_k = turned(q.clone(), height, width), turned(k.clone(), height, width)
    out = []
    for head in torch.arange(v.shape[-1]).chunk(heads):
        weights = turned_q[:, head] @ turned_k[:, head].T / len(v)
        normaliser = (q[:, head] @ k[:, head].T).mean(dim=1, keepdim=True) + 1e-6
        out.append(weights @ v[:, head] / normaliser)
    return torch.cat(out, dim=1)
