"""The pre-norm residual block of both skeletons."""

from collections.abc import Callable
from typing import Final

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from visionmix.layers.grid import Grid


class Block(nn.Module):
    """``x = x + scale1(mixer(norm1(x)))``, then ``x = x + scale2(mlp(norm2(x)))``, on maps.

    With `pos_layer`, ``x = x + pos(x)`` goes before: a position encoding made from the map itself.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        mixer: The token mixer, built.
        dim: Channels.
        mlp_layer: Makes the feed-forward from `dim`; None for a block without one.
        norm_layer: Makes a norm over channels from `dim`.
        drop_path: Rate of stochastic depth of both branches.
        layer_scale: Initial value of a learned scale a channel on both branches, or None for none.
        pos_layer: Makes the position encoding from `dim`; None for none.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    has_mlp: Final[bool]
    has_pos: Final[bool]
    has_scale: Final[bool]

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        *,
        mlp_layer: Callable[..., nn.Module] | None,
        norm_layer: Callable[..., nn.Module],
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        pos_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale, **dd)

        self.has_scale = layer_scale is not None
        self.has_pos = pos_layer is not None
        if pos_layer is not None:
            self.pos = pos_layer(dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer
        self.scale1 = scale()
        self.has_mlp = mlp_layer is not None
        if mlp_layer is not None:
            self.norm2 = norm_layer(dim, **dd)
            self.mlp = mlp_layer(dim, **dd)
            self.scale2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.has_pos:
            x = x + self.pos(x)
        y = self.drop_path(self.mixer(self.norm1(x)))
        x = torch.addcmul(x, y, self.scale1.gamma) if self.has_scale else x + y
        if self.has_mlp:
            y = self.drop_path(self.mlp(self.norm2(x)))
            x = torch.addcmul(x, y, self.scale2.gamma) if self.has_scale else x + y
        return x


class TokenBlock(Block):
    """`Block` on token sequences: (batch, tokens, dim) with their `Grid` to the same.

    A mixer that offers ``forward_tokens(x, grid)`` and is not marked as `needs_map` receives the sequence; any other
    receives the map, which the sequence must then be, whole and without prefix tokens. There is no `pos_layer`: it
    would ask for a map.

    Args:
        tail_layer: Makes from `dim` what the whole map goes through at the end, NHWC, without a residual around it;
            None for nothing. Such a block takes whole sequences without prefix tokens, whatever its mixer.
    """

    has_mlp: Final[bool]  # again: TorchScript knows the constants of the class itself alone
    has_tail: Final[bool]
    mixes_tokens: Final[bool]

    def __init__(
        self, mixer: nn.Module, dim: int, *, tail_layer: Callable[..., nn.Module] | None = None, **options
    ) -> None:
        super().__init__(mixer, dim, **options)
        self.has_tail = tail_layer is not None
        self.mixes_tokens = (
            hasattr(mixer, "forward_tokens") and not getattr(mixer, "needs_map", False) and not self.has_tail
        )
        if tail_layer is not None:
            self.tail = tail_layer(dim, device=options.get("device"), dtype=options.get("dtype"))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.scale1(self._mix(self.norm1(x), grid)))
        if self.has_mlp:
            x = x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
        if self.has_tail:
            x = self.tail(x.unflatten(1, (grid.height, grid.width))).flatten(1, 2)
        return x

    def _mix(self, x: Tensor, grid: Grid) -> Tensor:
        if self.mixes_tokens:
            return self.mixer.forward_tokens(x, grid)
        batch, tokens, dim = x.shape
        return self.mixer(x.reshape(batch, grid.height, grid.width, dim)).reshape(batch, tokens, dim)
