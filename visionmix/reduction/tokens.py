"""The tokens of a reduced model between its blocks, as a value."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.layers.kept import rows
from visionmix.layers.kept import taken as take


class Tokens(NamedTuple):
    """A token sequence, with the cells that each of its tokens stands for.

    A cell is one place of the map that the images were cut into; prefix tokens (class, distillation, registers) are not
    cells.

    Attributes:
        x: The tokens, (batch, tokens, channels).
        grid: Rows and columns of the map.
        prefix_positions: Positions of the prefix tokens in the sequence, the same for every image.
        size: How many cells each token is the mean of, (batch, tokens, 1), or None where it is one each.
        source: Position of the token that holds each cell, int64 (batch, rows * columns) in row-major order, -1 where
            none does; None where this is not followed.
        rest: For cells that no token holds, the value that their token had last, (batch, rows * columns, channels);
            None where there are none or this is not followed.
        position: Where each token stood in the whole sequence, int64 (batch, tokens), for methods that ask; None before
            any token is dropped.
        mask: Which tokens are there, bool (batch, tokens), where images keep different numbers or tokens have halted;
            None for all.
        state: What else a method carries from block to block, by its name for it; None for nothing.
    """

    x: Tensor
    grid: tuple[int, int]
    prefix_positions: tuple[int, ...] = ()
    size: Tensor | None = None
    source: Tensor | None = None
    rest: Tensor | None = None
    position: Tensor | None = None
    mask: Tensor | None = None
    state: dict[str, Tensor] | None = None

    def prefix(self) -> Tensor:
        """Return the prefix tokens, (batch, prefix tokens, channels)."""
        if self.prefix_positions == tuple(range(len(self.prefix_positions))):
            return self.x[:, : len(self.prefix_positions)]
        return torch.stack([self.x[:, position] for position in self.prefix_positions], dim=1)

    def cells(self) -> Tensor:
        """Return one token for each cell in row-major order, (batch, rows * columns, channels).

        A cell has the value of the token that holds it, or else the last value of the token that did.

        Raises:
            ValueError: the cells have not been followed.
        """
        if self.source is None:
            raise ValueError("source=None: these tokens do not say which cells they hold; build with trace_source=True")
        held = take(self.x, self.source.clamp(min=0))
        if self.rest is None:
            return held
        return torch.where(self.source.unsqueeze(2) < 0, self.rest, held)

    def map(self) -> Tensor:
        """Return `cells` as a map, (batch, rows, columns, channels); errors are those of `cells`."""
        return self.cells().unflatten(1, self.grid)

    def moved(self, position: Tensor) -> Tensor | None:
        """Return `source` after tokens moved to `position`, int64 (batch, tokens), with -1 for dropped tokens."""
        if self.source is None:
            return None
        now = position.gather(1, self.source.clamp(min=0))
        return now if self.rest is None else torch.where(self.source < 0, self.source, now)


def keep(tokens: Tokens, kept: Tensor, prefix_positions: tuple[int, ...], mask: Tensor | None = None) -> Tokens:
    """Return only the tokens at positions `kept`, int64 (batch, kept) of each image's own, in that order.

    Args:
        tokens: The tokens.
        kept: The positions, those of all prefix tokens among them.
        prefix_positions: Where the prefix tokens stand in `kept`.
        mask: Which of the positions are really kept, bool (batch, kept), where the rest is padding; None for all.
    """
    size = None if tokens.size is None else take(tokens.size, kept)
    position = None if tokens.position is None else tokens.position.gather(1, kept)
    new = tokens._replace(
        x=take(tokens.x, kept), prefix_positions=prefix_positions, size=size, position=position, mask=mask
    )
    if tokens.source is None:
        return new
    places = torch.arange(tokens.x.shape[1], device=kept.device).expand(tokens.x.shape[0], -1)
    new_places = places[:, : kept.shape[1]]
    if mask is not None:
        new_places = new_places.masked_fill(~mask, -1)
    moved = torch.full_like(places, -1).scatter(1, kept, new_places)
    return new._replace(source=tokens.moved(moved), rest=tokens.cells())


def merge(tokens: Tokens, target: Tensor, count: int, weight: Tensor | None = None) -> Tokens:
    """Return `count` tokens, each ``sum(weight * x) / sum(weight)`` of those whose `target` it is; sizes are summed.

    Args:
        tokens: The tokens; their `prefix_positions` are not changed.
        target: Position of each token in the new sequence, int64 (batch, tokens).
        count: Length of the new sequence. An empty place has a token and a size of zeros.
        weight: (batch, tokens, 1), or None for the sizes.
    """
    size = ones(tokens.x) if tokens.size is None else tokens.size
    weight = size if weight is None else weight
    total = summed(weight, target, count)
    x = (summed(tokens.x * weight, target, count) / torch.where(total == 0, 1, total)).to(tokens.x.dtype)
    return tokens._replace(x=x, size=summed(size, target, count), source=tokens.moved(target))


def ones(x: Tensor) -> Tensor:
    """Return sizes of one for tokens (batch, tokens, channels): (batch, tokens, 1).

    They are float32 at least, since half types do not hold every number of cells.
    """
    return x.new_ones(*x.shape[:2], 1, dtype=torch.promote_types(x.dtype, torch.float32))


def summed(x: Tensor, target: Tensor, count: int) -> Tensor:
    """Return the sums (batch, count, channels) of tokens (batch, tokens, channels) that have the same `target`."""
    sums = x.new_zeros(x.shape[0] * count, x.shape[2])
    return sums.index_add(0, rows(target, count), x.flatten(0, 1)).unflatten(0, (x.shape[0], count))


def argsorted(scores: Tensor, descending: bool = True) -> Tensor:
    """Return the positions (batch, tokens) of falling `scores`, likewise, or of rising ones; equal ones as they lie."""
    if not torch.compiler.is_exporting():
        return scores.argsort(dim=1, descending=descending, stable=True)
    # ONNX has no stable sort, so those of equal scores are sorted once more.
    found, order = scores.sort(dim=1, descending=descending)
    first = F.pad((found[:, 1:] != found[:, :-1]).cumsum(dim=1), [1, 0]) * scores.shape[1]  # a number for equal scores
    return (first + order).sort(dim=1).values - first


def take_heads(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of `x`, (batch, heads, tokens, channels), at `index`, int64 (batch, taken), in every head."""
    return take(x.transpose(1, 2).flatten(2), index).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
