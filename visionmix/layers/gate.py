"""Gates: of a recurrence, of channels."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.half_precision import at_least_float32
from visionmix.layers.norm import ScanLayerNorm
from visionmix.layers.tiles import in_tiles

_TILE = 2**20  # numbers, about a core's cache


@torch.fx.wrap
def _log_sigmoid(x: Tensor) -> Tensor:
    x = at_least_float32(x)
    if x.device.type != "cpu":
        return F.logsigmoid(x)
    y = x.clamp(min=-20.0).sigmoid_()  # in place, since no gradient needs the old values
    if y.requires_grad:
        return torch.where(x <= -20.0, x, y.log())
    return torch.minimum(x, y.log_())  # the same in fewer passes; a gradient would go half to each where both are equal


class LogSigmoid(nn.Module):
    """``log(sigmoid(x))``, element by element, in float32 at least; absolute error at most 1e-7 in float32.

    Below -20 it is x itself (off by exp(-20)); above, the logarithm of the sigmoid as it stands. PyTorch's own
    `logsigmoid` takes log1p, which is exact to the last digit near 0 and on a CPU took eight times as long; elsewhere
    it is one kernel instead of four, and is used.

    Shapes: any to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _log_sigmoid(x)


class ChannelGate(nn.Module):
    """Every channel times a gate made from the mean over all cells: ``x * sigmoid(W_2 gelu(W_1 mean(norm(x))))``.

    Shapes: (batch, height, width, ..., dim) to the same: axes between map and channels, of several scans, have gates of
    their own.

    Source: the BiAttn of LightViT (Huang et al. 2022, arXiv 2207.05557) without its spatial half, as EfficientVMamba
    (Pei et al. 2024, arXiv 2403.09977) and LocalMamba (Huang et al. 2024, arXiv 2403.09338) have it.

    Args:
        dim: Channels; the hidden layer has an eighth of them.
        norm_eps: Epsilon of the norm.
    """

    def __init__(self, dim: int, *, norm_eps: float = 1e-5, **dd: Any) -> None:
        super().__init__()
        hidden = max(1, dim // 8)
        self.norm = ScanLayerNorm(dim, eps=norm_eps, **dd)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def gates(self, x: Tensor) -> Tensor:
        """Return the factors (batch, 1, 1, ..., dim) of x (batch, height, width, ..., dim), in its type."""
        return torch.sigmoid(self.fc2(self.act(self.fc1(self._pooled(x))))).to(x.dtype)

    def _pooled(self, x: Tensor) -> Tensor:
        """Return the mean over all cells of the norm, (batch, 1, 1, ..., dim)."""
        if not torch.jit.is_scripting():
            if in_tiles(self, x, x.numel()):
                rows = max(1, _TILE * x.shape[1] // x.numel())
                sums = [self.norm(part).sum(dim=[1, 2], keepdim=True) for part in x.split(rows, dim=1)]
                return torch.stack(sums).sum(dim=0) / (x.shape[1] * x.shape[2])
        return self.norm(x).mean(dim=[1, 2], keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x)
