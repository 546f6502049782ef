"""Draw scan orders as pictures, one panel per order, each path coloured by time.

    python tools/draw_scans.py hilbert snake window_7 --height 13 --width 9 --out scans.png
    python tools/draw_scans.py cross                             # the directions of a published set, a panel each
    python tools/draw_scans.py --gallery --out docs/images/scans.png

A circle marks the start and a square the end. Moves to one of the 8 neighbours are thick, jumps thin; a dotted
line crosses padded steps, whose number stands in the title, and cells that are never read stay grey.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from visionmix import scans
from visionmix.tools.arguments import check_out
from visionmix.tools.checkpoint import write_aside
from visionmix.tools.images import read_rgb

GALLERY = (
    *("raster", "snake", "hilbert", "morton"),
    *("diagonal", "zigzag", "spiral", "u_order"),
    *("window_4", "window_snake_4", "atrous_3", "hilbert_transposed_reversed"),
)

_LONG = 18  # characters of a name that has no room for its padding in the same line


def draw_order(axes: Axes, name: str, height: int, width: int) -> None:
    """Draw one order of a height x width grid into the given axes."""
    index = scans.order(name, height, width).index
    step = (index >= 0).nonzero().squeeze(1)
    row, column = index[step] // width, index[step] % width
    padded = len(index) - len(step)

    axes.set_xlim(-0.8, width - 0.2)
    axes.set_ylim(height - 0.2, -0.8)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d4d4d8")
    title = name.replace("+", "+\n")
    if padded:
        title += ("\n" if len(name) > _LONG else " ") + f"({padded} padded)"
    axes.set_title(title, fontsize=10, family="monospace")

    every = torch.arange(height * width)
    axes.scatter(every % width, every // width, s=5, color="#d4d4d8", zorder=1, linewidths=0)
    if not len(step):
        return
    # Yellow, the last tenth of the scale, is hard to see on white.
    colours = {"cmap": "viridis", "clim": (0, 1.1)}
    time = step / max(len(index) - 1, 1)
    points = torch.stack([column, row], 1)
    segments = torch.stack([points[:-1], points[1:]], 1).numpy()
    neighbour = points.diff(dim=0).abs().amax(1) == 1
    over_padding = step.diff() > 1
    for chosen, style in (
        (~over_padding & neighbour, {"linewidths": 2.4}),
        (~over_padding & ~neighbour, {"linewidths": 0.6, "alpha": 0.6}),
        (over_padding, {"linewidths": 0.9, "linestyles": ":"}),
    ):
        lines = LineCollection(segments[chosen.numpy()], zorder=2, capstyle="round", **colours, **style)
        lines.set_array(time[1:][chosen].numpy())
        axes.add_collection(lines)
    axes.scatter(column, row, c=time, s=12, cmap="viridis", vmin=0, vmax=1.1, zorder=3, linewidths=0)
    for end, marker in ((0, "o"), (-1, "s")):
        axes.scatter(*points[end], s=50, marker=marker, color="white", edgecolors="#18181b", linewidths=1.4, zorder=4)


def draw_orders(names: list[str], height: int, width: int, out: Path, columns: int = 4) -> None:
    """Write a picture (PNG, PDF or SVG, as its name ends) with a panel for each order of a height x width grid.

    At most `columns` panels stand in a row.
    """
    columns = min(len(names), columns)
    rows = math.ceil(len(names) / columns)
    panel_height = 2.9 * min(max(height / width, 0.2), 5)
    figure = Figure(figsize=(3.0 * columns, rows * (panel_height + 0.4)), layout="constrained")
    for axes, name in itertools.zip_longest(figure.subplots(rows, columns, squeeze=False).flat, names):
        if name is None:
            axes.set_axis_off()
        else:
            draw_order(axes, name, height, width)

    def write(aside: Path) -> None:
        figure.savefig(aside, format=out.suffix[1:], dpi=100, bbox_inches="tight", pad_inches=0.1)
        if out.suffix == ".png":
            # A third of the bytes, with no difference to be seen.
            read_rgb(aside).quantize(256).save(aside, format="png", optimize=True)

    write_aside(out, write)


def main(argv: list[str] | None = None) -> None:
    """Draw the orders that the command line names."""
    parser = argparse.ArgumentParser(
        prog="visionmix draw-scans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a scan order or a set of directions")
    parser.add_argument("--height", type=int, default=13, help="rows of the grid (default 13)")
    parser.add_argument("--width", type=int, default=13, help="columns of the grid (default 13)")
    parser.add_argument("--out", type=Path, default=Path("scans.png"), help="the picture (default scans.png)")
    parser.add_argument("--gallery", action="store_true", help="draw the gallery of docs/scans.md instead")
    parser.add_argument("--list", action="store_true", help="list the orders and the sets of directions, and end")
    options = parser.parse_args(argv)
    if options.list:
        print("orders:         ", ", ".join(scans.names()))
        print("modifiers:      ", ", ".join(scans.MODIFIERS))
        print("direction sets: ", ", ".join(scans.direction_sets()))
        return
    if options.gallery == bool(options.names):
        parser.error("give the names of orders or --gallery, one of the two (--list shows the names)")
    height, width = (11, 15) if options.gallery else (options.height, options.width)
    try:
        check_out(options.out, (".png", ".pdf", ".svg"))
        names = list(GALLERY)
        if not options.gallery:
            sets = scans.direction_sets()
            expanded = [scans.direction_names(name) if name in sets else [name] for name in options.names]
            names = list(itertools.chain(*expanded))
        draw_orders(names, height, width, options.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(names)} scan orders of a {height}x{width} grid drawn to {options.out}")


if __name__ == "__main__":
    main()
