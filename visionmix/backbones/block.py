"""The pre-norm residual block of both skeletons, and the piece that blocks are made of."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Final

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visionmix.layers.by_name import NONE
from visionmix.layers.fold import entry_of, fold_before
from visionmix.layers.grid import Grid, join_prefix, split_prefix
from visionmix.layers.position import ConvPosition

Maker = Callable[..., nn.Module]


def placed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `device` and the `dtype` of a block's options, those that there are."""
    return {name: options[name] for name in ("device", "dtype") if name in options}


class Residual(nn.Module):
    """The end of a branch y of x: ``x + gamma * drop_path(y)``.

    A block calls it after every branch, and puts its norm before the branch or after it:
    ``self.scale1(x, self.mixer(self.norm1(x)))``, ``self.scale1(x, self.norm1(self.mixer(x)))``.

    Shapes: x and y (..., dim) to the same.

    Args:
        dim: Channels.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of gamma, one number per channel; None for no gamma.
    """

    has_gamma: Final[bool]

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float | None = None, **dd: Any) -> None:
        super().__init__()
        layer_scale = None if layer_scale == NONE else layer_scale
        self.has_gamma = layer_scale is not None
        if layer_scale is not None:
            if isinstance(layer_scale, bool) or not isinstance(layer_scale, Real):
                raise TypeError(
                    f"layer_scale={layer_scale!r} is no number; give one, such as 1e-5, or 'none' for no scale"
                )
            if not math.isfinite(layer_scale):
                raise ValueError(f"layer_scale={layer_scale} is not finite; give a number, such as 1e-5")
            layer_scale = float(layer_scale)
            self.initial = layer_scale
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set gamma to its initial value."""
        if self.has_gamma:
            nn.init.constant_(self.gamma, self.initial)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.drop_path(y)
        return torch.addcmul(x, y, self.gamma) if self.has_gamma else x + y


class Block(nn.Module):
    """``x = x + scale1(mixer(norm1(x)))``, then ``x = x + scale2(mlp(norm2(x)))``, on maps.

    With `pos_layer`, ``x = x + pos(x)`` goes before: a position encoding made from the map itself.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        mixer: Makes the token mixer; options given to it override those of the model.
        mlp_layer: Makes the feed-forward from `dim`; None for a block without one.
        norm_layer: Makes a norm over channels from `dim`.
        drop_path: Rate of stochastic depth of both branches.
        layer_scale: Initial value of a learned scale per channel on both branches, or None for none.
        pos_layer: Makes the position encoding from `dim`; None for none.
    """

    has_mlp: Final[bool]
    has_pos: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[..., nn.Module],
        mlp_layer: Callable[..., nn.Module] | None,
        norm_layer: Callable[..., nn.Module],
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        pos_layer: Callable[..., nn.Module] | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.has_pos = pos_layer is not None
        if pos_layer is not None:
            self.pos = pos_layer(dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer()
        self.scale1 = Residual(dim, drop_path, layer_scale, **dd)
        self.has_mlp = mlp_layer is not None
        if mlp_layer is not None:
            self.norm2 = norm_layer(dim, **dd)
            self.mlp = mlp_layer(dim, **dd)
            self.scale2 = Residual(dim, drop_path, layer_scale, **dd)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norms into the linear layers that read them, for inference.

        A subclass whose norms stand elsewhere gives its own.
        """
        self.norm1 = fold_before(self.norm1, entry_of(self.mixer))
        if self.has_mlp:
            self.norm2 = fold_before(self.norm2, entry_of(self.mlp))

    def forward(self, x: Tensor) -> Tensor:
        if self.has_pos:
            x = x + self.pos(x)
        x = self.scale1(x, self.mixer(self.norm1(x)))
        if self.has_mlp:
            x = self.scale2(x, self.mlp(self.norm2(x)))
        return x


class TwoPositionBlock(Block):
    """`Block` with two convolutions of position, one before the mixer and one before the feed-forward.

    ``x = x + pos(x)``, ``x = x + scale1(mixer(norm1(x)))``, ``x = x + pos2(x)``, ``x = x + scale2(mlp(norm2(x)))``.

    Shapes: (batch, height, width, dim) to the same.

    Source: MILA (Han et al. 2024, arXiv 2405.16605).

    Args:
        dim: Channels.
        **options: Those of `Block` but for `pos_layer`.
    """

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, pos_layer=ConvPosition, **options)
        self.pos2 = ConvPosition(dim, device=options.get("device"), dtype=options.get("dtype"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = self.scale1(x, self.mixer(self.norm1(x)))
        x = x + self.pos2(x)
        return self.scale2(x, self.mlp(self.norm2(x))) if self.has_mlp else x


class TokenBlock(Block):
    """`Block` on sequences of cells and prefix tokens: (batch, tokens, dim) with their `Grid` to the same.

    The mixer offers ``forward_tokens(x, grid)``. With `prefix` "pass", a mixer of maps serves too: it mixes the cells
    alone, and the prefix tokens go past it. A position encoding is made from the cells and added to them.

    Args:
        dim: Channels.
        prefix: "mix" or "pass".
        **options: Those of `Block`.

    Raises:
        ValueError: the mixer reads maps and `prefix` is "mix", or the feed-forward reads maps.
    """

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself
    has_pos: Final[bool]
    passes: Final[bool]

    def __init__(self, dim: int, *, prefix: str = "mix", **options: Any) -> None:
        super().__init__(dim, **options)
        self.passes = prefix == "pass"
        if not self.passes and not mixes_tokens(self.mixer):
            raise ValueError(
                f"a mixer of class {type(self.mixer).__qualname__} reads whole maps and cannot serve beside prefix "
                "tokens; give prefix_tokens='none' and global_pool='avg', or prefix='pass', so that they go past it"
            )
        if self.has_mlp and getattr(self.mlp, "needs_map", False):
            raise ValueError(
                f"mlp_layer makes a {type(self.mlp).__qualname__}, which reads whole maps and cannot serve beside "
                "prefix tokens; give prefix_tokens='none' and global_pool='avg', or another mlp_layer, such as 'mlp'"
            )

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.has_pos:
            cells, prefix = split_prefix(x, grid.prefix_positions)
            encoded = self.pos(cells.unflatten(1, (grid.height, grid.width))).flatten(1, 2)
            x = join_prefix(cells + encoded, prefix, grid.prefix_positions)
        y = self.norm1(x)
        if self.passes:
            cells, prefix = split_prefix(y, grid.prefix_positions)
            mixed = self.mixer(cells.unflatten(1, (grid.height, grid.width))).flatten(1, 2)
            y = join_prefix(mixed, torch.zeros_like(prefix), grid.prefix_positions)
        else:
            y = self.mixer.forward_tokens(y, grid)
        x = self.scale1(x, y)
        if self.has_mlp:
            x = self.scale2(x, self.mlp(self.norm2(x)))
        return x


def mixes_tokens(mixer: nn.Module) -> bool:
    """Return whether `mixer` takes sequences of cells and other tokens, by its ``forward_tokens(x, grid)``."""
    return hasattr(mixer, "forward_tokens") and not getattr(mixer, "needs_map", False)
