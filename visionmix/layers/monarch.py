"""Linear layers whose matrix is a Monarch matrix, and a feed-forward of them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionmix.kernels.monarch import monarch_op
from visionmix.layers.feed_forward import InTiles
from visionmix.layers.half_precision import autocasts


class MonarchLinear(nn.Module):
    """``M x + b`` with a Monarch matrix M: block-diagonal, or of order 2 two such with a permutation between.

    See `visionmix.kernels.monarch`. A matrix of order 1 has ``1 / num_blocks`` of the dense one's parameters.

    Shapes: (..., in_features) to (..., out_features).

    Source: Monarch Mixer (Fu et al. 2023, arXiv 2310.12109), whose matrices over channels are block-diagonal; Monarch
    (Dao et al. 2022, arXiv 2204.00595), whose matrices are of order 2.

    Args:
        in_features: Channels in.
        out_features: Channels out.
        num_blocks: Blocks of each block-diagonal matrix; a divisor of both.
        order: 1 or 2.
        bias: Whether there is a b.

    Raises:
        ValueError: `num_blocks` does not divide both widths, or `order` is neither.
    """

    def __init__(
        self, in_features: int, out_features: int, num_blocks: int = 4, order: int = 1, bias: bool = True, **dd: Any
    ) -> None:
        super().__init__()
        if num_blocks < 1 or in_features % num_blocks or out_features % num_blocks:
            raise ValueError(
                f"num_blocks={num_blocks} does not divide {in_features} channels in and {out_features} out; give a "
                "divisor of both"
            )
        if order not in (1, 2):
            raise ValueError(f"order={order} is unknown; give 1 for a block-diagonal matrix, 2 for a Monarch matrix")
        self.in_features, self.out_features, self.num_blocks = in_features, out_features, num_blocks
        columns, rows = in_features // num_blocks, out_features // num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, rows if order == 1 else columns, columns, **dd))
        self.second = nn.Parameter(torch.empty(num_blocks, rows, columns, **dd)) if order == 2 else None
        self.bias = nn.Parameter(torch.empty(out_features, **dd)) if bias else None
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw blocks of a deviation that makes sums over them as large as those over a dense matrix of 0.02."""
        trunc_normal_(self.weight, std=0.02 * math.sqrt(self.num_blocks))
        if self.second is not None:
            # The first matrix keeps the size of its input, as far as a random one does.
            trunc_normal_(self.weight, std=math.sqrt(self.num_blocks / self.in_features))
            trunc_normal_(self.second, std=0.02 * math.sqrt(self.num_blocks))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = _product(x, self.weight, self.second)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.fx.wrap
def _product(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    if not torch.jit.is_scripting():
        # As autocast does it for the dense layer; an op is left alone by it.
        if x.dtype == torch.float32 and autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
    return monarch_op(x, first, second)


class MonarchMlp(InTiles, nn.Module):
    """The feed-forward ``fc2(act(fc1(x)))`` of ViT with Monarch matrices.

    Of order 1, it is a feed-forward for each block of channels by itself.

    Shapes: (..., dim) to (..., dim).

    Source: Monarch Mixer (Fu et al. 2023, arXiv 2310.12109).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim`.
        num_blocks: Blocks of each matrix; a divisor of both widths.
        order: Order of the matrices, 1 or 2; see `MonarchLinear`.
        act_layer: The activation.
        drop: Dropout rate after the activation and after the last projection.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        num_blocks: int = 4,
        order: int = 1,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.fc1 = MonarchLinear(dim, hidden, num_blocks, order, **dd)
        self.act = act_layer()
        self.fc2 = MonarchLinear(hidden, dim, num_blocks, order, **dd)
        self.drop = nn.Dropout(drop)

    def _whole(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
