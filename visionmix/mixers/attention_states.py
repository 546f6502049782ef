"""Neighborhood attention together with a selective scan, or with attention to all tokens: MASS and LASS."""

import math
from typing import Any, Final

import torch
import torch.fx
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.dispatch import full_precision
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.layers import BatchNorm, RotaryMap, ScanLayerNorm, SelectiveScan2d, StateScan2d, at_least_float32
from visionmix.layers.fold import fold_behind
from visionmix.layers.maps import resample_map
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, check_heads
from visionmix.scans import direction_names

_NORM_EPS = 1e-6


class PairBias(nn.Module):
    """A learned bias for each head and each pair of tokens of a map, for attention to all tokens.

    For a map of another size than the built one, the table (queries, keys) is resampled as an image is, bicubic, as the
    published code has it.

    Args:
        num_heads: Heads.
        grid_size: Rows and columns of the built map.
    """

    undecayed = ("bias_table",)

    def __init__(self, num_heads: int, grid_size: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        tokens = grid_size[0] * grid_size[1]
        self.bias_table = nn.Parameter(torch.zeros(num_heads, tokens, tokens, **dd))

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the table to 0."""
        nn.init.zeros_(self.bias_table)

    def table(self, tokens: int) -> Tensor:
        """Return the biases (heads, tokens, tokens).

        No forward pass: PyTorch's FLOP counter takes no module whose output may be a parameter's view.
        """
        return _resampled(self.bias_table, tokens)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the parameter itself, so that `grid_size` becomes the built size."""
        with torch.no_grad():
            self.bias_table = nn.Parameter(_resampled(self.bias_table, grid_size[0] * grid_size[1]).contiguous())

    @torch.jit.ignore
    def fit_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a file's table at the built size; any other tensor comes back unchanged."""
        heads, tokens, _ = self.bias_table.shape
        is_table = tensor.ndim >= 3 and tensor.shape[-3] == heads and tensor.shape[-2] == tensor.shape[-1]
        return _resampled(tensor.reshape(tensor.shape[-3:]), tokens) if is_table else tensor


def _resampled(table: Tensor, tokens: int) -> Tensor:
    return resample_map(table.permute(1, 2, 0).unsqueeze(0), tokens, tokens).squeeze(0).permute(2, 0, 1)


class _LocalAttention(nn.Module):
    """What both mixers begin and end with: projections, rotary positions, window biases, a convolution of the values.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`.
        bias_heads: Heads of the window's position bias.
        kernel_size: Rows and columns of the window, an odd number.
        global_attention: Whether attention to all tokens follows.
        grid_size: Rows and columns of the map at the built image size.
    """

    undecayed = ("position_bias",)
    global_attention: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias_heads: int,
        kernel_size: int,
        global_attention: bool,
        grid_size: tuple[int, int],
        **dd: Any,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} has no middle; give an odd number, 1 or more")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.kernel_size = [kernel_size, kernel_size]
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.rotary = RotaryMap()
        self.position_bias = nn.Parameter(torch.zeros(bias_heads, *[2 * kernel_size - 1] * 2, **dd))
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.global_attention = global_attention
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        if global_attention:
            self.pair_bias = PairBias(num_heads, grid_size, **dd)

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the windows' position bias to 0."""
        nn.init.zeros_(self.position_bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k and v (batch, height, width, heads, head_dim), and the convolution of v (batch, ..., dim)."""
        _, height, width, dim = x.shape
        qk, v = self.qkv(x).split([2 * dim, dim], dim=-1)
        position = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        qk = self.rotary(qk.unflatten(-1, (2 * self.num_heads, -1)).flatten(1, 2), height, width)
        q, k = qk.to(v.dtype).unflatten(1, (height, width)).chunk(2, dim=3)
        return q, k, v.unflatten(-1, (self.num_heads, -1)), position

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dilation: list[int]) -> Tensor:
        """Return attention to windows of that dilation, (batch, height, width, heads, head_dim) as q, k and v."""
        kernel, one, none, bias = self.kernel_size, [1, 1], [0, 0], self.position_bias
        out, _ = neighborhood_attention_op(q, k, v, kernel, one, dilation, none, self.scale, None, None, bias, False)
        return out

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention to all tokens, (batch, height, width, heads, head_dim) as q, k and v."""
        _, height, width, _, _ = v.shape
        q, k, v = [each.flatten(1, 2).transpose(1, 2) for each in (q, k, v)]
        bias = self.pair_bias.table(height * width).to(v.dtype, copy=True)  # not a parameter's view, as said above
        return self.dot_product(q, k, v, bias, self.fused_attn).transpose(1, 2).unflatten(1, (height, width))


@register_mixer("mass")
class MultiScaleAttentionStates(_LocalAttention):
    """Attention to a window and to a dilated one, whose weights gather the states of a selective scan as well.

    Half of the heads attend to the window around each token, the others to one of dilation ``side // kernel_size``
    along each side of the map, at least 1 and at most `kernel_size`. With ``q, k, v = W x``, q and k in two halves and
    turned by `visionmix.layers.RotaryMap`, and both with the same position bias b:

        a_1, o_1 = softmax(q_1 k_1^T * head_dim^-0.5 + b),  a_1 v_1                   over the window
        a_2, o_2 = softmax(q_2 k_2^T * head_dim^-0.5 + b),  a_2 (v_2 + o_1)           over the dilated one
        u        = silu(depthwise5x5([o_1, o_2]))
        h        = the states of visionmix.layers.StateScan2d on u, in halves h_1 and h_2
        y        = C F([a_1 h_1, a_2 h_2]) + D u,  F a linear layer, with a bias, across the heads
        out      = W_o norm((norm(y) + depthwise5x5(v)) * silu(batch_norm(W_g x)))

    With `global_attention`, y is instead ``softmax(q k^T * head_dim^-0.5 + pair_bias) [o_1, o_2]`` over all tokens,
    with all heads. A map smaller than a window is extended by keys and values of zeros.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: A2Mamba (Lou et al. 2025, arXiv 2507.16624), which calls it MASS.

    Args:
        dim: Channels.
        num_heads: Heads of each half; twice as many divide `dim`, into widths that are a multiple of 4.
        kernel_size: Rows and columns of the windows, an odd number.
        global_attention: Whether attention to all tokens takes the scan's place.
        grid_size: Rows and columns of the map that the biases of that attention are built for.

    Raises:
        ValueError: the heads do not divide `dim`, their width is no multiple of 4, or `kernel_size` is even.
    """

    global_attention: Final[bool]  # repeated: TorchScript knows only the constants of the class itself

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 7,
        global_attention: bool = False,
        grid_size: tuple[int, int] = (7, 7),
        **dd: Any,
    ) -> None:
        if num_heads < 1 or dim % (8 * num_heads):
            raise ValueError(
                f"num_heads={num_heads} does not fit dim={dim}; give a number so that 8 * num_heads divides dim: there "
                "are that many heads in each half, and rotary positions need widths that are a multiple of 4"
            )
        super().__init__(dim, 2 * num_heads, num_heads, kernel_size, global_attention, grid_size, **dd)
        self.gate = nn.Linear(dim, dim, **dd)
        self.gate_norm = BatchNorm(dim, **dd)
        self.act = nn.SiLU()
        if not global_attention:
            self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
            self.scan = StateScan2d(dim, "raster", dt_rank=math.ceil(dim / 16), **dd)
            self.state_fusion = HeadFusion(2 * num_heads, **dd)
        self.norm = ScanLayerNorm(dim, eps=_NORM_EPS, **dd)
        self.proj_norm = ScanLayerNorm(dim, eps=_NORM_EPS, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the gate's norm into its projection, for inference."""
        self.gate_norm = fold_behind(self.gate, self.gate_norm)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        near, far = [1, 1], _dilations(height, width, self.kernel_size)
        gate = self.act(self.gate_norm(self.gate(x)))
        q, k, v, position = self._project(x)
        (q1, q2), (k1, k2), (v1, v2) = q.chunk(2, dim=3), k.chunk(2, dim=3), v.chunk(2, dim=3)
        v1 = self._attend(q1, k1, v1, near)
        y = torch.cat([v1, self._attend(q2, k2, v2 + v1, far)], dim=3)
        if self.global_attention:
            y = self._attend_to_all(q, k, y).flatten(3)
        else:
            u = self.act(self.conv(y.flatten(3).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
            states, C = self.scan(u)
            # The weights are computed again: kept, they would be the largest tensors of the model.
            h1, h2 = states.unflatten(-1, (self.num_heads, -1)).chunk(2, dim=3)
            h = torch.cat([self._attend(q1, k1, h1, near), self._attend(q2, k2, h2, far)], dim=3)
            y = torch.addcmul(self.state_fusion(h).flatten(3) * C, self.scan.D, u)
        y = self.norm(y) + position
        return self.proj(self.proj_norm(at_least_float32(y) * at_least_float32(gate)))


class HeadFusion(nn.Module):
    """A linear layer across the heads, ``sum over n of weight[m, n] x[n] + bias[m]``, which autocast leaves in float32.

    Shapes: (..., heads, head_dim) to the same.

    Args:
        num_heads: Heads.
    """

    def __init__(self, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_heads, **dd))
        self.bias = nn.Parameter(torch.zeros(num_heads, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the weight from a truncated normal of deviation 0.02; the bias is 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _fused_heads(x, self.weight, self.bias)


@torch.fx.wrap
def _fused_heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype).unsqueeze(1)
    if not torch.jit.is_scripting():
        with full_precision(x.device):
            return torch.matmul(weight, x) + bias
    return torch.matmul(weight, x) + bias


@torch.fx.wrap
def _dilations(height: int, width: int, kernel_size: list[int]) -> list[int]:
    """Return the largest dilations of a window that fit the map, at least 1 and at most the window's own side."""
    return [_dilation(height, kernel_size[0]), _dilation(width, kernel_size[1])]


def _dilation(length: int, most: int) -> int:
    if torch.jit.is_scripting():
        return max(1, min(length // most, most))
    if torch.jit.is_tracing():  # sizes are tensors
        return max(1, min(int(length // most), most))
    # Not by `min` and `max`: a graph for all sizes would be compiled once more for every outcome.
    return torch.sym_max(1, torch.sym_min(length // most, most))


@register_mixer("lass")
class LocalAttentionStates(_LocalAttention):
    """Neighborhood attention, then selective scans of its output in four directions, added to it.

    With ``q, k, v = W x``, q and k turned by `visionmix.layers.RotaryMap`, and S the scans of
    `visionmix.layers.SelectiveScan2d`, summed:

        o   = softmax(q k^T * head_dim^-0.5 + bias) v             over the window around each token
        y   = o + norm(S(silu(batch_norm(depthwise3x3(o)))))
        out = W_o (y + depthwise5x5(v))

    With `global_attention`, y is instead ``softmax(q k^T * head_dim^-0.5 + pair_bias) o`` over all tokens. A map
    smaller than the window is extended by keys and values of zeros.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: SegMAN (Fu et al. 2024, arXiv 2412.11890), which calls it LASS.

    Args:
        dim: Channels.
        num_heads: Heads; a divisor of `dim`, into widths that are a multiple of 4.
        kernel_size: Rows and columns of the window, an odd number.
        global_attention: Whether attention to all tokens takes the scans' place.
        grid_size: Rows and columns of the map that the biases of that attention are built for.

    Raises:
        ValueError: `num_heads` does not divide `dim`, their width is no multiple of 4, or `kernel_size` is even.
    """

    global_attention: Final[bool]  # repeated: TorchScript knows only the constants of the class itself

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        kernel_size: int = 7,
        global_attention: bool = False,
        grid_size: tuple[int, int] = (7, 7),
        **dd: Any,
    ) -> None:
        check_heads(dim, num_heads)
        if dim // num_heads % 4:
            raise ValueError(
                f"num_heads={num_heads} makes heads of {dim // num_heads} channels; rotary positions need a multiple "
                "of 4"
            )
        super().__init__(dim, num_heads, num_heads, kernel_size, global_attention, grid_size, **dd)
        if not global_attention:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
            self.conv_norm = nn.BatchNorm2d(dim, **dd)
            self.scan = SelectiveScan2d(dim, direction_names("raster"), dt_rank=math.ceil(dim / 16), **dd)
            self.norm = ScanLayerNorm(dim, eps=_NORM_EPS, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the convolution's norm into it, for inference."""
        if not self.global_attention:
            self.conv_norm = fold_behind(self.conv, self.conv_norm)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, position = self._project(x)
        y = self._attend(q, k, v, [1, 1])
        if self.global_attention:
            y = self._attend_to_all(q, k, y).flatten(3)
        else:
            y = y.flatten(3)
            u = F.silu(self.conv_norm(self.conv(y.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
            y = y + self.norm(self.scan(u))
        return self.proj(y + position)
