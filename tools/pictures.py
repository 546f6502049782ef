"""Pictures of a training run, as PNG: curves, the confusion matrix, and test images with the model's guesses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from PIL import Image

from visionmix.tools.checkpoint import write_aside
from visionmix.tools.score import score, score_name

TRAIN, TEST, WRONG, INK = "#4c78a8", "#f58518", "#d62728", "#333333"


def new_figure(width: float, height: float, **kwargs) -> Figure:
    """Return an empty figure of `width` by `height` inches."""
    # Not pyplot: it keeps figures in global state and picks a window system.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to the PNG `path`, whole or not at all."""
    write_aside(path, lambda aside: figure.savefig(aside, format="png", facecolor="white"))


def draw_curves(history: Sequence[dict], path: Path, title: str) -> None:
    """Draw losses and, of labelled images, test accuracy over epochs; `history` holds the rows of summary.csv."""
    labelled = score_name(history[0]) != "loss"
    figure = new_figure(10 if labelled else 5, 4)
    left, *right = figure.subplots(1, 1 + labelled, squeeze=False)[0]
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], "o-", ms=3, color=TRAIN, label="train (augmented)")
    left.plot(epochs, [row["test_loss"] for row in history], "o-", ms=3, color=TEST, label="test")
    left.set(title="loss (cross entropy)" if labelled else "loss", xlabel="epoch", ylim=(0, None))
    for axes in right:
        _draw_scores(axes, history)
    for axes in (left, *right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    figure.suptitle(title)
    save(figure, path)


def _draw_scores(axes: Axes, history: Sequence[dict]) -> None:
    name, epochs, best = score_name(history[0]), [row["epoch"] for row in history], max(history, key=score)
    axes.plot(epochs, [score(row) for row in history], "o-", ms=3, color=TEST, label=name)
    if "test_top5" in history[0]:
        axes.plot(epochs, [row["test_top5"] for row in history], "o-", ms=3, color=TRAIN, label="top-5", alpha=0.6)
    axes.axhline(score(best), color=INK, lw=0.8, ls=":")
    axes.set(
        title=f"test {'accuracy' if name == 'top-1' else 'precision'} (best {name} {score(best):.2f} % in epoch "
        f"{best['epoch']})",
        xlabel="epoch",
        ylabel="%",
        ylim=(0, 103),
    )


def draw_trade_off(
    accuracy: Mapping[str, float],
    against: Mapping[str, float],
    label: str,
    path: Path,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draw accuracy over cost, a named point per entry.

    Args:
        accuracy: percent, by name.
        against: cost, by name.
        label: name and unit of the cost.
        path: PNG to write.
        groups: names by the group that they belong to, two at most, each drawn in a colour of its own.
    """
    figure = new_figure(9, 6)
    axes = figure.subplots()
    points = [(against[name], value) for name, value in accuracy.items()]
    colours = dict.fromkeys(accuracy, TRAIN)
    for (group, names), colour in zip((groups or {}).items(), (WRONG, TRAIN), strict=False):
        colours |= dict.fromkeys(names, colour)
        axes.plot([], [], "o", color=colour, label=group)
    axes.scatter(*zip(*points, strict=True), c=[colours[name] for name in accuracy], zorder=2)
    axes.set(xlabel=label, ylabel="top-1, %")
    axes.set_xlim(0, 1.12 * max(against.values()))
    axes.margins(y=0.08)
    if groups:
        axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # or texts, placed where the axes are now, would move them
    taken = [Bbox([[x - 5, y - 5], [x + 5, y + 5]]) for x, y in axes.transData.transform(points)]
    if groups:
        taken.append(axes.get_legend().get_window_extent())
    for name, point in zip(accuracy, points, strict=True):
        _place(axes, name, point, taken, colours[name] if groups else INK)
    save(figure, path)


def _place(axes: Axes, name: str, point: tuple[float, float], taken: list[Bbox], colour: str) -> None:
    """Write a point's name beside it where it covers none of the boxes `taken`, and add its own."""
    places = [(6, side * up, at) for up in range(4, 74, 10) for at in ("left", "right") for side in (1, -1)]
    for x, y, alignment in places:
        text = axes.annotate(
            name,
            point,
            xytext=(x if alignment == "left" else -x, y),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            ha=alignment,
            va="center",
        )
        box = text.get_window_extent()
        inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        if inside and not any(box.overlaps(other) for other in taken):
            break
        if (x, y, alignment) != places[-1]:
            text.remove()
    if abs(y) > 4:
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0}
        axes.annotate("", point, text.xyann, textcoords="offset points", arrowprops=line)
    taken.append(box)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], path: Path, most: int = 20) -> None:
    """Draw a confusion matrix, rows the true class in percent; of more than `most` classes those with most errors.

    Args:
        confusion: int (classes, classes), images by [true class, first guess].
        classes: names.
        path: PNG to write.
        most: classes that one picture holds legibly.
    """
    confusion = np.asarray(confusion)
    errors = confusion.sum(1) + confusion.sum(0) - 2 * confusion.diagonal()
    shown = np.sort(np.argsort(-errors, kind="stable")[:most])
    counts = confusion[np.ix_(shown, shown)]
    percent = 100 * counts / np.maximum(confusion.sum(1)[shown, None], 1)
    names = [classes[i][:24] for i in shown]
    size = 2.6 + 0.52 * len(names)
    figure = new_figure(size + 0.6, size)
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for row, column in zip(*np.nonzero(counts), strict=True):
        on_dark = percent[row, column] > 55
        colour = "white" if on_dark else INK if row == column else WRONG
        weight = "normal" if row == column else "bold"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=9, weight=weight)
    accuracy = 100 * confusion.trace() / max(confusion.sum(), 1)
    title = f"top-1 {accuracy:.2f} % of {confusion.sum()} test images"
    if len(classes) > most:
        title += f"\nthe {most} classes with most errors of {len(classes)}"
    axes.set(title=title, xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, label="% of the true class")
    bar.outline.set_visible(False)
    save(figure, path)


def draw_predictions(
    images: Sequence[Image.Image], true: Sequence[str], predicted: Sequence[str], sure: Sequence[float], path: Path
) -> None:
    """Draw test images in a grid, each with the predicted class; where that is wrong, red, with the truth under it.

    Args:
        images: RGB.
        true: class names.
        predicted: class names.
        sure: probabilities of the predictions, in [0, 1].
        path: PNG to write.
    """
    columns = min(10, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure = new_figure(1.25 * columns, 1.62 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, truth, guess, probability in zip(grid.flat, images, true, predicted, sure, strict=False):
        wrong = truth != guess
        axes.set_axis_on()
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=WRONG if wrong else "#cccccc", linewidth=3 if wrong else 0.8)
        text = f"{guess[:14]} {100 * probability:.0f} %\n" + (f"is {truth[:14]}" if wrong else "")
        axes.set_title(
            text, fontsize=8, color=WRONG if wrong else INK, pad=3, linespacing=1.1, weight="bold" if wrong else None
        )
    right = sum(truth == guess for truth, guess in zip(true, predicted, strict=True))
    figure.suptitle(f"{len(images)} test images drawn at random: {right} right, {len(images) - right} wrong (red)")
    save(figure, path)


def draw_reductions(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw accuracy over operations and, where all were timed, speed; `rows` are of `visionmix reduce-curve`."""
    timed = all(row["speedup"] for row in rows)
    panels = {"gmacs": "multiply-accumulates of an image, 10⁹"}
    if timed:
        first = rows[0]
        conditions = f"batch {first['batch_size']}, {first['threads']} threads"
        panels["speedup"] = f"times the images a second of the whole model, {conditions}"
    figure = new_figure(5.5 * len(panels) + 1, 4.2)
    axes_of = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    whole = next((row for row in rows if not row["reduction"]), None)
    methods = list(dict.fromkeys(row["reduction"].partition(":")[0] for row in rows if row["reduction"]))
    for axes, (column, label) in zip(axes_of, panels.items(), strict=True):
        for number, method in enumerate(methods):
            mine = [row for row in rows if row["reduction"].partition(":")[0] == method]
            mine.sort(key=lambda row, column=column: float(row[column]))
            points = [[float(row[name]) for row in mine] for name in (column, "top1")]
            axes.plot(*points, f"{'os^Dv<>P'[number % 8]}-", ms=4.5, lw=1.2, color=f"C{number}", label=method)
        if whole:
            place = float(whole[column]), float(whole["top1"])
            axes.plot(*place, "*", ms=12, color=INK, label="whole model", zorder=3)
            axes.axhline(place[1], color=INK, lw=0.8, ls=":")
        axes.set(xlabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes_of[0].set(ylabel=f"top-1 of {rows[0]['images']} images, %")
    axes_of[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['image_size']} px, reduced without training")
    save(figure, path)
