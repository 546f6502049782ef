"""Position embeddings that follow the image's size."""

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F


@torch.fx.wrap
def resample_position(weight: Tensor, height: int, width: int) -> Tensor:
    """Return `weight` (1, rows, columns, channels) resampled to (1, height, width, channels).

    Bicubic, in float32, without antialiasing; the identity, bit for bit, at the size that `weight` has.

    Source: what ViT's fine-tuning at other sizes does (Dosovitskiy et al. 2020, arXiv 2010.11929).
    """
    # A compiled graph resamples always (bicubic weights at scale 1 are 0 and 1 exactly): a branch on the size would
    # compile once more for the built size.
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if height == weight.shape[1] and width == weight.shape[2]:
            return weight
    resampled = F.interpolate(weight.permute(0, 3, 1, 2).float(), size=[height, width], mode="bicubic")
    return resampled.to(weight.dtype).permute(0, 2, 3, 1)


class PositionEmbedding(nn.Module):
    """A learned embedding added to every cell of a map, resampled where the map's size is not the built one.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        grid_size: Rows and columns of the built map.
        device: Where the parameter lies.
        dtype: Type of the parameter.
    """

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, *grid_size, dim, device=device, dtype=dtype))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        return x + resample_position(self.weight, height, width)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the parameter itself, so that `grid_size` becomes the built size."""
        with torch.no_grad():
            self.weight = nn.Parameter(resample_position(self.weight, *grid_size).contiguous())
