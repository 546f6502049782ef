"""Linear attention between binary codes of a learned hash: EcoFormer's mixer."""

import math
from typing import Any, Final

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.half_precision import at_least_float32, autocasts
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


class KernelHash(nn.Module):
    """Binary codes of vectors, by the signs of projections of their Gaussian kernel to a few anchors.

    For the unit vectors q of a head, with means over the tokens i of an image and the anchors j:

        d_ij  = |q_i - anchor_j|^2
        K_ij  = exp(-d_ij / (2 mean(d)))
        codes = sign((K - offset) W^T)

    so a code is a number of -1, 1 or, at 0, 0. Its gradient is that of the argument, where this is between -1 and 1.
    Anchors, offset and W are buffers, which `fit` learns from vectors; before that they are random. All is computed in
    float32 at least.

    Shapes: (batch, heads, tokens, head_dim) to (batch, heads, tokens, bits).

    Source: kernel-based supervised hashing (Liu et al. 2012), as EcoFormer has it (Liu et al. 2022, arXiv 2209.09004).

    Args:
        num_heads: Heads, each with a hash of its own.
        head_dim: Channels of a head.
        bits: Numbers in a code.
        num_anchors: Anchors of a head.
    """

    def __init__(self, num_heads: int, head_dim: int, bits: int, num_anchors: int, **dd: Any) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.empty(num_heads, num_anchors, head_dim, **dd))
        self.register_buffer("offset", torch.empty(num_heads, 1, num_anchors, **dd))
        self.register_buffer("weight", torch.empty(num_heads, bits, num_anchors, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the anchors among all directions and W from a normal distribution."""
        with torch.no_grad():
            self.anchors.copy_(F.normalize(torch.randn_like(self.anchors), dim=-1))
            self.offset.fill_(math.exp(-0.5))  # the kernel at the mean distance
            self.weight.normal_()

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, q: Tensor, neighbours: int = 10, steps: int = 100) -> None:
        """Learn the hash from unit vectors q (batch, heads, tokens, head_dim), starting at the present W.

        The anchors become vectors drawn from q, the offset the mean of K. A pair of tokens has similarity 1 where one
        of them is among the `neighbours` most similar to the other, -1 where it is among the least similar, else 0. Bit
        after bit, W then learns to write the matrix S of similarities times `bits` as a sum of products of codes, by
        `steps` steps of gradient descent from ``y^T S y`` of the bit y, of which earlier bits' products are subtracted
        from S. A result is kept where it is better than the start.

        Args:
            q: The vectors.
            neighbours: Similar tokens, and as many dissimilar ones, for each token.
            steps: Steps for each bit.
        """
        q = at_least_float32(q)
        tokens = q.shape[2]
        bits, count = self.weight.shape[1:]
        cells = q.transpose(0, 1).flatten(1, 2)  # of all images
        chosen = torch.randint(cells.shape[1], (count,), device=q.device)
        if cells.shape[1] >= count:
            chosen = torch.randperm(cells.shape[1], device=q.device)[:count]
        self.anchors.copy_(cells[:, chosen])
        kernel = _kernel(q, at_least_float32(self.anchors))
        self.offset.copy_(kernel.mean(dim=(0, 2)).unsqueeze(1))
        kernel = kernel - at_least_float32(self.offset)
        near, far = _extremes(q, min(neighbours, tokens // 2))
        earlier: list[Tensor] = []

        def loss(y: Tensor) -> Tensor:
            """Return ``-y^T S y / (tokens * bits)``, the mean over images and heads."""
            similar = bits * (y * (_gathered(y, near) - _gathered(y, far))).sum(dim=-1)
            for code in earlier:
                similar = similar - (code * y).sum(dim=-1).square()
            return -similar.mean() / (tokens * bits)

        def sign(row: Tensor) -> Tensor:
            return torch.where(torch.einsum("bhnm,hm->bhn", kernel, row) > 0, 1.0, -1.0).to(kernel.dtype)

        for bit in range(bits):
            start = at_least_float32(self.weight[:, bit])
            row = start.clone().requires_grad_()
            optimiser = torch.optim.SGD([row], lr=5e-4, momentum=0.9, nesterov=True)
            with torch.enable_grad():
                for _ in range(steps):
                    optimiser.zero_grad()
                    loss(torch.tanh(0.5 * torch.einsum("bhnm,hm->bhn", kernel, row))).backward()
                    optimiser.step()
            best = row.detach() if loss(sign(row.detach())) < loss(sign(start)) else start
            self.weight[:, bit] = best
            earlier.append(sign(best))

    def forward(self, q: Tensor) -> Tensor:
        return _codes(q, self.anchors, self.offset, self.weight)


@torch.fx.wrap
def _codes(q: Tensor, anchors: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if autocasts(q):
            with torch.autocast(q.device.type, enabled=False):  # signs of sums that half precision would turn
                return _signs(q, anchors, offset, weight)
    return _signs(q, anchors, offset, weight)


def _signs(q: Tensor, anchors: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    kernel = _kernel(at_least_float32(q), at_least_float32(anchors))
    y = (kernel - at_least_float32(offset)) @ at_least_float32(weight).transpose(-2, -1)
    codes = torch.sign(y.detach())
    if y.requires_grad:
        passed = y.clamp(-1.0, 1.0)
        codes = codes + (passed - passed.detach())  # plus 0, which has the gradient
    return codes


def _kernel(q: Tensor, anchors: Tensor) -> Tensor:
    """Return K of `KernelHash`, (batch, heads, tokens, anchors)."""
    squares = q.square().sum(dim=-1, keepdim=True) + anchors.square().sum(dim=-1).unsqueeze(-2)
    distance = squares - 2.0 * q @ anchors.transpose(-2, -1)
    mean = distance.mean(dim=[-2, -1], keepdim=True).clamp(min=1e-6)  # 0 where all vectors are one anchor
    return torch.exp(distance / (-2.0 * mean))


def _extremes(q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers (batch, heads, tokens, count) of the tokens most similar to each, and of the least similar."""
    near, far = [], []
    for some in q.split(512, dim=2):  # rows of the matrix of all pairs, a few at a time
        similarity = some @ q.transpose(-2, -1)
        near.append(similarity.topk(count, dim=-1).indices)
        far.append(similarity.topk(count, dim=-1, largest=False).indices)
    return torch.cat(near, dim=2), torch.cat(far, dim=2)


def _gathered(y: Tensor, indices: Tensor) -> Tensor:
    """Return the sums (batch, heads, tokens) of the numbers y (batch, heads, tokens) at the indices of each token."""
    return y.gather(-1, indices.flatten(2)).unflatten(-1, indices.shape[2:]).sum(dim=-1)


@register_mixer("kernel_hash")
class KernelHashAttention(nn.Module):
    """Linear attention whose queries and keys are the same binary codes, so that products with them are sums.

    Per head, with the codes b of `KernelHash`, of as many ``bits``, from the unit vectors ``q / |q|``:

        q, v = W x
        out  = W_o ((sum_j (b_i b_j^T + bits + 1) v_j) / (sum_j (b_i b_j^T + bits + 1)))

    Weights are positive, and sum to 1. The cost is linear in the cells.

    The hash is random until ``calibrate(x)`` fits it to maps; ``model.calibrate(images)`` does so for all mixers of a
    model. Its numbers are buffers of the model's state.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: EcoFormer (Liu et al. 2022, arXiv 2209.09004).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        bits: Numbers in a code.
        num_anchors: Vectors that the hash compares with.
        qkv_bias: Whether W has a bias.
        published_sum: Whether the numerator's ``(bits + 1) sum_j v_j`` is ``(bits + 1) v_i``, as in the published code,
            by which its weights were trained. Weights then do not sum to 1.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `bits` or `num_anchors` is below 1.
    """

    entry = "qv"
    published_sum: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        bits: int = 16,
        num_anchors: int = 25,
        qkv_bias: bool = True,
        published_sum: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        for name, value in (("bits", bits), ("num_anchors", num_anchors)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        self.num_heads = num_heads
        self.bits = bits
        self.published_sum = published_sum
        self.qv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.hash = KernelHash(num_heads, dim // num_heads, bits, num_anchors, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors and values, both (batch, heads, cells, head_dim)."""
        q, v = self.qv(x).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.normalize(at_least_float32(q), dim=-1), v

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Fit the hash to maps x (batch, height, width, dim)."""
        self.hash.fit(self._projected(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        q, v = self._projected(x)
        codes, v = self.hash(q), at_least_float32(v)
        # Sums over the number of cells, which float16 can hold.
        state = codes.transpose(-2, -1) @ (v / (height * width))
        own = v / (height * width) if self.published_sum else v.mean(dim=2, keepdim=True)
        level = self.bits + 1.0
        weights = (codes * codes.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True) + level
        y = (codes @ state + level * own) / weights
        return self.proj(y.to(x.dtype).transpose(1, 2).flatten(2).unflatten(1, (height, width)))
