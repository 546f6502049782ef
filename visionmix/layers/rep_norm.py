"""Batch norms in place of a transformer's layer norms, which fold into linear layers after training."""

from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.layers.fold import affine_of, fused
from visionmix.layers.norm import BatchNorm


class RepBN(BatchNorm):
    """Batch normalisation beside a scaled identity: ``batch_norm(x) + alpha * x``, alpha a learned number, first 1.

    In inference that is one factor and one summand a channel, which timm's `reparameterize_model` folds into a linear
    layer beside it: see `visionmix.layers.fold`.

    Shapes: (batch, ..., dim) to the same: maps and sequences.

    Source: SLAB (Guo et al. 2024, arXiv 2405.11582).

    Args:
        dim: Channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5, **dd: Any) -> None:
        super().__init__(dim, eps, **dd)
        self.alpha = nn.Parameter(torch.ones(1, **dd))

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        """Return (weight, bias), both (dim,), with which this is ``weight * x + bias`` in inference."""
        affine = affine_of(self.bn)
        return None if affine is None else (affine[0] + self.alpha.detach(), affine[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.normalised(x) + self.alpha * x


class LinearNorm(nn.Module):
    """A layer norm that over training becomes a `RepBN`: ``lambda * layer_norm(x) + (1 - lambda) * rep_bn(x)``.

    In training, ``lambda = max(0, 1 - done / share)``, where `done` is the share of training steps done, which
    `set_progress` sets (for a whole model, `visionmix.backbones.Backbone.set_progress`). In evaluation lambda is 0. It
    is also 0 until `set_progress` is called, so that training and evaluation agree when finished weights are trained
    further.

    The published code counts forward passes instead, ``lambda = 1 - passes / 60000`` in its Swins: 60000 of the 375000
    that 300 epochs of ImageNet-1k have in batches of 1024, a share of 0.16.

    Lambda is a buffer that state dicts leave out, since a resumed run sets its progress again. Both norms run at every
    step, so that all parameters have gradients; at the ends of the schedule some are zeros.

    Shapes: (batch, ..., dim) to the same: maps and sequences.

    Source: progressive re-parameterised batch norm, SLAB (Guo et al. 2024, arXiv 2405.11582).

    Args:
        dim: Channels.
        share: Share of training after which the layer norm has no part; 0 to leave it out from the start.
        eps: Added to the layer norm's variance.

    Raises:
        ValueError: `share` is not between 0 and 1.
    """

    def __init__(self, dim: int, *, share: float = 0.16, eps: float = 1e-5, **dd: Any) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is not a share of training; give a number from 0 to 1")
        self.share = share
        self.norm1 = LayerNorm(dim, eps=eps, **dd)
        self.norm2 = RepBN(dim, **dd)
        # A tensor, which compiled graphs read again at every step.
        self.register_buffer("layer_norm_part", torch.zeros((), **dd), persistent=False)

    @torch.jit.ignore
    def set_progress(self, done: float) -> None:
        """Set lambda for a share `done` of the training steps done, from 0 to 1."""
        self.layer_norm_part.fill_(1 - done / self.share if done < self.share else 0.0)

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        """Return (weight, bias), both (dim,), with which this is ``weight * x + bias`` in inference."""
        return self.norm2.as_affine()

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Return one layer that computes what this one does in inference."""
        return fused(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(x)
        if self.training:
            y = self.layer_norm_part * self.norm1(x) + (1 - self.layer_norm_part) * y
        return y
