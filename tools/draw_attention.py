"""Draw what one cell of an image attends to in the mixers of one or more models.

    python tools/draw_attention.py vmamba_tiny cat --pretrained
    python tools/draw_attention.py vig_s mavit_tiny deit_small_patch16_224 picture.jpg --query 0.4,0.6 --pretrained

A row per model; a panel for each of four of its mixers at equal distances, the last among them, or for those that
--layer names. Brighter cells count for more in the result at the ring; colours go by the square root. Where a mixer's
result is a weighted sum of values, as in softmax and linear attention, these are the absolute weights, averaged over
heads; elsewhere, in recurrences and convolutions, the sizes of the derivatives of the result by the mixer's input,
marked "derivative". The last argument is a file, or the name of one of the photographs that come with scikit-image.
Without --pretrained or --checkpoint models are untrained; --checkpoint may be repeated, one for each model.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from visionmix.tools import influence, pictures, shown
from visionmix.tools.arguments import check_out


def draw_row(axes: Axes, picture: np.ndarray, row: influence.Row) -> None:
    """Draw the shares of `row` over `picture`, float (height, width, 3) in [0, 1], and a ring around its cell."""
    rows, columns = row.weights.shape
    extent = (0, columns, rows, 0)
    axes.imshow(picture.mean(axis=2), cmap="gray", extent=extent, vmin=-1.0, vmax=2.0)
    peak = max(float(row.weights.max()), 1e-30)
    levels = PowerNorm(0.5, vmin=0, vmax=peak)  # a tail of a hundredth of the peak is seen
    axes.imshow(row.weights, cmap="inferno", extent=extent, norm=levels, alpha=0.75, interpolation="nearest")
    axes.plot(row.query[1] + 0.5, row.query[0] + 0.5, "o", mfc="none", mec="cyan", ms=9, mew=1.6)
    axes.set_title(f"{row.layer}\n{'weights' if row.exact else 'derivative'}, {rows}x{columns}", fontsize=8)


def draw_attention(found: Mapping[str, tuple[np.ndarray, Sequence[influence.Row]]], path: Path, title: str) -> None:
    """Write a picture with a row for each model: the image, then a panel for each row of attention.

    Args:
        found: By the model's name, the image as it sees it, float (height, width, 3) in [0, 1], and its rows.
        path: PNG to write.
        title: Of the picture.
    """
    width = 1 + max(len(rows) for _, rows in found.values())
    figure = pictures.new_figure(2.3 * width, 2.7 * len(found) + 0.4)
    grid = figure.subplots(len(found), width, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (name, (picture, rows)), line in zip(found.items(), grid, strict=True):
        line[0].imshow(picture)
        line[0].set_title(name, fontsize=9)
        for axes, row in zip(line[1:], rows, strict=False):
            draw_row(axes, picture, row)
    figure.suptitle(title)
    pictures.save(figure, path)


def _query(text: str) -> tuple[float, float]:
    try:
        row, column = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COL; give two shares such as 0.5,0.5") from None
    if not (0 <= row < 1 and 0 <= column < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is outside the image; give shares of its sides from 0 up to 1")
    return row, column


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parse = argparse.ArgumentParser(
        prog="visionmix draw-attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown.add_models(parse)
    parse.add_argument("image", metavar="IMAGE", help=shown.IMAGES)
    parse.add_argument(
        "--query", type=_query, default=(0.5, 0.5), metavar="ROW,COL", help="the cell's place in shares of the sides"
    )
    parse.add_argument("--layer", action="append", help="a mixer's name in the model; may be repeated")
    parse.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default: %(default)s)")
    args, files = shown.read_models(parse, argv)
    found = {}
    try:
        check_out(args.out, (".png",))
        for label, name, file in zip(shown.labels(args.models, files), args.models, files, strict=True):
            given = shown.show(shown.load(name, args.pretrained, file), [args.image], args.img_size)
            rows = influence.attention_rows(given.model, given.images, args.query, args.layer)
            found[label] = (given.pictures[0], rows)
        untrained = "" if args.pretrained or args.checkpoint else ", untrained"
        draw_attention(found, args.out, f"what the cell in the ring attends to{untrained}")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"draw-attention: {error}", file=sys.stderr)
        return 2
    print(f"{len(found)} models drawn to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
