"""Simplified linear attention: SLAB's mixer."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import PositionEmbedding, SharedDepthwiseConv, at_least_float32
from visionmix.mixers.linear import averages, dot
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention


@register_mixer("simplified")
class SimplifiedLinearAttention(Attention):
    """Linear attention with relu as its feature map, and a depthwise convolution of the values.

    With ``q, k, v = W x`` and a learned position p added to the keys, in each head, over the cells j of the map,

        y_i = relu(q_i) (sum_j relu(k_j + p_j)^T v_j) / (relu(q_i) sum_j relu(k_j + p_j)^T + 1e-6)
        out = W_o (y + depthwise(v))

    where the depthwise convolution has ``dim / num_heads`` kernels, which all heads share. Time and memory are linear
    in the cells. Feature maps and normalisers are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; p is resampled bilinearly to them.

    Source: SLAB (Guo et al. 2024, arXiv 2405.11582).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        grid_size: Rows and columns that p is stored at.
        kernel_size: Rows and columns of the depthwise convolution: an odd number.
        lepe: Whether a depthwise 3x3 convolution of v over all channels is added too, as in the CSWin models.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `kernel_size` is even.
    """

    has_conv: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        grid_size: tuple[int, int] = (14, 14),
        kernel_size: int = 5,
        lepe: bool = False,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        super().__init__(dim, num_heads, qkv_bias, rotary=False, lepe=kernel_size, gate=False, **dd)
        self.lepe = SharedDepthwiseConv(dim // num_heads, num_heads, kernel_size, **dd)
        self.pos_embed = PositionEmbedding(dim, grid_size, mode="bilinear", **dd)
        self.has_conv = lepe
        if lepe:
            self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the positions to 0, as the published code does."""
        nn.init.zeros_(self.pos_embed.weight)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = qk.chunk(2, dim=2)
        k = self.pos_embed(k.flatten(2).unflatten(1, (height, width))).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        q, k = F.relu(at_least_float32(q)), F.relu(at_least_float32(k))
        mean = k.mean(dim=1, keepdim=True)
        # 1e-6 is added to the sum: PyTorch's export to ONNX takes an addend below 1e-8 for 0.
        normaliser = (dot(q, mean * k.shape[1]) + 1e-6) / k.shape[1]
        # A channel whose keys are all 0 has no level, and nothing to divide.
        out = averages(q, k, at_least_float32(v), normaliser, mean.detach().clamp_min(1e-30))
        if self.has_conv:
            local = self.conv(v.flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2))
            out = out + local.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        return out
