"""Heads from tokens to logits."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import Tensor, nn

from visionmix.layers.fold import fold_behind
from visionmix.layers.grid import prefix_positions, split_prefix
from visionmix.layers.norm import BatchNorm

_POOLS = ("token", "avg", "max", "avgmax", "")


class TokenHead(nn.Module):
    """The classifier of a sequence with prefix tokens, with the interface of timm's `ClassifierHead`.

    ``fc(dropout(pool(x)))``, where pool is the first prefix token ("token"), the mean or the maximum of the cells
    ("avg", "max"), the mean of these two ("avgmax"), or nothing ("").

    Shapes: (batch, tokens, in_features) to (batch, num_classes); to (batch, tokens, num_classes) without pooling.

    Args:
        in_features: Channels of the tokens.
        num_classes: Outputs; 0 for no classifier.
        pool_type: "token", "avg", "max", "avgmax" or "".
        drop_rate: Dropout rate before the classifier.
        count: Number of prefix tokens; see `visionmix.layers.PrefixTokens`, as for `place`.
        place: Where they stand.

    Raises:
        ValueError: `pool_type` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "token",
        drop_rate: float = 0.0,
        *,
        count: int = 1,
        place: str = "first",
        **dd: Any,
    ) -> None:
        super().__init__()
        _check_pool(pool_type)
        self.num_features = in_features
        self.count = count
        self.place = place
        self.pool_type = pool_type
        self.drop = nn.Dropout(drop_rate)
        self.fc = _classifier(in_features, num_classes, **dd)

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling where one is given."""
        if pool_type is not None:
            _check_pool(pool_type)
            self.pool_type = pool_type
        self.fc = _classifier(self.num_features, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type != "":
            cells, prefix = split_prefix(x, prefix_positions(x.shape[1] - self.count, self.count, self.place))
            x = self.pool_prefix(prefix) if self.pool_type == "token" else _pooled(cells, self.pool_type)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)

    def pool_prefix(self, prefix: Tensor) -> Tensor:
        """Return the pooling "token" of prefix tokens (batch, count, channels), (batch, features)."""
        # A slice, since an index would compile a graph for every size.
        return prefix[:, :1].flatten(1)


class ProjectionHead(ClassifierHead):
    """timm's `ClassifierHead` on maps, after a projection: ``fc(dropout(pool(silu(batch_norm(W x + b)))))``.

    Shapes: (batch, height, width, in_features) to (batch, num_classes); without pooling to (batch, height, width,
    num_classes), and without a classifier the last axis is `hidden_size`.

    Source: MALA (Fan et al. 2025, arXiv 2507.00698).

    Args:
        in_features: Channels of the map.
        num_classes: Outputs; 0 for no classifier.
        pool_type: timm's pooling types; "" for none.
        drop_rate: Dropout rate before the classifier.
        hidden_size: Channels of the projection.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        hidden_size: int = 1024,
        **dd: Any,
    ) -> None:
        super().__init__(hidden_size, num_classes, pool_type, drop_rate, input_fmt="NHWC", **dd)
        self.hidden_size = hidden_size
        self.proj = nn.Linear(in_features, hidden_size, **dd)
        self.norm = BatchNorm(hidden_size, **dd)
        self.act = nn.SiLU()

    @torch.jit.ignore
    def drop_projection(self) -> None:
        """Remove the projection, for a model that returns features alone."""
        self.proj = self.norm = self.act = nn.Identity()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the projection, for inference."""
        self.norm = fold_behind(self.proj, self.norm)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(self.act(self.norm(self.proj(x)))))
        return x if pre_logits else self.fc(x)


class CornerHead(nn.Module):
    """The classifier of maps whose corners have seen the whole map, with the interface of timm's `ClassifierHead`.

    ``fc(dropout(norm(concat(corners))))`` for the pooling "corners", which takes the first and the last cell, or the
    first of the first row, of the last row, and the last of both. Other poolings are timm's, without the norm.

    Shapes: (batch, height, width, in_features) to (batch, num_classes); to (batch, height, width, num_classes) without
    pooling.

    Source: Vision-LSTM (Alkin et al. 2024, arXiv 2406.04303); with four corners, pLSTM (Pöppel et al. 2025, arXiv
    2506.11997).

    Args:
        in_features: Channels of the map.
        num_classes: Outputs; 0 for no classifier.
        pool_type: "corners", or one of timm's pooling types; "" for none.
        drop_rate: Dropout rate before the classifier.
        corners: 2 or 4.
        norm_layer: Makes a norm of the corners' channels together; None for none.

    Raises:
        ValueError: `corners` is neither 2 nor 4.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "corners",
        drop_rate: float = 0.0,
        *,
        corners: int = 4,
        norm_layer: Callable[..., nn.Module] | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        if corners not in (2, 4):
            raise ValueError(f"corners={corners} is not a choice of corners; give 2 or 4")
        self.num_features = in_features
        self.corners = corners
        self.norm = norm_layer(corners * in_features, **dd) if norm_layer else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self._classify(num_classes, pool_type, **dd)

    @torch.jit.ignore
    def _classify(self, num_classes: int, pool_type: str, **dd: Any) -> None:
        at_corners = pool_type == "corners"
        self.pool_type = pool_type
        self.pool = SelectAdaptivePool2d(pool_type="" if at_corners else pool_type, flatten=True, input_fmt="NHWC")
        self.hidden_size = self.num_features * (self.corners if at_corners else self.pool.feat_mult())
        self.fc = _classifier(self.hidden_size, num_classes, **dd)

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling where one is given."""
        self._classify(num_classes, self.pool_type if pool_type is None else pool_type)

    @torch.jit.ignore
    def drop_projection(self) -> None:
        """Remove the norm, for a model that returns features alone."""
        self.norm = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "corners":
            top, bottom = x[:, :1], x[:, -1:]
            if self.corners == 2:
                x = torch.cat([top[:, :, :1], bottom[:, :, -1:]], dim=-1)
            else:
                x = torch.cat([top[:, :, :1], bottom[:, :, :1], top[:, :, -1:], bottom[:, :, -1:]], dim=-1)
            x = self.norm(x.flatten(1))
        elif self.pool_type != "":
            x = self.pool(x)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


def _pooled(cells: Tensor, pool_type: str) -> Tensor:
    if pool_type == "avg":
        return cells.mean(dim=1)
    return cells.amax(dim=1) if pool_type == "max" else 0.5 * (cells.amax(dim=1) + cells.mean(dim=1))


def _classifier(in_features: int, num_classes: int, **dd) -> nn.Module:
    return nn.Linear(in_features, num_classes, **dd) if num_classes else nn.Identity()


def _check_pool(pool_type: str) -> None:
    if pool_type not in _POOLS:
        raise ValueError(f"global_pool={pool_type!r} does not suit prefix tokens; give one of {_POOLS}")
