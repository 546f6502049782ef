"""Scans that divide the cells among themselves, beside a convolution: EfficientVMamba's mixers."""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import make_divisible
from torch import Tensor, nn

from visionmix.layers import ChannelGate
from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.registry import register_mixer


@register_mixer("efficient_scan")
class EfficientScan(nn.Module):
    """Selective scans and a convolution side by side, each followed by the same channel gate, added.

        out = gate(scan(x)) + gate(W gelu(batch_norm(depthwise3x3(x))))

    The scan is `CrossScan` with gates. In the default set of directions each scan reads a quarter of the cells, every
    other row and column, and each cell is read once. A map of odd height or width is padded with zeros, over which the
    states decay, as in the published code.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: EfficientVMamba (Pei et al. 2024, arXiv 2403.09977).

    Args:
        dim: Channels.
        expand: Channels of the scan over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        order: A scan order or a set of directions, as `CrossScan` takes it.

    Raises:
        ValueError: as `CrossScan`.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: int = 16,
        dt_rank: int | None = None,
        order: str = "efficientvmamba",
        **dd: Any,
    ) -> None:
        super().__init__()
        self.scan = CrossScan(dim, expand, d_state, dt_rank, gate=True, conv_bias=True, order=order, **dd)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.channel_gate = ChannelGate(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        local = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.channel_gate(self.scan(x)) + self.channel_gate(local)


@register_mixer("inverted_residual")
class InvertedResidualMixer(nn.Module):
    """The convolutions of a MobileNet block: 1x1 to four times the channels, 3x3 depthwise, a squeeze, 1x1 back.

    ``bn(W_o se(relu(bn(depthwise3x3(relu(bn(W_i x)))))))`` with ``se(y) = y * sigmoid(W_2 relu(W_1 mean(y)))``, which
    is timm's `InvertedResidual` with activations apart from the norms, and without the skip connection, which the block
    has.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), with the gate of MobileNetV3 (Howard et al. 2019, arXiv
    1905.02244), as EfficientVMamba (Pei et al. 2024, arXiv 2403.09977) has it.

    Args:
        dim: Channels.
        expand: Channels of the depthwise convolution over `dim`.
        se_ratio: Hidden channels of the squeeze-and-excitation over those of the depthwise convolution.
    """

    def __init__(self, dim: int, expand: float = 4.0, se_ratio: float = 0.125, **dd: Any) -> None:
        super().__init__()
        inner = make_divisible(dim * expand)
        self.block = nn.Sequential(
            OrderedDict(
                conv_pw=nn.Conv2d(dim, inner, 1, bias=False, **dd),
                bn1=nn.BatchNorm2d(inner, **dd),
                act1=nn.ReLU(inplace=True),
                conv_dw=nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False, **dd),
                bn2=nn.BatchNorm2d(inner, **dd),
                act2=nn.ReLU(inplace=True),
                se=_SqueezeExcite(inner, round(inner * se_ratio), **dd),
                conv_pwl=nn.Conv2d(inner, dim, 1, bias=False, **dd),
                bn3=nn.BatchNorm2d(dim, **dd),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _SqueezeExcite(nn.Module):
    """Every channel of maps (batch, channels, height, width) times a gate made from the mean over all cells."""

    def __init__(self, channels: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(hidden, channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=[2, 3], keepdim=True)
        return x * torch.sigmoid(self.conv_expand(self.act(self.conv_reduce(pooled))))
