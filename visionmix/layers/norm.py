"""Norms over the channels of NHWC maps and of sequences."""

from typing import Any

import timm.layers
import torch
import torch.fx
from timm.layers import LayerNorm
from timm.layers.fast_norm import fast_rms_norm
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.fold import affine_of, fused
from visionmix.layers.half_precision import at_least_float32
from visionmix.layers.tiles import eager_inference


@torch.fx.wrap
def _no_narrower(parameter: Tensor, x: Tensor) -> Tensor:
    """Return `parameter`, in the type of `x` where that is wider."""
    return parameter.to(x.dtype) if x.element_size() > parameter.element_size() else parameter


class ScanLayerNorm(LayerNorm):
    """timm's `LayerNorm` for the result of a scan, float32 even where the model is of half precision.

    Computes in the wider type of input and parameters and returns that of the parameters. Sums over a sequence may lie
    above 65504, float16's largest number, so a scan's result is rounded after the norm. timm's fast norm would round it
    before, and is not used.

    Shapes: (..., dim) to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _no_narrower(self.weight, x), _no_narrower(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


@torch.fx.wrap
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not torch.jit.is_scripting():
        if x.dtype == weight.dtype and eager_inference(x):
            y = at_least_float32(x)
            scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square().div_(x.shape[-1]).add_(eps).rsqrt_()
            y = y * scale if y is x else y.mul_(scale)
            return y.mul_(weight).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


class RmsNorm(timm.layers.RmsNorm):
    """timm's `RmsNorm`, with fewer passes over memory in eager inference on a CPU.

    PyTorch's norm writes the squares and each product to a new tensor there.

    Shapes: (..., dim) to the same.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._fast_norm:
            return fast_rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.eps)


class ScanRmsNorm(timm.layers.RmsNorm):
    """timm's `RmsNorm` for the result of a scan, as `ScanLayerNorm` is its `LayerNorm`.

    Shapes: (..., dim) to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, _no_narrower(self.weight, x), self.eps).to(self.weight.dtype)


class OffsetLayerNorm(LayerNorm):
    """timm's `LayerNorm` with its weight stored less one, ``(1 + weight) * y + bias`` of the normalised y.

    Shapes: (..., dim) to the same.

    Source: xLSTM's code (Beck et al. 2024, arXiv 2405.04517).
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class BatchNorm(nn.Module):
    """Batch normalisation of every channel where channels come last, by a `torch.nn.BatchNorm2d` called `bn`.

    Shapes: (batch, ..., dim) to the same: maps and sequences.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.

    Args:
        dim: Channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5, **dd: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, eps=eps, **dd)

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        """Return (weight, bias), both (dim,), with which this is ``weight * x + bias`` in inference."""
        return affine_of(self.bn)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Return one layer that computes what this one does in inference."""
        return fused(self)

    def normalised(self, x: Tensor) -> Tensor:
        """Return the batch norm of x (batch, ..., dim)."""
        # One axis of all cells, since maps have two and sequences one. With a last axis of 1, the norm's fast paths see
        # a map whose channels come last.
        y = self.bn(x.flatten(1, -2).unsqueeze(2).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalised(x)
