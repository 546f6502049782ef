"""Where the tokens of a plain backbone lie: cells of a map, and prefix tokens among them."""

from typing import Any, Final, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionmix.registry import is_int

PLACES = ("first", "middle", "last", "evenly")


class Grid(NamedTuple):
    """The places of a token sequence (batch, tokens, channels) on the map of an image.

    Attributes:
        height: Rows of the map that the image was cut into.
        width: Columns of that map.
        prefix_positions: Positions, rising, of the tokens that are not cells of the map (class tokens, registers).
        indices: Row-major cell of each remaining token, int64 (batch, tokens), or None where every cell is there, in
            row-major order.
    """

    height: int
    width: int
    prefix_positions: list[int]
    indices: Tensor | None


def prefix_positions(cells: int, count: int, place: str) -> list[int]:
    """Return where `count` prefix tokens stand in a sequence with `cells` other tokens.

    "first": 0, 1, ...; "middle": from ``cells // 2`` on; "last": after all cells; "evenly": one after every
    ``cells // (count + 1)`` cells, with the remaining cells after the last token.
    """
    positions: list[int] = []
    for index in range(count):
        if place == "evenly":
            positions.append(cells // (count + 1) * (index + 1) + index)
        elif place == "middle":
            positions.append(cells // 2 + index)
        elif place == "last":
            positions.append(cells + index)
        else:
            positions.append(index)
    return positions


def split_prefix(x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
    """Return the cells and the prefix tokens of a sequence (batch, tokens, channels), each in its order."""
    if len(positions) == 0:
        return x, x[:, :0]
    cells = torch.jit.annotate(list[Tensor], [])
    prefix = torch.jit.annotate(list[Tensor], [])
    start = torch.jit.annotate(int, 0)
    for at in positions:
        cells.append(x[:, start:at])
        prefix.append(x[:, at : at + 1])
        start = at + 1
    cells.append(x[:, start:])
    return torch.cat(cells, dim=1), torch.cat(prefix, dim=1)


def join_prefix(cells: Tensor, prefix: Tensor, positions: list[int]) -> Tensor:
    """Return the sequence (batch, tokens, channels) that `split_prefix` splits into `cells` and `prefix`."""
    if len(positions) == 0:
        return cells
    parts = torch.jit.annotate(list[Tensor], [])
    start = torch.jit.annotate(int, 0)
    for index, at in enumerate(positions):
        parts.append(cells[:, start : at - index])
        parts.append(prefix[:, index : index + 1])
        start = at - index
    parts.append(cells[:, start:])
    return torch.cat(parts, dim=1)


class PrefixTokens(nn.Module):
    """Learned tokens put among the cells of an image: class tokens and registers, with learned positions of their own.

    A token and its position only add up; models whose published tokens have none are built without.

    Shapes: (batch, cells, dim) to (batch, cells + count, dim).

    Source: ViT (Dosovitskiy et al. 2020, arXiv 2010.11929); in the middle, Vim (Zhu et al. 2024, arXiv 2401.09417);
    several, evenly spread, Mamba-R (Wang et al. 2024, arXiv 2405.14858).

    Args:
        dim: Channels.
        count: Number of tokens.
        place: Where they stand, "first", "middle", "last" or "evenly"; see `prefix_positions`.
        positioned: Whether they have positions.

    Raises:
        TypeError: `count` is no integer or `positioned` no bool.
        ValueError: `count` is below 1 or `place` is unknown.
    """

    positioned: Final[bool]

    def __init__(self, dim: int, count: int = 1, place: str = "first", positioned: bool = True, **dd: Any) -> None:
        super().__init__()
        if place not in PLACES:
            raise ValueError(f"place={place!r} is unknown; give one of {', '.join(map(repr, PLACES))}")
        if not is_int(count):
            raise TypeError(f"count={count!r} is no number of prefix tokens; give an integer from 1 up")
        if not isinstance(positioned, bool):
            raise TypeError(f"positioned={positioned!r} is no bool; give True or False")
        if count < 1:
            raise ValueError(f"count={count} makes no prefix token; give 1 or more, or prefix_tokens='none'")
        self.count = count
        self.place = place
        self.positioned = positioned
        self.weight = nn.Parameter(torch.zeros(1, count, dim, **dd))
        if positioned:
            self.pos_embed = nn.Parameter(torch.zeros(1, count, dim, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw tokens and positions from a truncated normal of deviation 0.02."""
        trunc_normal_(self.weight, std=0.02)
        if self.positioned:
            trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, cells: int) -> list[int]:
        """Return where the tokens stand in a sequence with `cells` other tokens."""
        return prefix_positions(cells, self.count, self.place)

    def tokens(self, batch: int) -> Tensor:
        """Return the tokens with their positions, (batch, count, dim), for each of `batch` images."""
        tokens = self.weight + self.pos_embed if self.positioned else self.weight
        return tokens.expand(batch, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        return join_prefix(x, self.tokens(x.shape[0]), self.positions(x.shape[1]))
