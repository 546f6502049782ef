"""Stems: from an NCHW image to an NHWC map of tokens, a list of convolutions with their norms and activations."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.fx
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.fold import fold_behind
from visionmix.layers.maps import channels_first, channels_last, pad
from visionmix.private_api import AnyBatchNorm

_NORM = partial(LayerNorm, eps=1e-5)


class StemConv(NamedTuple):
    """A convolution of a stem, with the norm and the activation after it.

    Attributes:
        channels: Channels out.
        kernel_size: Rows and columns of the kernel.
        stride: Pixels from one window to the next.
        padding: Rows and columns of zeros around the input; None for ``kernel_size // 2``.
        bias: Whether the convolution has a bias.
        norm_layer: Makes a norm from the channels; None for none. Batch and group norms see channels first, any other
            norm sees them last.
        act_layer: Makes the activation; None for none.
        whole: Whether the input first gets zeros at the bottom and on the right until windows fit.
        groups: Groups of channels that the convolution keeps apart; as many as channels for a depthwise one.
    """

    channels: int
    kernel_size: int
    stride: int = 1
    padding: int | None = None
    bias: bool = True
    norm_layer: Callable[..., nn.Module] | None = None
    act_layer: Callable[[], nn.Module] | None = None
    whole: bool = False
    groups: int = 1


class Stem(nn.Sequential):
    """Convolutions one after another: for each of `convs`, in turn, ``x = act(norm(conv(x)))``.

    The children are called conv1, norm1, act1, conv2 and so on.

    Shapes: (batch, in_chans, height, width) to (batch, rows, columns, channels of the last convolution). Each
    convolution makes ``(side + 2 * padding - kernel_size) // stride + 1`` of a side, or ``ceil(side / stride)`` where
    it is `whole`.

    Args:
        in_chans: Channels of the image.
        convs: The convolutions.
    """

    def __init__(self, in_chans: int, convs: Sequence[StemConv], **dd: Any) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        last = False  # whether channels come last
        for number, conv in enumerate(convs, 1):
            if last:
                layers[f"first{number}"], last = _ChannelsFirst(), False
            if conv.whole:
                layers[f"pad{number}"] = _PadToWhole(conv.stride)
            padding = conv.kernel_size // 2 if conv.padding is None else conv.padding
            patches = conv.whole and conv.kernel_size == conv.stride and padding == 0 and conv.groups == 1
            layers[f"conv{number}"] = (_PatchConv if patches else nn.Conv2d)(
                *(in_chans, conv.channels, conv.kernel_size, conv.stride, padding),
                groups=conv.groups,
                bias=conv.bias,
                **dd,
            )
            in_chans = conv.channels
            if conv.norm_layer is not None:
                norm = conv.norm_layer(in_chans, **dd)
                if not isinstance(norm, AnyBatchNorm | nn.GroupNorm):
                    layers[f"last{number}"], last = _ChannelsLast(), True
                layers[f"norm{number}"] = norm
            if conv.act_layer is not None:
                layers[f"act{number}"] = conv.act_layer()
        if not last:
            layers["last"] = _ChannelsLast()
        super().__init__(layers)
        self._convs = [(each.kernel_size, each.stride, each.padding, each.whole) for each in convs]
        self.stride = 1
        for each in convs:
            self.stride *= each.stride

    @torch.jit.ignore
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the map of an image of `height` by `width` pixels."""
        rows, columns = height, width
        for kernel, stride, padding, whole in self._convs:
            around = 2 * (kernel // 2 if padding is None else padding)
            rows, columns = (
                -(-side // stride) if whole else (side + around - kernel) // stride + 1 for side in (rows, columns)
            )
        return rows, columns

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norms into the convolutions before them, for inference."""
        for number in range(1, len(self._convs) + 1):
            if hasattr(self, f"norm{number}"):
                norm = fold_behind(getattr(self, f"conv{number}"), getattr(self, f"norm{number}"))
                setattr(self, f"norm{number}", norm)


class _PatchConv(nn.Conv2d):
    """`torch.nn.Conv2d` of whole patches side by side, in eager mode on a CPU one matrix product.

    oneDNN's convolution adds the products of a patch up one after another, a matrix product in blocks: of 768 products
    that halves the rounding error, which all blocks of a plain model carry on.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _patch_conv(x, self.weight, self.bias, self.stride[0])


@torch.fx.wrap
def _patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    if not torch.jit.is_scripting():
        if x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3)
            return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride=[size, size])


class _ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return channels_last(x)


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return channels_first(x)


class _PadToWhole(nn.Module):
    """Zeros at the bottom and on the right of (batch, channels, height, width) until `stride` divides both sides."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        rows, columns = (height + self.stride - 1) // self.stride, (width + self.stride - 1) // self.stride
        return pad(x, [0, columns * self.stride - width, 0, rows * self.stride - height])


def conv_stem(
    in_chans: int = 3,
    embed_dim: int = 192,
    patch_size: int = 16,
    *,
    between: bool = True,
    act_layer: Callable[[], nn.Module] = nn.SiLU,
    norm_layer: Callable[..., nn.Module] = _NORM,
    **dd: Any,
) -> Stem:
    """Return two convolutions that reduce `patch_size`-fold, ``norm2(conv2(act(norm1(conv1(x)))))``.

    ``conv1`` has kernel ``patch_size // 2 + 1`` and stride ``patch_size // 2``, ``conv2`` kernel 3 and stride 2; both
    are padded by 1.

    Source: ViG (Liao et al. 2024, arXiv 2405.18425) and VMamba's second version (Liu et al. 2024, arXiv 2401.10166);
    with nothing between the convolutions, NAT (Hassani et al. 2022, arXiv 2204.07143).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens; the first convolution makes half as many.
        patch_size: Pixels a token stands for, along each side: an even number, at least 4.
        between: Whether a norm and an activation stand between the two convolutions.
        act_layer: Makes that activation.
        norm_layer: Makes the norms.

    Raises:
        ValueError: `patch_size` is odd or below 4, or `embed_dim` is odd.
    """
    if patch_size < 4 or patch_size % 2:
        raise ValueError(f"patch_size={patch_size} does not suit two convolutions; give an even number, 4 or more")
    half, stride = _half(embed_dim), patch_size // 2
    first = StemConv(half, stride + 1, stride, padding=1)
    if between:
        first = first._replace(norm_layer=norm_layer, act_layer=act_layer)
    return Stem(in_chans, [first, StemConv(embed_dim, 3, 2, norm_layer=norm_layer)], **dd)


def patch_stem(
    in_chans: int = 3,
    embed_dim: int = 96,
    patch_size: int = 4,
    *,
    kernel_size: int | None = None,
    stride: int | None = None,
    padding: int = 0,
    whole: bool = False,
    norm_layer: Callable[..., nn.Module] | None = _NORM,
    **dd: Any,
) -> Stem:
    """Return one convolution over patches and a norm over channels, ``norm1(conv1(x))``.

    By default the kernel is a patch, patches do not overlap, and pixels beyond the last whole one are not read.

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
        norm_layer: Makes the norm; None for no norm, as in ViT.

    Raises:
        ValueError: patches overlap or have zeros around them, and `whole` is asked for.
    """
    kernel_size, stride = kernel_size or patch_size, stride or patch_size
    if whole and (kernel_size != stride or padding):
        raise ValueError(
            f"whole=True needs patches side by side; leave out kernel_size={kernel_size}, stride={stride} and "
            f"padding={padding}"
        )
    conv = StemConv(embed_dim, kernel_size, stride, padding, norm_layer=norm_layer, whole=whole)
    return Stem(in_chans, [conv], **dd)


def deep_conv_stem(in_chans: int = 3, embed_dim: int = 64, patch_size: int = 4, **dd: Any) -> Stem:
    """Return four 3x3 convolutions with batch norms, GELU after each but the last; the first and last have stride 2.

    The first three have half of the channels. All have biases.

    Source: MALA (Fan et al. 2025, arXiv 2507.00698) and RALA (Fan et al. 2024, arXiv 2411.07635).

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens: an even number.
        patch_size: Pixels a token stands for, along each side: 4.

    Raises:
        ValueError: `patch_size` is not 4, or `embed_dim` is odd.
    """
    return Stem(in_chans, deep_convs(embed_dim, patch_size), **dd)


def deep_convs(embed_dim: int, patch_size: int) -> list[StemConv]:
    """Return the convolutions of `deep_conv_stem`."""
    if patch_size != 4:
        raise ValueError(f"patch_size={patch_size} does not suit two convolutions of stride 2; give 4")
    conv = StemConv(_half(embed_dim), 3, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU)
    last = conv._replace(channels=embed_dim, stride=2, act_layer=None)
    return [conv._replace(stride=2), conv, conv, last]


def deep_patch_stem(
    in_chans: int = 3, embed_dim: int = 192, patch_size: int = 16, *, depth: int = 1, width: int = 64, **dd: Any
) -> Stem:
    """Return convolutions with batch norms at half the resolution, then one over patches that do not overlap.

    The first is 7x7 of stride 2, `depth` of 3x3 follow; all have `width` channels, a batch norm, ReLU and no bias. The
    last has kernel and stride ``patch_size // 2``; its input gets zeros at the bottom and on the right until patches
    fit.

    Source: Shunted Transformer (Ren et al. 2021, arXiv 2111.15193), as PlainMamba (Yang et al. 2024, arXiv 2403.17695)
    takes it over.

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens.
        patch_size: Pixels a token stands for, along each side: an even number.
        depth: Number of 3x3 convolutions.
        width: Channels before the last convolution.

    Raises:
        ValueError: `patch_size` is odd.
    """
    if patch_size < 2 or patch_size % 2:
        raise ValueError(f"patch_size={patch_size} is odd; the first convolution halves, so give an even number")
    conv = StemConv(width, 3, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)
    patches = StemConv(embed_dim, patch_size // 2, patch_size // 2, 0, whole=True)
    convs = [conv._replace(kernel_size=7, stride=2), *[conv] * depth, patches]
    return Stem(in_chans, convs, **dd)


def _half(embed_dim: int) -> int:
    if embed_dim % 2:
        raise ValueError(f"embed_dim={embed_dim} is odd; the first convolutions make half as many channels")
    return embed_dim // 2
