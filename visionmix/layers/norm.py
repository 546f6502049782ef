"""Norms over the channels of NHWC maps."""

import torch
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Batch normalisation of every channel: `torch.nn.BatchNorm2d`, its `bn`, on maps whose channels come last.

    Shapes: (batch, height, width, dim) to the same.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.

    Args:
        dim: Channels.
        eps: Added to the variance.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
