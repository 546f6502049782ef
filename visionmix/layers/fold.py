"""Folding norms, which in inference are a factor and a summand per channel, into the layers beside them.

timm's `reparameterize_model` replaces a module by what its `fuse()` returns, and else calls its `reparameterize()`. A
layer or block that holds a norm beside a linear layer folds the one into the other there; a norm that remains becomes a
`ChannelAffine`.
"""

import torch
from torch import Tensor, nn

from visionmix.layers.half_precision import at_least_float32
from visionmix.private_api import AnyBatchNorm


class ChannelAffine(nn.Module):
    """``weight * x + bias``, with a number per channel for each.

    Shapes: (..., dim) to the same.

    Args:
        weight: The factors (dim,).
        bias: The summands (dim,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return (weight, bias), both (dim,), if `norm` computes ``weight * x + bias`` in inference; else None.

    Batch norms with running statistics are known; any other norm gives its own by a method `as_affine`.
    """
    if not isinstance(norm, AnyBatchNorm):
        return norm.as_affine() if hasattr(norm, "as_affine") else None
    if norm.running_mean is None or norm.running_var is None:
        return None
    weight = torch.rsqrt(at_least_float32(norm.running_var) + norm.eps)
    if norm.weight is not None:
        weight = weight * norm.weight.detach()
    bias = -weight * norm.running_mean
    return weight, bias if norm.bias is None else bias + norm.bias.detach()


def fused(norm: nn.Module) -> nn.Module:
    """Return a `ChannelAffine` that computes what `norm` does in inference, or `norm` if it is not affine there."""
    affine = affine_of(norm)
    if affine is None:
        return norm
    like = next(value for value in norm.parameters() if value.is_floating_point())
    return ChannelAffine(*(each.to(like.dtype) for each in affine))


def entry_of(layer: nn.Module) -> nn.Module | None:
    """Return the linear layer that alone reads the input of `layer`, cell by cell; None if there is no such layer.

    A class names it in its attribute `entry`. A layer that pads its input first, or reads it once more, has none.
    """
    entry = getattr(layer, "entry", None)
    return None if entry is None else getattr(layer, entry)


def fold_before(norm: nn.Module, linear: nn.Module | None) -> nn.Module:
    """Fold `norm` into the linear layer that reads its output; return what then stands in the norm's place.

    That is the identity, or `norm` where it is not affine in inference or `linear` is not a plain linear layer.
    """
    affine = affine_of(norm)
    if affine is None or type(linear) is not nn.Linear:
        return norm
    weight, bias = affine
    with torch.no_grad():
        wide = at_least_float32(linear.weight)
        _set(linear, wide * weight, wide @ bias + (0 if linear.bias is None else linear.bias))
    return nn.Identity()


def fold_behind(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm` into the convolution or linear layer whose output it reads; return what then stands in its place.

    That is the identity, or `norm` where it is not affine in inference or `layer` is not a plain `Conv2d` or `Linear`.
    """
    affine = affine_of(norm)
    if affine is None or type(layer) not in (nn.Conv2d, nn.Linear):
        return norm
    weight, bias = affine
    with torch.no_grad():
        wide = at_least_float32(layer.weight)
        scaled = wide * weight.reshape(-1, *[1] * (wide.ndim - 1))
        _set(layer, scaled, bias if layer.bias is None else weight * layer.bias + bias)
    return nn.Identity()


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    like = layer.weight
    layer.weight, layer.bias = (
        nn.Parameter(each.to(like.dtype), requires_grad=like.requires_grad) for each in (weight, bias)
    )
