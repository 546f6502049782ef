"""Draw an image with the regions that a reduced model sees as one token.

    python tools/draw_tokens.py picture.jpg --model deit_small_patch16_224 --pretrained --reduce tome:r=13
    python tools/draw_tokens.py astronaut cat --reduce tome:r=8 --reduce evit:keep_rate=0.5 --out tokens.png

A row per image, a panel per reduction. Each region is the cells of one token of the last block in their mean colour,
with a border where the token changes; cells whose token was dropped are dark. An image is a file, or the name of one of
the photographs that come with scikit-image. Without --pretrained or --checkpoint the model is untrained.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor, nn

from visionmix import reduction
from visionmix.tools import pictures, shown

DROPPED = 0.15  # brightness left to cells that no token holds


def regions(image: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return `image` with each token's cells in the mean colour of its pixels.

    Args:
        image: float (height, width, 3) in [0, 1].
        source: int (rows, columns), the token that holds each cell, -1 where none does. Each cell is the same number of
            whole pixels.
    """
    rows, columns = source.shape
    scale = (image.shape[0] // rows, image.shape[1] // columns)
    cells = image[: rows * scale[0], : columns * scale[1]].reshape(rows, scale[0], columns, scale[1], 3)
    mean = cells.mean(axis=(1, 3))
    painted = np.zeros_like(mean)
    for token in np.unique(source):
        held = source == token
        painted[held] = mean[held] * DROPPED if token < 0 else mean[held].mean(axis=0)
    return painted.repeat(scale[0], axis=0).repeat(scale[1], axis=1)


def borders(source: np.ndarray) -> np.ndarray:
    """Return the edges between cells of different tokens, in cells: float (edges, 2 ends, 2) as (x, y)."""
    y, x = np.nonzero(source[:, 1:] != source[:, :-1])
    upright = np.stack([np.stack([x + 1, y], 1), np.stack([x + 1, y + 1], 1)], 1)
    y, x = np.nonzero(source[1:] != source[:-1])
    level = np.stack([np.stack([x, y + 1], 1), np.stack([x + 1, y + 1], 1)], 1)
    return np.concatenate([upright, level]).astype(float)


def draw_regions(axes: Axes, image: np.ndarray, source: np.ndarray) -> None:
    """Draw `image`, float (height, width, 3), with the regions of `source`, int (rows, columns), into the axes."""
    axes.imshow(regions(image, source), extent=(0, source.shape[1], source.shape[0], 0), interpolation="nearest")
    axes.add_collection(LineCollection(borders(source), colors="white", linewidths=0.7))


@torch.inference_mode()
def sources(model: nn.Module, images: Tensor, spec: str) -> tuple[np.ndarray, int]:
    """Return the token of each cell, int (batch, rows, columns), and how many are left, when `spec` reduces `model`."""
    tokens = reduction.apply(model, spec, trace_source=True).forward_tokens(images)
    return tokens.source.reshape(-1, *tokens.grid).numpy(), tokens.x.shape[1]


def draw_tokens(given: shown.Shown, specs: list[str], path: Path, title: str) -> None:
    """Write a picture with a row for each image: the image itself, then a panel per reduction.

    Args:
        given: The images, and a model that can be reduced.
        specs: Reductions, as ``tome:r=8``.
        path: PNG to write.
        title: Of the picture.
    """
    found = [sources(given.model, given.images, spec) for spec in specs]
    figure = pictures.new_figure(2.6 * (len(specs) + 1), 2.8 * len(given.images) + 0.5)
    grid = figure.subplots(len(given.images), len(specs) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, image in enumerate(given.pictures):
        grid[row, 0].imshow(image)
        for axes, (source, _) in zip(grid[row, 1:], found, strict=True):
            draw_regions(axes, image, source[row])
    for axes, spec, (_, left) in zip(grid[0, 1:], specs, found, strict=True):
        axes.set_title(f"{spec}\n{left} tokens", fontsize=9, family="monospace")
    figure.suptitle(title)
    pictures.save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parse = argparse.ArgumentParser(
        prog="visionmix draw-tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("images", nargs="+", metavar="IMAGE", help=shown.IMAGES)
    parse.add_argument("--model", default="deit_small_patch16_224", help="timm model name (default: %(default)s)")
    shown.add_weights(parse)
    parse.add_argument(
        "--reduce", action="append", metavar="METHOD:OPTIONS", help="a reduction; may be repeated (default: tome:r=13)"
    )
    parse.add_argument("--out", type=Path, default=Path("tokens.png"), help="the picture (default: %(default)s)")
    args = parse.parse_args(argv)
    specs = args.reduce or ["tome:r=13"]
    try:
        model = shown.load(args.model, args.pretrained, args.checkpoint)
        for spec in specs:
            reduction.apply(model, spec)
        untrained = "" if args.pretrained or args.checkpoint else ", untrained"
        draw_tokens(shown.show(model, args.images), specs, args.out, f"tokens of {args.model}{untrained}")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"draw-tokens: {error}", file=sys.stderr)
        return 2
    print(f"{len(args.images)} images with {len(specs)} reductions drawn to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
