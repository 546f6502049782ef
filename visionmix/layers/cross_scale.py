"""Class tokens of two scales that look at each other's patches: CrossViT."""

from typing import Any

import torch
from timm.models.crossvit import CrossAttentionBlock
from torch import Tensor, nn


class CrossScaleTokens(nn.Module):
    """Two sequences of the same image at two patch sizes, whose class tokens each attend to the other's patches.

    With ``P(t) = W gelu(layer_norm(t)) + b``, each with its own parameters, for either scale and its other one,

        c   = P_to(class token)                                            (to the width of the other scale)
        c   = c + W_o softmax(q(c) k(z)^T * head_dim^-0.5) v(z),           z = layer_norm([c, the other's patches])
        out = [P_back(c), own patches]

    Attention has one query, so time and memory are linear in the patches. Two sequences come in and two go out, so this
    is a layer and no mixer of a backbone's block.

    Shapes: (batch, 1 + patches, dim) and (batch, 1 + other patches, other dim), class tokens first, to the same.

    Source: CrossViT (Chen et al. 2021, arXiv 2103.14899), by timm's block.

    Args:
        dims: Channels of both scales.
        num_heads: Heads of the attention in the width of either scale; divisors of `dims`.
        qkv_bias: Whether the projections to q, k and v have biases.

    Raises:
        ValueError: heads do not divide the channels, or there are not two of each.
    """

    def __init__(self, dims: tuple[int, int], num_heads: tuple[int, int], qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        if len(dims) != 2 or len(num_heads) != 2:
            raise ValueError(f"dims={dims} and num_heads={num_heads} are not of two scales; give two numbers for each")
        for dim, heads in zip(dims, num_heads, strict=True):
            if heads < 1 or dim % heads:
                raise ValueError(f"num_heads={num_heads} do not divide dims={dims}; give divisors")

        def projection(in_dim: int, dim: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(in_dim, **dd), nn.GELU(), nn.Linear(in_dim, dim, **dd))

        first, second = dims
        self.to_other = nn.ModuleList([projection(first, second), projection(second, first)])
        self.attend = nn.ModuleList(
            [
                CrossAttentionBlock(dim, heads, qkv_bias=qkv_bias, **dd)
                for dim, heads in zip(dims, num_heads, strict=True)
            ]
        )
        self.back = nn.ModuleList([projection(second, first), projection(first, second)])

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        in_second = self.attend[1](torch.cat([self.to_other[0](first[:, :1]), second[:, 1:]], dim=1))
        in_first = self.attend[0](torch.cat([self.to_other[1](second[:, :1]), first[:, 1:]], dim=1))
        return (
            torch.cat([self.back[0](in_second), first[:, 1:]], dim=1),
            torch.cat([self.back[1](in_first), second[:, 1:]], dim=1),
        )
