"""Linear attention inside windows of any number of tokens: ScatterFormer's mixer."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.gated_linear_attention import bidirectional_op
from visionmix.layers import at_least_float32
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads
from visionmix.scans.cells import numbered, row_and_column


@register_mixer("scattered")
class ScatteredLinearAttention(nn.Module):
    """Linear attention with relu as its feature map, among the tokens of a window, however many these are.

    With ``q, k, v = W x``, in each head, over the tokens j of the window that holds token i,

        y_i = relu(q_i) (sum_j relu(k_j)^T v_j) / (relu(q_i) sum_j relu(k_j)^T + 1e-6)
        out = W_o y + b

    No window is padded: all tokens are one sequence, sorted by window, of a gated linear attention in both directions
    that forgets everything from one window to the next. Time and memory are linear in the tokens.

    Shapes: (batch, height, width, dim) to the same, for every height and width; windows at the bottom and on the right
    hold what is left. `forward_windows` takes tokens that lie anywhere, such as voxels.

    Source: scattered linear attention of ScatterFormer (He et al. 2024, arXiv 2401.00912). Its interaction across
    windows is part of its feed-forward, of sparse convolutions, and is not here.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        window_size: Rows and columns of a window of a map.
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `window_size` is below 1.
    """

    entry = "qkv"

    def __init__(self, dim: int, num_heads: int = 3, window_size: int = 12, qkv_bias: bool = False, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if window_size < 1:
            raise ValueError(f"window_size={window_size} is too small; give 1 or more")
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        window = _windows(height, width, self.window_size, x)
        return self.forward_windows(x.flatten(1, 2), window).unflatten(1, (height, width))

    def forward_windows(self, x: Tensor, window: Tensor) -> Tensor:
        """Return the mixed tokens of x (batch, tokens, dim), whose windows `window` numbers, int64 (tokens,)."""
        order, place, forward_gate, backward_gate = _sorted(window, x)
        qkv = self.qkv(x)
        q, k, v = at_least_float32(qkv.index_select(1, order)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = F.relu(q), F.relu(k)
        # The sum of the keys is one more channel of the values. A token counts in both directions, and once too often.
        v = F.pad(v, [0, 1], value=1.0)
        gates = [gate.reshape(1, -1, 1, 1).expand_as(q) for gate in (forward_gate, backward_gate)]
        both = bidirectional_op(q, k, v, gates[0], gates[1], 1.0, "sum", None)
        both = both - (q * k).sum(dim=-1, keepdim=True) * v
        y = both[..., :-1] / (both[..., -1:] + 1e-6)
        return self.proj(y.flatten(2).to(qkv.dtype)).index_select(1, place)


@torch.fx.wrap
def _windows(height: int, width: int, side: int, like: Tensor) -> Tensor:
    """Return the number of the window that holds each cell of a map, in row-major order."""
    row, column = row_and_column(numbered(height * width, like), width)
    return row // side * ((width + side - 1) // side) + column // side


@torch.fx.wrap
def _sorted(window: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tokens sorted by window, the place of each, and the gates where each direction enters a window."""
    token = numbered(window.shape[0], window)
    order = (window * window.shape[0] + token).argsort()  # no two alike: PyTorch's sort need not be stable
    window = window.index_select(0, order)
    # The logarithm of a decay that is 0 in float32, and nothing beside 1 in float64.
    other = (window != window.roll(1)).to(torch.float32) * -200.0
    return order, torch.zeros_like(order).scatter(0, order, token), other, other.roll(-1)
