"""The tokens of a reduced model between its blocks, as a value."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    """

    x: Tensor
    grid: tuple[int, int]
    prefix_positions: tuple[int, ...] = ()
    size: Tensor | None = None
    source: Tensor | None = None
    rest: Tensor | None = None
    position: Tensor | None = None

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


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of `x`, (batch, tokens, channels), at `index`, int64 (batch, taken) of each image's own."""
    # Whole rows of the flat sequence: on a CPU a tenth of the time that gather takes element by element.
    taken = x.reshape(-1, x.shape[2]).index_select(0, rows(index, x.shape[1]))
    return taken.reshape(*index.shape, x.shape[2])


def rows(index: Tensor, tokens: int) -> Tensor:
    """Return where positions `index`, (batch, taken), lie once (batch, tokens) is flattened: int64 (batch * taken,)."""
    return (index + tokens * torch.arange(index.shape[0], device=index.device).unsqueeze(1)).reshape(-1)
