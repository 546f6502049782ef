"""Attention with a Gaussian kernel instead of softmax, through landmarks: the mixer of SOFT and SOFT++."""

from typing import Any

import torch
import torch.fx
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.half_precision import at_least_float32, autocasts
from visionmix.layers.maps import pad_to
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


class _HeadConv(nn.Conv2d):
    """A depthwise convolution of maps (batch, dim, height, width), one kernel for all channels of a head."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, **dd: Any) -> None:
        padding = kernel_size // 2
        super().__init__(num_heads, num_heads, kernel_size, padding=padding, groups=num_heads, bias=False, **dd)
        self.head_dim = dim // num_heads

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.repeat_interleave(self.head_dim, dim=0)
        return F.conv2d(x, weight, padding=self.padding, groups=weight.shape[0])


@register_mixer("softmax_free")
class SoftmaxFreeAttention(nn.Module):
    """Attention by a Gaussian kernel, of low rank through landmarks, at a cost linear in the cells.

    With ``K(a, b) = exp(-|a - b|^2 / 2)`` for every row of a and of b, per head:

        q   = head_dim^-0.25 W_q x,  v = W_v x
        l   = gelu(norm(conv(q))), with kernel and stride sr_ratio: the landmarks
        out = W_o (K(q, l) R K(q, l)^T v + depthwise(v))

    Queries are keys. R approximates the inverse of ``K(l, l)`` by Newton's iteration, ``V = 2 V - V P V`` from ``V = s
    P`` on. Row sums of ``K(l, l)`` are at most r in a head, and at most m in all heads of an image.

        SOFT:    P = K(l, l) + 0.01,  s = 1.8 / r^2,  R = V
        SOFT++:  P = K(l, l),  s = 2 / m^2,  R = D^-1/2 V D^-1/2, where D has the row sums of P on its diagonal

    (0.01 on the diagonal). In SOFT++, s is halved, at most ten times, until no column of ``1 - s P^2`` has an absolute
    sum above 1.01. Where that matrix has an eigenvalue of -1, as for one landmark or for equal row sums, the iteration
    would stand still: there s is nine tenths of it. The gradient of V is that of the inverse, ``-V dP V``, and none
    goes through s. The kernels and the iteration are computed in float32 at least, under autocast too.

    The convolutions have the same weights for all channels of a head (depthwise), or for all heads (landmarks). Rows
    and columns beyond the last whole square of `sr_ratio` cells make no landmark; a map smaller than a square is padded
    to one with zeros, at the bottom and on the right.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: SOFT (Lu et al. 2021, arXiv 2110.11945); SOFT++ (Lu et al. 2022, arXiv 2207.03341).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        sr_ratio: Rows and columns of cells that a landmark stands for.
        kernel_size: Rows and columns of the depthwise convolution, an odd number.
        normalised: Whether R is that of SOFT++ rather than that of SOFT.
        published_step: Whether s is that of SOFT++'s published code: m is over the whole batch, s is halved for all of
            it, and nothing keeps the iteration from standing still. An image's result may depend on the others.
        iterations: Steps of Newton's iteration.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `sr_ratio` or `iterations` is below 1, `kernel_size` is even, or
            `published_step` is asked for without `normalised`.
    """

    entry = "qv"

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        sr_ratio: int = 2,
        kernel_size: int = 3,
        normalised: bool = True,
        published_step: bool = False,
        iterations: int = 20,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        for name, value in (("sr_ratio", sr_ratio), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} has no middle; give an odd number")
        if published_step and not normalised:
            raise ValueError("published_step=True is a step of SOFT++ alone; give normalised=True, or leave it out")
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.scale = head_dim**-0.25
        self.sr_ratio = sr_ratio
        self.normalised = normalised
        self.published_step = published_step
        self.iterations = iterations
        self.qv = nn.Linear(dim, 2 * dim, **dd)
        self.landmark_conv = nn.Conv2d(head_dim, head_dim, sr_ratio, stride=sr_ratio, bias=False, **dd)
        self.landmark_norm = LayerNorm(head_dim, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.conv = _HeadConv(dim, num_heads, kernel_size, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        q, v = self.qv(x).chunk(2, dim=-1)
        q = q * self.scale
        landmarks = self.act(self.landmark_norm(self._pooled(q)))
        local = self.conv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, v = (each.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, v))
        y = _attend(q, landmarks, v, self.normalised, self.published_step, self.iterations)
        y = y.to(local.dtype).transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj(y + local)

    def _pooled(self, q: Tensor) -> Tensor:
        """Return the convolution of the map q (batch, height, width, dim), (batch, heads, landmarks, head_dim)."""
        maps = pad_to(q, self.sr_ratio).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)
        pooled = self.landmark_conv(maps.flatten(0, 1)).flatten(2).transpose(1, 2)
        return pooled.unflatten(0, (-1, self.num_heads))


@torch.fx.wrap
def _attend(q: Tensor, landmarks: Tensor, v: Tensor, normalised: bool, published_step: bool, iterations: int) -> Tensor:
    """Return ``K(q, l) R K(q, l)^T v`` (batch, heads, cells, head_dim), in float32 at least."""
    if not torch.jit.is_scripting():
        if autocasts(q):
            with torch.autocast(q.device.type, enabled=False):  # half precision is too coarse for the iteration
                return _attended(q, landmarks, v, normalised, published_step, iterations)
    return _attended(q, landmarks, v, normalised, published_step, iterations)


def _attended(
    q: Tensor, landmarks: Tensor, v: Tensor, normalised: bool, published_step: bool, iterations: int
) -> Tensor:
    q, landmarks, v = at_least_float32(q), at_least_float32(landmarks), at_least_float32(v)
    weights = gaussian(q, landmarks)
    inverse = kernel_inverse(gaussian(landmarks, landmarks), normalised, published_step, iterations)
    return weights @ (inverse @ (weights.transpose(-2, -1) @ v))


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """Return ``exp(-|a_i - b_j|^2 / 2)`` (..., n, m) of a (..., n, dim) and b (..., m, dim)."""
    # One product of vectors with two channels more: ``a b - a^2 / 2 - b^2 / 2``.
    a_half, b_half = -0.5 * a.square().sum(dim=-1, keepdim=True), -0.5 * b.square().sum(dim=-1, keepdim=True)
    a = torch.cat([a, a_half, torch.ones_like(a_half)], dim=-1)
    b = torch.cat([b, torch.ones_like(b_half), b_half], dim=-1)
    return torch.exp(a @ b.transpose(-2, -1))


def kernel_inverse(kernel: Tensor, normalised: bool, published_step: bool, iterations: int) -> Tensor:
    """Return R of `SoftmaxFreeAttention` from the kernel of the landmarks, both (batch, heads, landmarks, landmarks).

    Args:
        kernel: Symmetric matrices of positive entries, 1 on the diagonal.
        normalised: As in `SoftmaxFreeAttention`, as for the others.
        published_step: Whether the step size is one for the batch.
        iterations: Steps.
    """
    sums = kernel.sum(dim=-1, keepdim=True)
    if normalised:
        root = sums.rsqrt()
        step = _common_step(kernel.detach(), sums.detach(), published_step)
        return root * newton_inverse(kernel, step, iterations) * root.transpose(-2, -1)
    step = 1.8 / sums.detach().amax(dim=[-2, -1], keepdim=True).square()
    cell = torch.arange(kernel.shape[-1], device=kernel.device)
    identity = (cell.unsqueeze(1) == cell).to(kernel.dtype)
    return newton_inverse(kernel + 0.01 * identity, step, iterations)


def _common_step(kernel: Tensor, sums: Tensor, published: bool) -> Tensor:
    """Return SOFT++'s step sizes (batch, heads, 1, 1), or the published one for the whole batch (1, 1, 1, 1)."""
    axes = [0, 1, 2] if published else [1, 2]
    largest = sums.amax(dim=axes, keepdim=True)  # (images, 1, 1, 1)
    step = 2.0 / largest.square()
    # Entries of K^2 are positive: if d is that on the diagonal of a column and c the column's sum, |1 - s K^2| sums to
    # |1 - s d| + s (c - d). That is convex in s, and 1 at 0: where one s will do, all smaller ones do.
    diagonal = kernel.square().sum(dim=-1, keepdim=True)
    others = kernel @ sums - diagonal
    halved = step * torch.exp2(-torch.arange(10, device=kernel.device, dtype=kernel.dtype))
    norms = ((1.0 - halved * diagonal).abs() + halved * others).amax(dim=axes, keepdim=True)
    step = step * torch.exp2(-(norms > 1.01).to(kernel.dtype).sum(dim=-1, keepdim=True))
    if published:
        return step
    # The largest eigenvalue of K^2, by power iteration. Twenty steps of Newton's converge where s times it is below 2 -
    # 2^-14.
    vector = sums / largest
    for _ in range(4):
        vector = kernel @ vector / largest
    eigenvalue = (kernel @ vector).square().sum(dim=-2, keepdim=True) / vector.square().sum(dim=-2, keepdim=True)
    return torch.where(step * eigenvalue > 2.0 - 2.0**-14, 0.9 * step, step)


def newton_inverse(matrix: Tensor, step: Tensor, iterations: int) -> Tensor:
    """Return about the inverse V of symmetric matrices P: ``V = step P``, then ``V = 2 V - V P V``, `iterations` times.

    The gradient is that of the inverse, ``-V dP V``; none goes to the steps, and the iterations keep no tensors for it.

    Args:
        matrix: P, (batch, heads, n, n).
        step: Step sizes, of a shape that broadcasts to that of P.
        iterations: Steps.
    """
    fixed = matrix.detach()
    flat, inverse = fixed.flatten(0, 1), (step * fixed).flatten(0, 1)
    for _ in range(iterations):
        inverse = torch.baddbmm(inverse, inverse @ flat, inverse, beta=2.0, alpha=-1.0)
    inverse = inverse.view(matrix.shape)
    if matrix.requires_grad:
        inverse = inverse - inverse @ (matrix - fixed) @ inverse  # less 0, which has the gradient
    return inverse
