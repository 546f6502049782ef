"""Output for people: a live bar for training in a terminal, plain lines in a log file, tables in both."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from visionmix.tools.score import score_name, score_text
from visionmix.tools.stopwatch import PARTS


def duration(seconds: float) -> str:
    """Return seconds as 1:02:03, or 2:03 under an hour."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def table_console() -> Console:
    """Return a console on standard output for tables, wide enough that a file or a pipe gets every name whole."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


class _Figures(ProgressColumn):
    """The numbers at the right of the bar, coloured by meaning."""

    def render(self, task: Task) -> Text:
        figures = task.fields.get("figures", ())
        return Text("  ").join(Text(text, style=style) for text, style in figures)


class Display:
    """Shows a run of `epochs` epochs of `steps` batches; silent on every process but the first.

    Args:
        epochs: of the whole run.
        steps: training batches per epoch.
        quiet: show nothing.
        console: where to; standard output by default.
        log_seconds: between two plain lines, where there is no terminal.
    """

    def __init__(
        self, epochs: int, steps: int, *, quiet: bool = False, console: Console | None = None, log_seconds: float = 20
    ) -> None:
        self.epochs, self.steps, self.quiet, self.log_seconds = epochs, steps, quiet, log_seconds
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.progress: Progress | None = None
        self.seconds_a_step = 0.0
        self.seconds_a_test = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not self.quiet:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _Figures(),
                console=self.console,
                transient=True,
            )
            self.task = self.progress.add_task("", total=self.steps)
            self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.progress:
            self.progress.stop()

    def note(self, text: str, style: str = "") -> None:
        """Print a line above the bar."""
        if not self.quiet:
            self.console.print(text, style=style or None, markup=False)

    def begin(self, epoch: int, phase: str, total: int) -> None:
        """Begin a phase ("train" or "test") of an epoch, `total` steps long."""
        self.epoch, self.phase, self.total, self.done, self.images = epoch, phase, total, 0, 0
        self.started = self.logged = time.perf_counter()
        if self.progress:
            self.progress.reset(self.task, total=total, description=f"epoch {epoch}/{self.epochs} {phase}", figures=())

    def step(self, images: int, loss: float | None = None, lr: float | None = None) -> None:
        """Count a step of `images` images."""
        self.done += 1
        self.images += images
        now = time.perf_counter()
        elapsed = now - self.started
        figures = [(f"{self.images / elapsed:.0f} images/s", "cyan")]
        if self.phase == "train":
            self.seconds_a_step = elapsed / self.done
        if loss is not None:
            figures.append((f"loss {loss:.3f}", "magenta"))
        if lr is not None:
            figures.append((f"lr {lr:.2e}", "yellow"))
        figures.append((f"ETA {duration(self._eta())}", "green"))
        if self.progress:
            self.progress.update(self.task, completed=self.done, figures=figures)
        elif now - self.logged > self.log_seconds:
            self.logged = now
            texts = ", ".join(text for text, _ in figures)
            self.note(f"epoch {self.epoch}/{self.epochs} {self.phase} step {self.done}/{self.total}: {texts}")

    def _eta(self) -> float:
        left = (self.epochs - self.epoch) * (self.steps * self.seconds_a_step + self.seconds_a_test)
        if self.phase == "train":
            return left + (self.total - self.done) * self.seconds_a_step + self.seconds_a_test
        return left + (time.perf_counter() - self.started) / self.done * (self.total - self.done)

    def end_epoch(self, row: dict, best: bool) -> None:
        """Print the epoch's row of summary.csv, and under it how the time of its training steps divides."""
        if self.phase == "test":
            self.seconds_a_test = time.perf_counter() - self.started
        line = (
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  train loss {row['train_loss']:.3f}  "
            f"test loss {row['test_loss']:.3f}  {score_name(row)} {score_text(row)}  lr {row['lr']:.1e}  "
            f"{row['images_per_second']:.0f} images/s  {duration(row['seconds'])}"
        )
        self.note(line + ("  best" if best else ""), style="bold" if best else "")
        seconds = {part: row[f"seconds_{part}"] for part in PARTS if f"seconds_{part}" in row}
        whole = sum(seconds.values()) or 1
        shares = ", ".join(f"{PARTS[part]} {100 * value / whole:.0f} %" for part, value in seconds.items())
        self.note(f"{'':{6 + 2 * len(str(self.epochs))}}  {shares}", style="dim")
