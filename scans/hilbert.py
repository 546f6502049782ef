"""The generalised Hilbert curve on any rectangle.

A rectangle is walked from one corner to the next corner along its major side, `length` cells long, with `breadth` cells
across. It is cut into two or three smaller rectangles walked in the same manner, so that each begins beside the cell
where the one before it ends:

    wide (2 length > 3 breadth)     two halves of the major side, one after the other
    otherwise                       out along the minor side, along the major side at the far end, and back

Such a walk moves to one of the 4 neighbours in every step unless the major side is odd and the minor side even:
colour the grid as a chessboard, and the two corners have the same colour, which a walk over an even number of cells
cannot join. Cuts at even lengths keep that case from arising below, and `hilbert` keeps it from arising at the top, so
that every step moves to a neighbour on every grid. (The cuts are those of J. Cerveny's generalised Hilbert curve,
2018; D. Hilbert, Ueber die stetige Abbildung einer Linie auf ein Flaechenstueck, 1891, has the square of side 2^n.)
"""

import torch


def _walk(length: int, breadth: int, known: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """Return the place along the major and the minor side at each step, int64 (2, length * breadth).

    Cuts give few different shapes: each is walked once and then looked up in `known`.
    """
    if (length, breadth) in known:
        return known[length, breadth]
    if length == 1 or breadth == 1:
        line = torch.arange(length * breadth, device="cpu")
        parts = [torch.stack([line, torch.zeros_like(line)] if breadth == 1 else [torch.zeros_like(line), line])]
    elif 2 * length > 3 * breadth:
        half = _half(length)
        parts = [
            _walk(half, breadth, known),
            _walk(length - half, breadth, known) + torch.tensor([[half], [0]], device="cpu"),
        ]
    else:
        half_length, half = length // 2, _half(breadth)
        out = _walk(half, half_length, known).flip(0)
        along = _walk(length, breadth - half, known) + torch.tensor([[0], [half]], device="cpu")
        back = torch.tensor([[length - 1], [half - 1]], device="cpu") - _walk(half, length - half_length, known).flip(0)
        parts = [out, along, back]
    known[length, breadth] = torch.cat(parts, 1)
    return known[length, breadth]


def _half(side: int) -> int:
    """Return half of a side, even if the side is longer than 2."""
    return side // 2 + (side // 2 % 2 if side > 2 else 0)


def hilbert(height: int, width: int) -> torch.Tensor:
    """Return the generalised Hilbert order, int64 (height * width,) on the CPU; it begins in the top-left corner.

    Every step moves to one of the 4 neighbours, on every grid.
    """
    known: dict[tuple[int, int], torch.Tensor] = {}
    if height % 2 == width % 2:  # any major side will do; the longer one keeps the pieces nearly square
        if width >= height:
            column, row = _walk(width, height, known)
        else:
            row, column = _walk(height, width, known)
        return row * width + column
    # One side even, one odd: the even one must be the major side. Where the odd one is much longer, the grid is walked
    # along it (an even number of cells) up to a last piece that is nearly square, which alone is crossed.
    even, odd = (width, height) if height % 2 else (height, width)
    first = odd - (even - 1) if 2 * odd > 3 * even else 0
    along_even, along_odd = _walk(even, odd - first, known)
    along_odd = along_odd + first
    if first:
        lengthwise = _walk(first, even, known)
        along_odd, along_even = torch.cat([lengthwise[0], along_odd]), torch.cat([lengthwise[1], along_even])
    row, column = (along_odd, along_even) if height % 2 else (along_even, along_odd)
    return row * width + column
