"""Convolutions that are trained as several, of different numbers of groups, and become one."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionmix.layers.fold import affine_of
from visionmix.layers.half_precision import at_least_float32


class MapConv(nn.Conv2d):
    """`torch.nn.Conv2d` on maps (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


class MultiGroupConv(nn.Module):
    """A sum of convolutions of one size with several numbers of groups, each with a batch norm, and one of the input.

        y = sum_g batch_norm_g(conv_g(x)) + batch_norm(x)              (the last where widths are equal)

    In inference that is one convolution with the fewest of the groups, which timm's `reparameterize_model` puts in its
    place: a linear layer, where it looks at one cell and has no groups.

    Shapes: (batch, height, width, dim) to (batch, height, width, out_dim).

    Source: the convolutional multi-group re-parameterisation of FMViT (Tan et al. 2023, arXiv 2311.05707).

    Args:
        dim: Channels in.
        out_dim: Channels out.
        kernel_size: Rows and columns of the kernel, an odd number.
        groups: Numbers of groups, each a multiple of the first. Where one does not divide both widths, its greatest
            common divisor with them stands in for it, once.

    Raises:
        ValueError: `kernel_size` is even, or `groups` are none, or not multiples of the first.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int = 1, groups: Sequence[int] = (1, 2, 4), **dd: Any
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        if not groups or min(groups) < 1 or any(each % groups[0] for each in groups):
            raise ValueError(f"groups={tuple(groups)} are not multiples of the first; give such, as (1, 2, 4)")
        numbers = sorted({math.gcd(each, dim, out_dim) for each in groups})
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, out_dim, kernel_size, padding=kernel_size // 2, groups=number, bias=False, **dd)
            for number in numbers
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_dim, **dd) for _ in numbers)
        self.identity = nn.BatchNorm2d(dim, **dd) if dim == out_dim else None
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Let every norm begin with its share of the sum, which is then as large as one of its parts."""
        norms = [*self.norms] if self.identity is None else [*self.norms, self.identity]
        for norm in norms:
            nn.init.constant_(norm.weight, 1.0 / len(norms))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Return the one convolution, or linear layer, that computes what this does in inference."""
        first = self.convs[0]
        fused = MapConv(
            *(first.in_channels, first.out_channels, first.kernel_size, 1, first.padding),
            groups=first.groups,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        weight = torch.zeros_like(at_least_float32(first.weight))
        bias = torch.zeros_like(weight[:, 0, 0, 0])
        middle = first.kernel_size[0] // 2
        rows = torch.arange(len(weight), device=weight.device)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            factor, summand = affine_of(norm)
            own = at_least_float32(conv.weight.detach()) * factor[:, None, None, None]
            # Where the channels that a group reads begin among those of the fused convolution's group.
            starts = rows // (len(rows) // conv.groups) * own.shape[1] % weight.shape[1]
            columns = starts.unsqueeze(1) + torch.arange(own.shape[1], device=own.device)
            weight[rows.unsqueeze(1), columns] += own
            bias = bias + summand
        if self.identity is not None:
            factor, summand = affine_of(self.identity)
            weight[rows, rows % weight.shape[1], middle, middle] += factor
            bias = bias + summand
        if first.kernel_size[0] == 1 and first.groups == 1:
            fused = nn.Linear(first.in_channels, first.out_channels, device=weight.device, dtype=first.weight.dtype)
            weight = weight[:, :, 0, 0]
        with torch.no_grad():
            fused.weight.copy_(weight)
            fused.bias.copy_(bias)
        return fused.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        y = x if self.identity is None else self.identity(x)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms)):  # noqa: B905 TorchScript knows no strict=
            z = norm(conv(x))
            y = z if index == 0 and self.identity is None else y + z
        return y.permute(0, 2, 3, 1)
