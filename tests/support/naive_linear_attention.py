"""Linear attention by its definition: every query weighs every key by itself, and every head is convolved apart."""

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
