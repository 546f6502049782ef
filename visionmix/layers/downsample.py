"""Downsamplers between the stages of a hierarchical backbone, NHWC in and out."""

import torch
from torch import Tensor, nn


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2 and a LayerNorm over channels.

    Shapes: (batch, height, width, dim) to (batch, ceil(height / 2), ceil(width / 2), out_dim).

    Source: the third downsampler of VMamba's code (Liu et al. 2024, arXiv 2401.10166), which ViG takes over.

    Args:
        dim: Channels in.
        out_dim: Channels out.
        norm_eps: Epsilon of the norm.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, eps=norm_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
