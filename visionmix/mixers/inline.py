"""Injective linear attention: InLine's mixer."""

from typing import Any, Final

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import Grid, SequenceMixer, at_least_float32, join_prefix, split_prefix
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads


@register_mixer("inline")
class InjectiveLinearAttention(SequenceMixer):
    """Linear attention whose weights sum to 1, and a depthwise convolution whose kernels are predicted for each image.

    With ``q, k, v = W x``, in each head, over all n tokens j,

        y_i = sum_j (s q_i (k_j - mean(k))^T / n + 1 / n) v_j        (s = head_dim^-0.5)
        K   = W_2 gelu(W_1 mean(x))
        out = W_o (y + depthwise3x3(v; K))

    where weights may be negative, W_1 and W_2 have a block a head, and K is a kernel a channel. Time and memory are
    linear in the tokens. Tokens that are not cells (class tokens) take part in the attention and in every mean, but not
    in the convolution. Kernels are an image's: there are no windows, as in every published configuration.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim), class tokens and all.

    Source: InLine (Han et al. 2024, arXiv 2412.06590).

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        lepe: Whether a depthwise 3x3 convolution of v with kernels of its own is added too, as in the CSWin models.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    has_lepe: Final[bool]

    def __init__(self, dim: int, num_heads: int = 3, lepe: bool = False, qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.has_lepe = lepe
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.kernels = nn.Sequential(
            nn.Conv1d(dim, dim, kernel_size=1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, kernel_size=1, groups=num_heads, **dd),
        )
        if lepe:
            self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward_from(self, x: Tensor, source: Tensor) -> Tensor:
        """Return the mixed map of `x`, with kernels predicted from the mean of `source` (batch, height, width, dim).

        A block that hands over its own input, before the norm, gives the kernels the level that norms take away.
        """
        grid = Grid(x.shape[1], x.shape[2], [], None)
        return self._mix(x.flatten(1, 2), source.mean(dim=[1, 2]), grid).unflatten(1, (grid.height, grid.width))

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim).

        Raises:
            ValueError: `grid` has lost cells, so that there is no map to convolve.
        """
        if grid.indices is not None:
            raise ValueError(
                "inline attention convolves a whole map and cannot serve where cells are dropped or merged"
            )
        return self._mix(x, x.mean(dim=1), grid)

    def _mix(self, x: Tensor, mean: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens of `x`, with kernels predicted from `mean` (batch, dim)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        cells, prefix = split_prefix(v, grid.prefix_positions)
        cells = cells.unflatten(1, (grid.height, grid.width))
        local = _convolved(cells, self.kernels(mean.unsqueeze(-1)))
        if self.has_lepe:
            local = local + self.conv(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        local = join_prefix(local.flatten(1, 2), torch.zeros_like(prefix), grid.prefix_positions)
        out = self._attend(self._heads(q), self._heads(k), self._heads(v)).transpose(1, 2).flatten(2)
        return self.proj((out + local).to(v.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return y of q, k and v, all (batch, heads, tokens, head_dim)."""
        # Products of keys and deviations from mean(v) sum to the same as those of deviations from mean(k) and values.
        # The factor s / n goes half on each side, so that half precision can carry the products.
        mean = v.mean(dim=2, keepdim=True)
        factor = (self.scale / k.shape[2]) ** 0.5
        return q @ ((k * factor).transpose(-2, -1) @ ((v - mean) * factor)) + mean

    def _heads(self, x: Tensor) -> Tensor:
        """Return (batch, heads, tokens, head_dim) of (batch, tokens, dim), in float32 at least."""
        return at_least_float32(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@torch.fx.wrap
def _convolved(x: Tensor, kernels: Tensor) -> Tensor:
    """Return x (batch, height, width, dim), each channel of each image under its own kernel (batch, 9 * dim, 1)."""
    batch, height, width, dim = x.shape
    if torch.jit.is_scripting() or not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        maps = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
        maps = F.conv2d(maps, kernels.reshape(batch * dim, 1, 3, 3), padding=1, groups=batch * dim)
        return maps.reshape(batch, dim, height, width).permute(0, 2, 3, 1)
    # The groups of a convolution are a number in ONNX and in traces, which would fix the batch. Inductor makes one loop
    # of these sums.
    taps = at_least_float32(kernels).reshape(batch, 1, 1, dim, 9)
    around = F.pad(at_least_float32(x), [0, 0, 1, 1, 1, 1])
    out = torch.zeros_like(around[:, :height, :width])
    for tap in range(9):
        row, column = tap // 3, tap % 3
        out = out + around[:, row : row + height, column : column + width] * taps[..., tap]
    return out.to(x.dtype)
