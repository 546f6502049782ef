"""Norms over the channels of NHWC maps."""

from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of every channel: `torch.nn.BatchNorm2d` on maps whose channels come last.

    Shapes: (batch, height, width, dim) to the same.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
