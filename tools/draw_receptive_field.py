"""Draw the effective receptive fields of models: how much each pixel adds to the middle of the last map.

    python tools/draw_receptive_field.py vmamba_tiny swin_tiny_patch4_window7_224 --pretrained
    python tools/draw_receptive_field.py vig_s nat_mini --images pictures/*.jpg --pretrained

A panel per model, after RepLKNet (Ding et al. 2022, arXiv 2203.06717): the positive gradients of the middle cell by the
pixels, summed over colours and images, on a logarithmic scale from 1/1000 of the largest. Below each stands the side of
the square around the middle that holds 20, 30, 50 and 99 % of them, in percent of the image's side. The images are the
photographs that come with scikit-image unless --images names others. Without --pretrained or --checkpoint models are
untrained; --checkpoint may be repeated, one for each model.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from visionmix.tools import demo_data, influence, pictures, shown
from visionmix.tools.arguments import check_out

_FLOOR = 1e-3


def draw_field(axes: Axes, field: np.ndarray, name: str) -> None:
    """Draw `field`, (height, width) with maximum 1, and what it says of shares below the name."""
    axes.imshow(np.log10(np.maximum(field, _FLOOR)), cmap="viridis", vmin=np.log10(_FLOOR), vmax=0)
    sides = [f"{100 * influence.side_that_holds(field, share):.0f}" for share in influence.SHARES]
    shares = "/".join(f"{100 * share:.0f}" for share in influence.SHARES)
    axes.set_title(f"{name}\n{shares} % within {'/'.join(sides)} % of the side", fontsize=8)


def draw_receptive_fields(found: Mapping[str, np.ndarray], path: Path, title: str, columns: int = 4) -> None:
    """Write a picture with a panel for each of the receptive fields `found`, by name, in so many `columns` at most."""
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure = pictures.new_figure(2.9 * columns, 3.2 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, field) in zip(grid.flat, found.items(), strict=False):
        draw_field(axes, field, name)
    figure.suptitle(title)
    pictures.save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parse = argparse.ArgumentParser(
        prog="visionmix draw-receptive-field", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown.add_models(parse)
    parse.add_argument("--images", nargs="+", metavar="IMAGE", help=shown.IMAGES)
    parse.add_argument(
        "--out", type=Path, default=Path("receptive_field.png"), help="the picture (default: %(default)s)"
    )
    args, files = shown.read_models(parse, argv)
    found = {}
    try:
        check_out(args.out, (".png",))
        for label, name, file in zip(shown.labels(args.models, files), args.models, files, strict=True):
            images = args.images or list(demo_data.PHOTOGRAPHS)
            given = shown.show(shown.load(name, args.pretrained, file), images, args.img_size)
            found[label] = influence.receptive_field(given.model, given.images)
        untrained = "" if args.pretrained or args.checkpoint else ", untrained"
        draw_receptive_fields(found, args.out, f"effective receptive fields{untrained}")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"draw-receptive-field: {error}", file=sys.stderr)
        return 2
    print(f"{len(found)} models drawn to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
