"""Fusion of two maps in space and frequency, and of a map's scales: Mamba-FCS."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from visionmix.layers.half_precision import at_least_float32


def _projection(in_dim: int, dim: int, bias: bool, **dd: Any) -> list[nn.Module]:
    return [nn.Conv2d(in_dim, dim, 1, bias=bias, **dd), nn.BatchNorm2d(dim, **dd), nn.ReLU()]


class JointSpatialFrequency(nn.Module):
    """One map of two of the same place, such as two dates': their cells, their spectra and their difference, gated.

    With ``P(x) = relu(bn(W x))``, each with its own parameters, and the orthonormal 2-D Fourier transform F of each
    channel:

        f(x) = P(log(1 + |F(x)|))
        y    = P([before, f(before), after, f(after), |before - after|])    (the last with difference alone)
        y    = y * sigmoid(conv1d(mean of y over cells))                    (along the channels)
        out  = y * sigmoid(conv7x7([max, mean of y over channels]))

    Two maps come in and one goes out, so this is a layer for a decoder and no mixer of a backbone's block. The
    published module also builds a cross attention that it never calls; it is left out.

    Shapes: two of (batch, height, width, dim) to one, for every height and width. The transform runs in float32 where
    the maps are of half precision.

    Source: the JSF block of Mamba-FCS (Wijenayake et al. 2025, arXiv 2508.08232).

    Args:
        dim: Channels of both maps.
        difference: Whether the absolute difference of both maps takes part.
    """

    def __init__(self, dim: int, *, difference: bool = True, **dd: Any) -> None:
        super().__init__()
        self.difference = difference
        self.before_spectrum = nn.Sequential(*_projection(dim, dim, False, **dd))
        self.after_spectrum = nn.Sequential(*_projection(dim, dim, False, **dd))
        self.reduce = nn.Sequential(*_projection((5 if difference else 4) * dim, dim, False, **dd))
        kernel_size = int(abs(math.log2(dim) + 1) / 2)
        kernel_size += 1 - kernel_size % 2
        self.channel_conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.cell_conv = nn.Conv2d(2, 1, 7, padding=3, bias=False, **dd)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        before, after = before.permute(0, 3, 1, 2), after.permute(0, 3, 1, 2)
        parts = [
            before,
            self.before_spectrum(_log_amplitude(before)),
            after,
            self.after_spectrum(_log_amplitude(after)),
        ]
        if self.difference:
            parts.append((before - after).abs())
        y = self.reduce(torch.cat(parts, dim=1))
        gate = self.channel_conv(y.mean(dim=[2, 3]).unsqueeze(1)).sigmoid()
        y = y * gate.transpose(1, 2).unsqueeze(-1)
        gate = self.cell_conv(torch.cat([y.amax(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)], dim=1))
        return (y * gate.sigmoid()).permute(0, 2, 3, 1)


class PyramidFusion(nn.Module):
    """A map seen at three scales, with attention to channels, then to cells, beside a shortcut.

    With ``P(x) = relu(bn(W x + b))``, each with its own parameters:

        y   = [P(x), relu(bn(conv3x3(x))), P(depthwise5x5(x))]
        y   = y * (a(mean of y over cells) + a(max of y over cells)),  a(c) = sigmoid(W_2 relu(W_1 c))
        y   = y * sigmoid(conv7x7([mean, max of y over channels]))
        out = P(y) + W_s x    (x itself where in_dim is dim)

    Shapes: (batch, height, width, in_dim) to (batch, height, width, dim), for every height and width.

    Source: Mamba-FCS (Wijenayake et al. 2025, arXiv 2508.08232).

    Args:
        in_dim: Channels of the map.
        dim: Channels of the result.
        reduction: Divisor of the channels' hidden layer, which has ``3 * dim // reduction``.

    Raises:
        ValueError: `reduction` leaves no hidden channel.
    """

    def __init__(self, in_dim: int, dim: int, *, reduction: int = 16, **dd: Any) -> None:
        super().__init__()
        hidden = 3 * dim // reduction
        if hidden < 1:
            raise ValueError(f"reduction={reduction} leaves no hidden channel of dim={dim}; give at most {3 * dim}")
        self.shortcut = nn.Conv2d(in_dim, dim, 1, **dd) if in_dim != dim else nn.Identity()
        self.cell = nn.Sequential(*_projection(in_dim, dim, True, **dd))
        near = nn.Conv2d(in_dim, dim, 3, padding=1, **dd)
        self.near = nn.Sequential(near, nn.BatchNorm2d(dim, **dd), nn.ReLU())
        far = nn.Conv2d(in_dim, in_dim, 5, padding=2, groups=in_dim, **dd)
        self.far = nn.Sequential(far, *_projection(in_dim, dim, True, **dd))
        self.fc1 = nn.Linear(3 * dim, hidden, **dd)
        self.fc2 = nn.Linear(hidden, 3 * dim, **dd)
        self.cell_conv = nn.Conv2d(2, 1, 7, padding=3, **dd)
        self.proj = nn.Sequential(*_projection(3 * dim, dim, True, **dd))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        y = torch.cat([self.cell(x), self.near(x), self.far(x)], dim=1)
        gate = self._channel_gate(y.mean(dim=[2, 3])) + self._channel_gate(y.amax(dim=[2, 3]))
        y = y * gate.unsqueeze(-1).unsqueeze(-1)
        gate = self.cell_conv(torch.cat([y.mean(dim=1, keepdim=True), y.amax(dim=1, keepdim=True)], dim=1))
        return (self.proj(y * gate.sigmoid()) + self.shortcut(x)).permute(0, 2, 3, 1)

    def _channel_gate(self, pooled: Tensor) -> Tensor:
        return self.fc2(self.fc1(pooled).relu()).sigmoid()


def _log_amplitude(x: Tensor) -> Tensor:
    return torch.fft.fft2(at_least_float32(x), norm="ortho").abs().log1p().to(x.dtype)
