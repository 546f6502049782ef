"""Stems: from an NCHW image to an NHWC map of tokens."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.layers.layout import channels_first
from visionmix.layers.padding import pad

_NORM = partial(LayerNorm, eps=1e-5)


def _pad_to_whole(x: Tensor, patch_size: int) -> Tensor:
    """Return x (batch, channels, height, width), zeros at the bottom and on the right until patches fit."""
    # Not -side % patch_size: compiled graphs know no remainder of negative numbers.
    bottom = (patch_size - x.shape[2] % patch_size) % patch_size
    right = (patch_size - x.shape[3] % patch_size) % patch_size
    return pad(x, [0, right, 0, bottom])


class ConvStem(nn.Module):
    """Two convolutions that halve, then reduce `patch_size`-fold in all, each followed by a LayerNorm over channels.

    Computes ``norm2(conv2(act(norm1(conv1(x)))))``, or ``norm2(conv2(conv1(x)))`` where nothing stands `between`, with
    ``conv1`` of kernel ``patch_size // 2 + 1`` and stride ``patch_size // 2``, ``conv2`` of kernel 3 and stride 2, both
    padded by 1. No activation follows the second norm.

    Shapes: (batch, in_chans, height, width) to (batch, rows, columns, embed_dim).

    Source: ViG (Liao et al. 2024, arXiv 2405.18425) and VMamba's second version (Liu et al. 2024, arXiv 2401.10166);
    with nothing between the convolutions, NAT (Hassani et al. 2022, arXiv 2204.07143).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens; the first convolution makes half as many.
        patch_size: Pixels a token stands for, along each side: an even number, at least 4.
        between: Whether a norm and an activation stand between the two convolutions.
        act_layer: That activation.
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
        between: bool = True,
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
        self.norm1 = LayerNorm(half, eps=norm_eps, **dd) if between else nn.Identity()
        self.act = act_layer() if between else nn.Identity()
        self.conv2 = nn.Conv2d(half, embed_dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm(embed_dim, eps=norm_eps, **dd)

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
    """One convolution over patches and a norm over channels: ``norm1(conv1(x))``.

    By default the kernel is a patch, patches do not overlap, and pixels beyond the last whole one are not read.

    Shapes: (batch, in_chans, height, width) to (batch, rows, columns, embed_dim), where a side becomes
    ``(side + 2 * padding - kernel_size) // stride + 1``: by default ``side // patch_size``, with `whole`
    ``ceil(side / patch_size)``.

    Source: the patch embedding of ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), with a norm as in Swin (Liu et al.
    2021, arXiv 2103.14030); with patches that overlap, PVTv2 (Wang et al. 2021, arXiv 2106.13797).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens.
        patch_size: Pixels a token stands for, along each side.
        kernel_size: Rows and columns of the kernel; None for `patch_size`.
        stride: Pixels from one patch to the next; None for `patch_size`.
        padding: Rows and columns of zeros around the image.
        whole: Whether the image first gets zeros at the bottom and on the right until patches fit, as in Swin's code
            for detection. Only for patches that do not overlap.
        norm_layer: Makes the norm from `embed_dim`; None for no norm, as in ViT.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: patches overlap or have zeros around them, and `whole` is asked for.
    """

    whole: Final[bool]

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 96,
        patch_size: int = 4,
        *,
        kernel_size: int | None = None,
        stride: int | None = None,
        padding: int = 0,
        whole: bool = False,
        norm_layer: Callable[..., nn.Module] | None = _NORM,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        kernel_size, stride = kernel_size or patch_size, stride or patch_size
        if whole and (kernel_size != stride or padding):
            raise ValueError(
                f"whole=True needs patches side by side; leave out kernel_size={kernel_size}, stride={stride} and "
                f"padding={padding}"
            )
        self.whole = whole
        self.conv1 = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding, **dd)
        self.norm1 = norm_layer(embed_dim, **dd) if norm_layer else nn.Identity()

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        (stride, _), (kernel, _), (padding, _) = self.conv1.stride, self.conv1.kernel_size, self.conv1.padding
        if self.whole:
            return -(-height // stride), -(-width // stride)
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            x = _pad_to_whole(x, self.conv1.stride[0])
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class DeepConvStem(nn.Module):
    """Four 3x3 convolutions with batch norms, the first and the last of stride 2, GELU behind each but the last.

    The first three have half of the channels. All have biases.

    Shapes: (batch, in_chans, height, width) to (batch, ceil(height / 4), ceil(width / 4), embed_dim).

    Source: MALA (Fan et al. 2025, arXiv 2507.00698) and RALA (Fan et al. 2024, arXiv 2411.07635).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens.
        patch_size: Pixels a token stands for, along each side: 4.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `patch_size` is not 4, or `embed_dim` is odd.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 64,
        patch_size: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
        if embed_dim % 2:
            raise ValueError(f"embed_dim={embed_dim} is odd; the first convolutions make half as many channels")
        dd = {"device": device, "dtype": dtype}
        half = embed_dim // 2
        self.act = nn.GELU()
        self.conv1 = nn.Conv2d(in_chans, half, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(half, **dd)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(half, **dd)
        self.conv3 = nn.Conv2d(half, half, 3, padding=1, **dd)
        self.norm3 = nn.BatchNorm2d(half, **dd)
        self.conv4 = nn.Conv2d(half, embed_dim, 3, stride=2, padding=1, **dd)
        self.norm4 = nn.BatchNorm2d(embed_dim, **dd)

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        return -(-height // 4), -(-width // 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.act(self.norm3(self.conv3(x)))
        return self.norm4(self.conv4(x)).permute(0, 2, 3, 1)


class DeepPatchStem(nn.Module):
    """Convolutions with batch norms at half the resolution, then one over patches that do not overlap.

    ``proj(convs(relu(norm1(conv1(x)))))``: ``conv1`` 7x7 of stride 2, `depth` times a 3x3 convolution, batch norm and
    ReLU, all of `width` channels and without bias, and ``proj`` of kernel and stride ``patch_size // 2``, before which
    zeros are put at the bottom and on the right until patches fit.

    Shapes: (batch, in_chans, height, width) to (batch, ceil(height / patch_size), ceil(width / patch_size), embed_dim).

    Source: Shunted Transformer (Ren et al. 2021, arXiv 2111.15193), as PlainMamba (Yang et al. 2024, arXiv 2403.17695)
    takes it over.

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens.
        patch_size: Pixels a token stands for, along each side: an even number.
        depth: How many 3x3 convolutions.
        width: Channels before the last convolution.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `patch_size` is odd.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 192,
        patch_size: int = 16,
        *,
        depth: int = 1,
        width: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size={patch_size} is odd; the first convolution halves, so give an even number")
        dd = {"device": device, "dtype": dtype}
        self.stride = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU()
        self.convs = nn.Sequential(
            *(
                nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(width, width, 3, padding=1, bias=False, **dd),
                        bn=nn.BatchNorm2d(width, **dd),
                        act=nn.ReLU(inplace=True),
                    )
                )
                for _ in range(depth)
            )
        )
        self.proj = nn.Conv2d(width, embed_dim, kernel_size=self.stride, stride=self.stride, **dd)

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        rows, columns = (-(-((side + 1) // 2) // self.stride) for side in (height, width))
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(self.act1(self.norm1(self.conv1(x))))
        return self.proj(_pad_to_whole(x, self.stride)).permute(0, 2, 3, 1)
