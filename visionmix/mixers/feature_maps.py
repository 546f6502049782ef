"""Feature maps of linear attention, by name: what takes the place of the exponential of a softmax."""

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F


def elu_plus_one(x: Tensor) -> Tensor:
    """Return ``elu(x) + 1``, exp(x) below 0 and x + 1 above; docs/kernels.md has what `F.elu` costs."""
    # In place, since no gradient needs the old values. F.threshold stands for relu, which would keep its result for it.
    return F.threshold(x, 0.0, 0.0).add_(torch.clamp(x, max=0.0).exp_())


class FeatureMap(nn.Module):
    """A feature map: queries and keys (batch, tokens, 2 heads, head_dim), queries first, to (..., features).

    The features are float32 where the input is. ``q . k`` of features is not negative.

    Args:
        heads: Heads of the queries.
        head_dim: Channels of a head.
    """

    turns = True  # whether a feature is made of one channel, so that rotary position encodings turn what they know

    def __init__(self, heads: int, head_dim: int, **dd: Any) -> None:
        super().__init__()
        self.head_dim = head_dim


class Elu(FeatureMap):
    """``elu(x) + 1``. Source: linear transformers (Katharopoulos et al. 2020, arXiv 2006.16236)."""

    def forward(self, qk: Tensor) -> Tensor:
        return elu_plus_one(qk)


class Relu(FeatureMap):
    """``relu(x)``. Source: EfficientViT (Cai et al. 2022, arXiv 2205.14756)."""

    def forward(self, qk: Tensor) -> Tensor:
        return F.relu(qk)


class SquaredRelu(FeatureMap):
    """``relu(x)^2``. Source: the activation of Primer (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, qk: Tensor) -> Tensor:
        return F.relu(qk).square()


class Softplus(FeatureMap):
    """``softplus(x)``."""

    def forward(self, qk: Tensor) -> Tensor:
        return F.softplus(qk)


class Exp(FeatureMap):
    """``exp(x - c)``, where c is a query's largest channel, and for keys the largest of all in a head.

    c cancels in linear attention but for the epsilon of its normaliser.
    """

    def forward(self, qk: Tensor) -> Tensor:
        return _stable_exp(qk)


class CosFormer(FeatureMap):
    """``[relu(x) cos(a), relu(x) sin(a)]`` of the i-th of n tokens, with ``a = pi i / 2 n``.

    Weights of a query and a key are ``relu(q) . relu(k) cos(pi / 2 (i - j) / n)``: they fall with the distance in the
    sequence. Source: cosFormer (Qin et al. 2022, arXiv 2202.08791).
    """

    turns = False

    def forward(self, qk: Tensor) -> Tensor:
        cosine, sine = _quarter_turn(qk)
        x = F.relu(qk)
        return torch.cat([x * cosine, x * sine], dim=-1)


class Performer(FeatureMap):
    """Positive random features of a softmax: ``(exp(w_r . u - |u|^2 / 2 - c) + 1e-4) / m^0.5``, u = x head_dim^-0.25.

    The m = ``head_dim log(head_dim)``, at least 1, vectors w are normal and orthogonal in blocks of head_dim, the same
    for all heads; they are drawn once and kept as a buffer. c is as in `Exp`, over features in place of channels.
    Source: FAVOR+ of Performer (Choromanski et al. 2020, arXiv 2009.14794).
    """

    turns = False
    projection: Tensor

    def __init__(self, heads: int, head_dim: int, **dd: Any) -> None:
        super().__init__(heads, head_dim)
        count = max(1, int(head_dim * math.log(head_dim)))
        self.register_buffer("projection", torch.empty(count, head_dim, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the random vectors."""
        count, dim = self.projection.shape
        if self.projection.is_meta:
            return
        normal = torch.randn(-(-count // dim), dim, dim, dtype=torch.float64)
        blocks = torch.linalg.qr(normal)[0].transpose(1, 2).flatten(0, 1)[:count]
        lengths = torch.randn(count, dim).norm(dim=1, keepdim=True)
        with torch.no_grad():
            self.projection.copy_(blocks * lengths)

    def forward(self, qk: Tensor) -> Tensor:
        x = qk * qk.shape[-1] ** -0.25
        projection = self.projection.to(x.dtype)
        logarithms = x @ projection.t() - 0.5 * x.square().sum(dim=-1, keepdim=True)
        return (_stable_exp(logarithms) + 1e-4) * projection.shape[0] ** -0.5


class Hedgehog(FeatureMap):
    """``[softmax(y), softmax(-y)]`` over the channels of a head, with ``y = W x + b``.

    Queries and keys of each head have a W, which begins as the identity, and a b of their own. Source: Hedgehog (Zhang
    et al. 2024, arXiv 2402.04347), with the softmax over features of its authors' code.
    """

    turns = False

    def __init__(self, heads: int, head_dim: int, **dd: Any) -> None:
        super().__init__(heads, head_dim)
        self.weight = nn.Parameter(torch.empty(2 * heads, head_dim, head_dim, **dd))
        self.bias = nn.Parameter(torch.empty(2 * heads, head_dim, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Make every W the identity and every b 0."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.weight.shape[1]).expand_as(self.weight))
            nn.init.zeros_(self.bias)

    def forward(self, qk: Tensor) -> Tensor:
        y = torch.einsum("bnhi,hoi->bnho", qk, self.weight.to(qk.dtype)) + self.bias
        return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)


class Taylor(FeatureMap):
    """``[1, u, u u^T / 2^0.5]`` with ``u = x head_dim^-0.25``: weights are ``1 + s + s^2 / 2`` of a softmax's score s.

    ``1 + head_dim + head_dim (head_dim + 1) / 2`` features. Source: Based (Arora et al. 2024, arXiv 2402.18668).
    """

    turns = False

    def forward(self, qk: Tensor) -> Tensor:
        x = qk * qk.shape[-1] ** -0.25
        parts = [torch.ones_like(x[..., :1]), x, x.square() * 0.5**0.5]
        # A product of two different channels counts twice.
        parts.extend([x[..., :index] * x[..., index : index + 1] for index in range(1, self.head_dim)])
        return torch.cat(parts, dim=-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "squared_relu": SquaredRelu,
    "softplus": Softplus,
    "exp": Exp,
    "cosformer": CosFormer,
    "performer": Performer,
    "hedgehog": Hedgehog,
    "taylor": Taylor,
}


@torch.fx.wrap
def _stable_exp(qk: Tensor) -> Tensor:
    """Return ``exp(qk - c)`` of queries and keys (batch, tokens, 2 heads, features); see `Exp`."""
    largest = qk.detach().amax(dim=-1, keepdim=True)
    q, k = largest.chunk(2, dim=2)
    return torch.exp(qk - torch.cat([q, k.amax(dim=1, keepdim=True).expand_as(k)], dim=2))


@torch.fx.wrap
def _quarter_turn(qk: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, (tokens, 1, 1), of angles that rise evenly from 0 towards a right angle."""
    tokens = qk.shape[1]
    angle = torch.arange(tokens, dtype=qk.dtype, device=qk.device) * (0.5 * math.pi / tokens)
    return angle.cos()[:, None, None], angle.sin()[:, None, None]
