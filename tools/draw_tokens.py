"""Draw an image with the regions that a reduced model sees as one token.

    python tools/draw_tokens.py picture.jpg --model deit_small_patch16_224 --pretrained --reduce tome:r=13
    python tools/draw_tokens.py astronaut cat --reduce tome:r=8 --reduce evit:keep_rate=0.5 --out tokens.png

A row per image, a panel per reduction. Each region is the cells of one token of the last block in their mean colour,
with a border where the token changes; cells whose token was dropped are dark. Tokens of A-ViT, which halt, are the
darker the fewer blocks they ran. A model that prunes by itself, such as dynamicvit_deit_small, needs no --reduce. An
image is a file, or the name of one of the photographs that come with scikit-image. Without --pretrained or --checkpoint
the model is untrained.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor, nn

from visionmix import reduction
from visionmix.tools import pictures, shown
from visionmix.tools.arguments import check_out

DROPPED = 0.15  # brightness left to cells that no token holds


@dataclass(frozen=True)
class Drawn:
    """The tokens of a reduced model.

    Attributes:
        source: The token that holds each cell, int (batch, rows, columns), -1 where none does.
        light: Brightness of each cell, from `DROPPED` to 1, float of the same shape.
        edges: Values between which a border is drawn where they differ, of the same shape.
        title: How many are left.
    """

    source: np.ndarray
    light: np.ndarray
    edges: np.ndarray
    title: str


def regions(image: np.ndarray, source: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Return `image` with each token's cells in the mean colour of its pixels.

    Args:
        image: float (height, width, 3) in [0, 1].
        source: int (rows, columns), the token that holds each cell, -1 where none does. Each cell is the same number of
            whole pixels.
        light: Brightness, float (rows, columns).
    """
    rows, columns = source.shape
    scale = (image.shape[0] // rows, image.shape[1] // columns)
    cells = image[: rows * scale[0], : columns * scale[1]].reshape(rows, scale[0], columns, scale[1], 3)
    mean = cells.mean(axis=(1, 3))
    painted = np.zeros_like(mean)
    for token in np.unique(source):
        held = source == token
        painted[held] = mean[held] if token < 0 else mean[held].mean(axis=0)
    return (painted * light[..., None]).repeat(scale[0], axis=0).repeat(scale[1], axis=1)


def borders(source: np.ndarray) -> np.ndarray:
    """Return the edges between cells of different tokens, in cells: float (edges, 2 ends, 2) as (x, y)."""
    y, x = np.nonzero(source[:, 1:] != source[:, :-1])
    upright = np.stack([np.stack([x + 1, y], 1), np.stack([x + 1, y + 1], 1)], 1)
    y, x = np.nonzero(source[1:] != source[:-1])
    level = np.stack([np.stack([x, y + 1], 1), np.stack([x + 1, y + 1], 1)], 1)
    return np.concatenate([upright, level]).astype(float)


def draw_regions(axes: Axes, image: np.ndarray, drawn: Drawn, row: int) -> None:
    """Draw `image`, float (height, width, 3), number `row` of the batch, with the regions of its tokens."""
    rows, columns = drawn.source.shape[1:]
    painted = regions(image, drawn.source[row], drawn.light[row])
    axes.imshow(painted, extent=(0, columns, rows, 0), interpolation="nearest")
    axes.add_collection(LineCollection(borders(drawn.edges[row]), colors="white", linewidths=0.7))


@torch.inference_mode()
def tokens_of(model: nn.Module, images: Tensor, spec: str | None) -> Drawn:
    """Return the tokens left of `images` when `spec` reduces `model`; None for one that is reduced already."""
    if spec is None:
        model.reduction.trace_source = True
    fast = model if spec is None else reduction.apply(model, spec, trace_source=True)
    tokens = fast.forward_tokens(images)
    source = tokens.source.reshape(-1, *tokens.grid).numpy()
    if tokens.state and "blocks" in tokens.state:
        ran = tokens.state["blocks"].gather(1, tokens.source).reshape(source.shape).numpy() / len(fast.blocks)
        return Drawn(source, DROPPED + (1 - DROPPED) * ran, ran, f"{len(fast.blocks) * ran.mean():.1f} blocks a token")
    mask = torch.ones_like(tokens.x[..., 0], dtype=torch.bool) if tokens.mask is None else tokens.mask
    least, most = (int(count) for count in mask.sum(dim=1).aminmax())
    title = f"{most} tokens" if least == most else f"{least} to {most} tokens"
    return Drawn(source, np.where(source < 0, DROPPED, 1.0), source, title)


def draw_tokens(given: shown.Shown, specs: Sequence[str | None], path: Path, title: str) -> None:
    """Write a picture with a row for each image: the image itself, then a panel per reduction.

    Args:
        given: The images, and a model that can be reduced.
        specs: Reductions, as ``tome:r=8``; None for that of a model that is reduced already.
        path: PNG to write.
        title: Of the picture.
    """
    found = [tokens_of(given.model, given.images, spec) for spec in specs]
    figure = pictures.new_figure(2.6 * (len(specs) + 1), 2.8 * len(given.images) + 0.5)
    grid = figure.subplots(len(given.images), len(specs) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, image in enumerate(given.pictures):
        grid[row, 0].imshow(image)
        for axes, drawn in zip(grid[row, 1:], found, strict=True):
            draw_regions(axes, image, drawn, row)
    for axes, spec, drawn in zip(grid[0, 1:], specs, found, strict=True):
        name = given.model.reduction.name if spec is None else spec
        axes.set_title(f"{name}\n{drawn.title}", fontsize=9, family="monospace")
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
    reduce = "a reduction; may be repeated (default: the model's own, else tome:r=13)"
    parse.add_argument("--reduce", action="append", metavar="METHOD:OPTIONS", help=reduce)
    parse.add_argument("--out", type=Path, default=Path("tokens.png"), help="the picture (default: %(default)s)")
    args = parse.parse_args(argv)
    try:
        check_out(args.out, (".png",))
        model = shown.load(args.model, args.pretrained, args.checkpoint)
        own = hasattr(model, "reduction") and not args.reduce
        specs: list[str | None] = [None] if own else [*(args.reduce or ["tome:r=13"])]
        for spec in args.reduce or []:
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
