"""Polarity-aware linear attention: PolaFormer's mixer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import PositionEmbedding, SharedDepthwiseConv, at_least_float32
from visionmix.mixers.linear import averages, dot
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention


@register_mixer("polarity")
class PolarityAwareLinearAttention(Attention):
    """Linear attention that keeps the signs of queries and keys apart, and learns how much large entries weigh.

    With ``q, k, v, g = W x``, a learned position p added to the keys, and the power
    ``m = 1 + alpha * sigmoid(power)`` of each channel,

        q, k  = q / softplus(scale), (k + p) / softplus(scale)
        q+-   = [relu(q)^m, relu(-q)^m],   k+- = [relu(k)^m, relu(-k)^m],   q-+ = [relu(-q)^m, relu(q)^m]

    and then in each head, whose values are ``[v1, v2]``, over the n cells j of the map,

        same_i = q+-_i (1/n sum_j k+-_j^T v1_j) / (q+-_i mean_j k+-_j^T + 1e-6)
        opp_i  = q-+_i (1/n sum_j k+-_j^T v2_j) / (q-+_i mean_j k+-_j^T + 1e-6)
        out    = W_o (([same, opp] + depthwise(v)) * g)

    where the depthwise convolution has ``dim / num_heads`` kernels, which all heads share. Time and memory are linear
    in the cells. Powers and normalisers are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; p is resampled bilinearly to them.

    Source: PolaFormer (Meng et al. 2025, arXiv 2501.15061).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim` that leaves each an even number of channels.
        grid_size: Rows and columns that p is stored at.
        alpha: Range of the learned powers, from 1 to ``1 + alpha``; not negative.
        kernel_size: Rows and columns of the depthwise convolution: an odd number.
        qkv_bias: Whether the projection to q, k, v and g has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim` or leaves odd heads, `alpha` is negative, or `kernel_size` is
            even.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        grid_size: tuple[int, int] = (14, 14),
        alpha: float = 4,
        kernel_size: int = 5,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha} makes powers below 1, whose gradients have no bound; give 0 or more")
        super().__init__(dim, num_heads, qkv_bias, rotary=False, lepe=kernel_size, gate=True, **dd)
        if dim // num_heads % 2:
            raise ValueError(
                f"num_heads={num_heads} makes heads of {dim // num_heads} channels; half of them are for equal "
                "signs, so give a divisor of dim that leaves an even number"
            )
        self.alpha = float(alpha)
        self.lepe = SharedDepthwiseConv(dim // num_heads, num_heads, kernel_size, **dd)
        self.pos_embed = PositionEmbedding(dim, grid_size, mode="bilinear", **dd)
        self.scale = nn.Parameter(torch.empty(dim, **dd))
        self.power = nn.Parameter(torch.empty(num_heads, dim // num_heads, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set scale, power and positions to 0, as the published code does."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.power)
        nn.init.zeros_(self.pos_embed.weight)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = qk.chunk(2, dim=2)
        k = self.pos_embed(k.flatten(2).unflatten(1, (height, width))).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        scale = F.softplus(at_least_float32(self.scale)).unflatten(0, (self.num_heads, -1))
        power = 1.0 + self.alpha * torch.sigmoid(at_least_float32(self.power))
        q, k = at_least_float32(q) / scale, at_least_float32(k) / scale
        positive, negative = F.relu(q) ** power, F.relu(-q) ** power
        k = torch.cat([F.relu(k) ** power, F.relu(-k) ** power], dim=-1)
        mean = k.mean(dim=1, keepdim=True)
        # A channel whose keys all have one sign has no level for the other, and nothing to divide.
        levels = mean.detach().clamp_min(1e-30)
        alike, opposite = torch.cat([positive, negative], dim=-1), torch.cat([negative, positive], dim=-1)
        v1, v2 = at_least_float32(v).chunk(2, dim=-1)
        same = averages(alike, k, v1, dot(alike, mean) + 1e-6, levels)
        return torch.cat([same, averages(opposite, k, v2, dot(opposite, mean) + 1e-6, levels)], dim=-1)
