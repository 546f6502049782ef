"""Focused linear attention: FLatten's mixer."""

from typing import Any, Final

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import PositionEmbedding, SharedDepthwiseConv, at_least_float32
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


@register_mixer("focused")
class FocusedLinearAttention(nn.Module):
    """Linear attention whose feature map sharpens: large entries of queries and keys grow, small ones fade.

    With ``q, k, v = W x`` and a learned position p added to the keys, over all channels at once,

        u(y)     = (relu(y) + 1e-6) / softplus(scale)
        phi(y)   = |u| * u^focus / |u^focus|

    and then in each head, over the n cells j of the map,

        y_i = phi(q_i) (1/n sum_j phi(k_j + p_j)^T v_j) / (phi(q_i) mean_j phi(k_j + p_j)^T + 1e-6)
        out = W_o (y + depthwise(v))

    where the depthwise convolution has ``dim / num_heads`` kernels, which all heads share. Time and memory are linear
    in the cells. Feature maps and normalisers are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width; p is resampled bilinearly to them.

    Source: FLatten Transformer (Han et al. 2023, arXiv 2308.00442).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        grid_size: Rows and columns that p is stored at.
        focus: The power.
        kernel_size: Rows and columns of the depthwise convolution: an odd number.
        lepe: Whether a depthwise 3x3 convolution of v over all channels is added too, as in the CSWin models.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `kernel_size` is even.
    """

    has_lepe: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        grid_size: tuple[int, int] = (14, 14),
        focus: float = 3,
        kernel_size: int = 5,
        lepe: bool = False,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        self.num_heads = num_heads
        self.focus = float(focus)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.pos_embed = PositionEmbedding(dim, grid_size, mode="bilinear", **dd)
        self.scale = nn.Parameter(torch.empty(dim, **dd))
        self.dwc = SharedDepthwiseConv(dim // num_heads, num_heads, kernel_size, **dd)
        self.has_lepe = lepe
        if lepe:
            self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set scale and positions to 0, as the published code does."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.pos_embed.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scale = F.softplus(self.scale)
        q, k = _focused(q, scale, self.focus), _focused(self.pos_embed(k), scale, self.focus)
        # The same as in the docstring, by weights that sum to 1, so that half precision can carry them: of the cells
        # in each channel's mean of v, and of the channels in each cell's mean of those.
        mean = k.mean(dim=[1, 2], keepdim=True)
        cells = self._heads((k / (mean * (height * width))).to(v.dtype))
        channels = (q * mean).unflatten(-1, (self.num_heads, -1))
        channels = (channels / (channels.sum(dim=-1, keepdim=True) + 1e-6)).flatten(-2)
        y = self._heads(channels.to(v.dtype)) @ (cells.transpose(-2, -1) @ self._heads(v))
        y = y.transpose(1, 2).reshape(batch, height, width, dim)
        v = v.permute(0, 3, 1, 2)
        local = self.dwc(v)
        if self.has_lepe:
            local = local + self.conv(v)
        return self.proj(y + local.permute(0, 2, 3, 1))

    def _heads(self, x: Tensor) -> Tensor:
        """Return (batch, height, width, dim) as (batch, heads, cells, head_dim)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@torch.fx.wrap
def _focused(x: Tensor, scale: Tensor, focus: float) -> Tensor:
    """Return phi(x), see `FocusedLinearAttention`, of the last axis."""
    # 1e-6 to the third power underflows in half precision.
    x = (F.relu(at_least_float32(x)) + 1e-6) / scale
    sharp = x**focus
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return sharp * (length / torch.linalg.vector_norm(sharp, dim=-1, keepdim=True))
