"""Stems: from an NCHW image to an NHWC map of tokens."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from visionmix.layers.layout import channels_first

_NORM = partial(nn.LayerNorm, eps=1e-5)


class ConvStem(nn.Module):
    """Two convolutions that halve, then reduce `patch_size`-fold in all, each followed by a LayerNorm over channels.

    Computes ``norm2(conv2(act(norm1(conv1(x)))))`` with ``conv1`` of kernel ``patch_size // 2 + 1`` and stride
    ``patch_size // 2``, ``conv2`` of kernel 3 and stride 2, both padded by 1. No activation follows the second norm.

    Shapes: (batch, in_chans, height, width) to (batch, rows, columns, embed_dim).

    Source: ViG (Liao et al. 2024, arXiv 2405.18425) and VMamba's second version (Liu et al. 2024, arXiv 2401.10166).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens; the first convolution makes half as many.
        patch_size: Pixels a token stands for, along each side: an even number, at least 4.
        act_layer: Activation between the two convolutions.
        norm_eps: Epsilon of both norms.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `patch_size` is odd or below 4, or `embed_dim` is odd.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 192,
        patch_size: int = 16,
        *,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 4 or patch_size % 2:
            raise ValueError(f"patch_size={patch_size} does not suit two convolutions; give an even number, 4 or more")
        if embed_dim % 2:
            raise ValueError(f"embed_dim={embed_dim} is odd; the first convolution makes half as many channels")
        dd = {"device": device, "dtype": dtype}
        half, stride = embed_dim // 2, patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, half, kernel_size=stride + 1, stride=stride, padding=1, **dd)
        self.norm1 = nn.LayerNorm(half, eps=norm_eps, **dd)
        self.act = act_layer()
        self.conv2 = nn.Conv2d(half, embed_dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps, **dd)

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        stride = self.conv1.stride[0]
        rows, columns = ((((side + 1 - stride) // stride + 1) - 1) // 2 + 1 for side in (height, width))
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(channels_first(x)).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """One convolution over patches that do not overlap, and a norm over channels: ``norm1(conv1(x))``.

    ``conv1`` has kernel and stride `patch_size`; pixels beyond the last whole patch are not read.

    Shapes: (batch, in_chans, height, width) to (batch, height // patch_size, width // patch_size, embed_dim).

    Source: the patch embedding of ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), with a norm as in Swin (Liu et al.
    2021, arXiv 2103.14030).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens.
        patch_size: Pixels a token stands for, along each side.
        norm_layer: Makes the norm from `embed_dim`; None for no norm, as in ViT.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 96,
        patch_size: int = 4,
        *,
        norm_layer: Callable[..., nn.Module] | None = _NORM,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm1 = norm_layer(embed_dim, **dd) if norm_layer else nn.Identity()

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        stride = self.conv1.stride[0]
        return height // stride, width // stride

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))
