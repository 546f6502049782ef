"""Feed-forwards made from the width alone, for blocks on (..., dim) or on maps (batch, height, width, dim)."""

from collections.abc import Callable
from typing import Any, Final

import torch
from timm.layers import GluMlp, Mlp
from torch import Tensor, nn

from visionmix.layers.conv import OmniShift
from visionmix.layers.half_precision import at_least_float32, scaled, unscaled
from visionmix.layers.tiles import in_tiles

_TILE = 1024  # tokens per thread, whose hidden channels stay in its cache


def _in_tiles(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module._whole(x)``, a feed-forward of tokens (..., dim).

    Where `in_tiles` says so the tokens go through it a few at a time, so that its hidden channels are never there at
    once: at 1024 pixels `vmamba_tiny` needs two thirds of the memory then, and meets half the page faults.
    """
    tokens = x.numel() // x.shape[-1]
    if not in_tiles(module, x, tokens * module.fc1.out_features):
        return module._whole(x)
    tiles = x.reshape(tokens, x.shape[-1]).split(_TILE * torch.get_num_threads())
    first = module._whole(tiles[0])
    out = first.new_empty(tokens, first.shape[-1])  # under autocast, its type is not that of x
    first_place, *places = out.split(tiles[0].shape[0])
    first_place.copy_(first)
    for tile, place in zip(tiles[1:], places, strict=True):
        place.copy_(module._whole(tile))
    return out.view(*x.shape[:-1], -1)


def mlp(
    dim: int, *, mlp_ratio: float = 4.0, act_layer: Callable[[], nn.Module] = nn.GELU, drop: float = 0.0, **dd: Any
) -> Mlp:
    """Return the feed-forward ``fc2(act(fc1(x)))`` of ViT, with biases and ``int(dim * mlp_ratio)`` hidden channels.

    Shapes: (..., dim) to (..., dim).

    Source: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim`.
        act_layer: The activation.
        drop: Dropout rate after the activation and after the last projection.
    """
    return _Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **dd)


class InTiles:
    """The forward pass of a feed-forward that computes `_whole` for all tokens at once; a large one in tiles."""

    entry = "fc1"

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._whole(x)
        return _in_tiles(self, x)


class _Mlp(InTiles, Mlp):
    """timm's feed-forward; a large one in tiles."""

    def _whole(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def swiglu(
    dim: int,
    *,
    mlp_ratio: float = 4.0,
    multiple_of: int = 256,
    bias: bool = False,
    drop: float = 0.0,
    **dd: Any,
) -> GluMlp:
    """Return a gated feed-forward ``fc2(silu(a) * b)`` with ``a, b = fc1(x).chunk(2, dim=-1)``.

    The hidden width is two thirds of ``dim * mlp_ratio``, so that the parameters number what an ungated feed-forward of
    that ratio has, rounded up to `multiple_of`.

    Shapes: (..., dim) to (..., dim).

    Source: GLU variants (Shazeer 2020, arXiv 2002.05202).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim` of the ungated feed-forward with as many parameters.
        multiple_of: Number whose next multiple the hidden width is rounded up to.
        bias: Whether both projections have biases.
        drop: Dropout rate after the gate and after the last projection.
    """
    hidden = -(-int(dim * mlp_ratio * 2 / 3) // multiple_of) * multiple_of
    return _SwiGlu(dim, 2 * hidden, act_layer=nn.SiLU, bias=bias, drop=drop, gate_last=False, **dd)


class _SwiGlu(InTiles, GluMlp):
    """timm's gated feed-forward with one tensor of the hidden width less, and none during the last projection.

    The C library hands memory back to the system once about twice the largest tensor is free. The first projection's
    output and two tensors of half its width came to that in every block: vig_t met 93,000 page faults an image of 1024
    pixels, and 20,000 to 50,000 with one tensor less.
    """

    def _whole(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self._gated(self.fc1(x)))))

    def _gated(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.act(gate).mul_(value)


class ConvMlp(nn.Module):
    """A feed-forward that sees neighbours: ``fc2(act(h + depthwise3x3(h)))`` with ``h = fc1(x)``, all with biases.

    With `act_first` it is ``fc2(h + depthwise3x3(h))`` with ``h = act(fc1(x))``; without `residual`, the convolution's
    output stands alone.

    Shapes: (batch, height, width, dim) to the same.

    Source: MSVMamba (Shi et al. 2024, arXiv 2405.14174); with `act_first`, MALA (Fan et al. 2025, arXiv 2507.00698);
    without the residual, PVTv2 (Wang et al. 2021, arXiv 2106.13797).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim`.
        residual: Whether the convolution's input is added to its output.
        act_layer: The activation.
        act_first: Whether it comes before the convolution rather than after it.
        drop: Dropout rate after each projection.
    """

    needs_map = True
    entry = "fc1"
    act_first: Final[bool]
    residual: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 2.0,
        residual: bool = True,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        act_first: bool = False,
        drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden, **dd)
        self.act_first = act_first
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.fc1(x))
        if self.act_first:
            x = self.act(x)
        # One name for all, so that the memory of what a step has read is free for the next one's output.
        x = x.permute(0, 3, 1, 2)
        if self.residual:
            x = self.conv(x).add_(x)  # in place on the convolution's output, which no gradient needs
        else:
            x = self.conv(x)
        x = x.permute(0, 2, 3, 1)
        if not self.act_first:
            x = self.act(x)
        return self.drop(self.fc2(x))


class ConvGlu(nn.Module):
    """A gated feed-forward whose gate sees neighbours: ``fc2(act(depthwise3x3(a)) * b)``, ``a, b = fc1(x).chunk(2)``.

    The hidden width is two thirds of ``dim * mlp_ratio``, rounded down; all layers have biases.

    Shapes: (batch, height, width, dim) to the same.

    Source: TransNeXt (Shi 2023, arXiv 2311.17132).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim` of the ungated feed-forward with as many parameters.
        act_layer: The gate's activation.
        drop: Dropout rate after the gate and after the last projection.
    """

    needs_map = True
    entry = "fc1"

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden = int(2 * int(dim * mlp_ratio) / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden, **dd)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = self.act(self.conv(gate.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(gate * value)))


class ChannelMix(nn.Module):
    """RWKV's feed-forward: ``sigmoid(W_r y) * W_v relu(W_k y)^2`` with ``y = omni_shift(x)``, all without biases.

    Shapes: (batch, height, width, dim) to the same.

    Source: Restore-RWKV (Yang et al. 2024, arXiv 2407.11087).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim`.
        drop: Dropout rate of the result.
    """

    needs_map = True

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.shift = OmniShift(dim, **dd)
        self.key = nn.Linear(dim, hidden, bias=False, **dd)
        self.value = nn.Linear(hidden, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shift(x)
        # In float32 until the gate: squares outgrow float16.
        hidden, scale = scaled(at_least_float32(self.key(x)).relu().square(), x)
        return self.drop(torch.sigmoid(self.receptance(x)) * unscaled(self.value(hidden), scale))
