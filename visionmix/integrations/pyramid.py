"""A feature pyramid of one map, for detectors with a plain model."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F


class SimplePyramid(BaseModule):
    """ViTDet's pyramid: the last of a plain model's maps at strides of 1/4, 1/2, 1, 2 and 4 of its own.

    Each is made of the map alone, by transposed convolutions or max pooling, then a 1x1 and a 3x3 convolution, with a
    layer norm over channels after each; the last is every second cell of the fourth.

    Shapes: a sequence of maps, of which the last is (batch, in_channels, rows, columns), to five of `out_channels`.

    Source: Exploring Plain Vision Transformer Backbones for Object Detection (Li et al. 2022, arXiv 2203.16527).

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the pyramid.
        init_cfg: mmengine's initialisation.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        half, quarter = in_channels // 2, in_channels // 4
        twice = nn.ConvTranspose2d(in_channels, half, 2, 2)
        four_times = [
            nn.ConvTranspose2d(in_channels, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        ]
        self.resize = nn.ModuleList([nn.Sequential(*four_times), twice, nn.Identity(), nn.MaxPool2d(2)])
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for width in (quarter, half, in_channels, in_channels)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the five maps, the finest first."""
        found = [convs(resize(maps[-1])) for resize, convs in zip(self.resize, self.convs, strict=True)]
        return (*found, F.max_pool2d(found[-1], 1, 2))
