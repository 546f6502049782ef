"""Softmax attention over all tokens: ViT's mixer, the one that the others stand beside."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.grid import Grid
from visionmix.mixers.registry import register_mixer


@register_mixer("softmax")
class SoftmaxAttention(nn.Module):
    """Multi-head attention of every token to all: ``W_o softmax(q k^T * head_dim^-0.5) v`` with ``q, k, v = W x``.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim), class tokens and all.

    Source: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        qkv_bias: Whether the projection to q, k and v has a bias.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        tokens = x.reshape(batch, height * width, dim)
        return self.forward_tokens(tokens, Grid(height, width, [], None)).reshape(batch, height, width, dim)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; give a divisor of it")
