"""Linear attention over all tokens: the plain one, magnitude-aware and rank-augmented."""

from typing import Any

import torch
import torch.fx
from torch import Tensor

from visionmix.layers import at_least_float32
from visionmix.layers.half_precision import autocasts
from visionmix.mixers.feature_maps import FEATURE_MAPS, elu_plus_one
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import Attention


def key_levels(mean: Tensor, in_pairs: bool) -> Tensor:
    """Return the levels that `averages` divides keys by, from the keys' mean over all tokens (batch, 1, heads, dk).

    A rotation mixes the two channels of a pair, which therefore share one level.
    """
    if in_pairs:
        pairs = mean.unflatten(-1, (-1, 2))
        mean = pairs.mean(dim=-1, keepdim=True).expand_as(pairs).flatten(-2)
    return mean.detach() + 1e-6  # it cancels, and so do its gradients


def averages(q: Tensor, k: Tensor, v: Tensor, normaliser: Tensor, levels: Tensor) -> Tensor:
    """Return ``q (k^T v) / (n normaliser)`` (batch, tokens, heads, dv) of q, k and v (batch, n, heads, dk or dv).

    Autocast rounds what is multiplied here, and the products, to half precision. There keys over their `levels` (batch,
    1, heads, dk) and queries times them over the normaliser are weights about 1, so no product is much larger than v.
    The number of tokens goes half on each side.
    """
    return _averages(q, k, v, normaliser, levels)  # in two functions: see visionmix.graphs


@torch.fx.wrap
def _averages(q: Tensor, k: Tensor, v: Tensor, normaliser: Tensor, levels: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if not autocasts(q) and q.element_size() >= 4:
            state = (k.permute(0, 2, 3, 1) @ v.transpose(1, 2)).mul_(1.0 / k.shape[1])
            return ((q / normaliser).transpose(1, 2) @ state).transpose(1, 2)
    factor = k.shape[1] ** -0.5
    state = (k * (factor / levels)).permute(0, 2, 3, 1) @ (v * factor).transpose(1, 2)
    return ((q / normaliser).mul_(levels).transpose(1, 2) @ state).transpose(1, 2)


def dot(q: Tensor, k: Tensor) -> Tensor:
    """Return the products (batch, tokens, heads, 1) of q with one k (batch, 1, heads, dk), in float32 at least."""
    # Elementwise, so that autocast leaves it in float32: a normaliser in half precision may round to 0.
    return (q * k).sum(dim=-1, keepdim=True)


@register_mixer("linear")
class LinearAttention(Attention):
    """``out = phi(q) (phi(k)^T v) / (phi(q) sum(phi(k)))`` per head, projected as in `Attention`.

    phi is one of `visionmix.mixers.feature_maps.FEATURE_MAPS`. With `rotary`, q and k are rotated in the numerator
    alone.

    Shapes and errors are those of `Attention`; ValueError also for an unknown `feature_map`, and for `rotary` with one
    whose features are not channels.

    Source: linear transformers (Katharopoulos et al. 2020, arXiv 2006.16236), and of the feature maps those that they
    name. With ``feature_map="relu", lepe=5`` and few heads it is LiT's attention (Wang et al. 2025, arXiv 2501.12976).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        feature_map: "elu", "relu", "squared_relu", "softplus", "exp", "cosformer", "performer", "hedgehog" or "taylor".
        qkv_bias: See `Attention`, as for all that follow.
        rotary: Whether q and k have rotary position encodings.
        lepe: Kernel size of a depthwise convolution of v that is added, or None.
        gate: Whether a fourth projection multiplies the result.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        feature_map: str = "elu",
        qkv_bias: bool = True,
        rotary: bool = False,
        lepe: int | None = None,
        gate: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, rotary, lepe, gate, **dd)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is unknown; give one of {tuple(FEATURE_MAPS)}")
        if rotary and not FEATURE_MAPS[feature_map].turns:
            turned = tuple(name for name, each in FEATURE_MAPS.items() if each.turns)
            raise ValueError(
                f"feature_map={feature_map!r} makes features that are no channels, and rotary=True turns channels; "
                f"give rotary=False, or one of {turned}"
            )
        self.feature_map = FEATURE_MAPS[feature_map](num_heads, dim // num_heads, **dd)

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        qk, v = self.feature_map(at_least_float32(qk)), at_least_float32(v)
        q, k = qk.chunk(2, dim=2)
        mean = k.mean(dim=1, keepdim=True)
        normaliser = dot(q, mean) + 1e-6
        levels = key_levels(mean, True) if self.has_rotary else k.detach().abs().mean(dim=1, keepdim=True) + 1e-6
        if self.has_rotary:
            q, k = self.rotary(qk, height, width).chunk(2, dim=2)
        return averages(q, k, v, normaliser, levels)


class _Rotary(Attention):
    """The arguments and ``elu + 1`` that the published magnitude-aware and rank-augmented attention share."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        qkv_bias: bool = True,
        rotary: bool = True,
        lepe: int | None = 5,
        gate: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, rotary, lepe, gate, **dd)


@register_mixer("mala")
class MagnitudeAwareLinearAttention(_Rotary):
    """Linear attention whose weights sharpen as q grows, as a softmax's do.

    Per head of n tokens, with ``q, k`` after ``elu(x) + 1``, s = head_dim^-0.5 and z = s q mean(k):

        out = (1 + 1 / (z + 1e-6)) s / n * rot(q) (rot(k)^T v) - z mean(v)

    projected, with a depthwise convolution of v and a gate, as in `Attention`. Shapes, arguments and errors are those
    of `Attention`.

    Source: MALA (Fan et al. 2025, arXiv 2507.00698).
    """

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        qk, v = elu_plus_one(at_least_float32(qk)), at_least_float32(v)
        q, k = qk.chunk(2, dim=2)
        mean = k.mean(dim=1, keepdim=True)
        z = dot(q, mean) * self.scale
        if self.has_rotary:
            q, k = self.rotary(qk, height, width).chunk(2, dim=2)
        # (1 + 1 / (z + e)) s q is (z + e + 1) times q over its normaliser, (z + e) / s.
        out = averages(q, k, v, (z + 1e-6) / self.scale, key_levels(mean, self.has_rotary)).to(z.dtype)
        mean = v.mean(dim=1, keepdim=True)
        # (z + 1 + e) out - (z + e) mean; in place, since no gradient needs the interpolated values.
        return torch.lerp(mean, out, z + 1.000001).add_(mean, alpha=1e-6)


@register_mixer("rala")
class RankAugmentedLinearAttention(_Rotary):
    """Linear attention whose keys are weighted by the attention of the average query to them.

    Per head of n tokens, with ``q, k`` after ``elu(x) + 1`` and s = head_dim^-0.5:

        k   = n softmax_n(s mean(q) k^T) k
        out = rot(q) (rot(k)^T v) / (n q mean(k) + 1e-6 n)

    projected, with a depthwise convolution of v and a gate, as in `Attention`. Shapes, arguments and errors are those
    of `Attention`.

    Source: RALA (Fan et al. 2024, arXiv 2411.07635).
    """

    def attend(self, qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Return the attended values (batch, tokens, heads, head_dim)."""
        q, k = elu_plus_one(at_least_float32(qk)).chunk(2, dim=2)
        v, tokens = at_least_float32(v), v.shape[1]
        weights = torch.softmax(dot(k, q.mean(dim=1, keepdim=True)) * self.scale, dim=1)
        k = k * (weights * tokens)
        mean = k.mean(dim=1, keepdim=True)
        normaliser = dot(q, mean) + 1e-6
        if self.has_rotary:
            q, k = self.rotary(q, height, width), self.rotary(k, height, width)
        return averages(q, k, v, normaliser, key_levels(mean, self.has_rotary))
