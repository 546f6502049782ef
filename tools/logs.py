"""A run's figures and pictures for TensorBoard, always, and for Weights & Biases, where the recipe names a project."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from visionmix.tools.recipe import to_dict
from visionmix.tools.recipe_keys import Recipe

SECONDS = 60  # to wait for the server of Weights & Biases, at the start and at the end


def check_installed(recipe: Recipe) -> None:
    """Raise ValueError where the recipe asks for a package that is not installed."""
    if recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={recipe.log.wandb!r} needs the package wandb; install it (pip install 'visionmix[wandb]'), or "
            "set log.wandb to null"
        )


class _TensorBoard:
    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes two seconds to import

        # What the folder has of later steps, from before a stop or of a run that is overwritten, is to be passed over.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)
        text = yaml.safe_dump(to_dict(recipe), sort_keys=False)
        self.writer.add_text("recipe", f"```yaml\n{text}```", step)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, files: Mapping[str, Path]) -> None:
        for name, file in files.items():
            with Image.open(file) as image:
                self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        import wandb

        self.wandb = wandb
        noted = folder / "wandb" / "run_id"  # with which a run that goes on stays one run
        known = noted.read_text() if step and noted.is_file() else None
        self.run = wandb.init(
            project=recipe.log.wandb,
            name=folder.resolve().name,
            dir=folder,
            id=known,
            resume="allow" if known else None,
            config=to_dict(recipe),
            settings=wandb.Settings(console="off", init_timeout=SECONDS, finish_timeout=SECONDS),
        )
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(self.run.id)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def pictures(self, step: int, files: Mapping[str, Path]) -> None:
        self.run.log({name: self.wandb.Image(str(file)) for name, file in files.items()}, step=step)

    def flush(self) -> None:
        """Do nothing: its own process sends what it has."""

    def close(self) -> None:
        self.run.finish()


class Logs:
    """Passes on a run's figures. A writer that fails is dropped, with one warning, and the training goes on.

    Args:
        folder: of the run's results; None for a process that writes nothing.
        recipe: of the run.
        step: finished steps of the run that goes on.
        note: shows a line to the user.
    """

    def __init__(
        self,
        folder: Path | None = None,
        recipe: Recipe | None = None,
        *,
        step: int = 0,
        note: Callable[[str, str], None] = print,
    ) -> None:
        self.note = note
        self.writers: dict[str, Any] = {}
        if folder is not None and recipe is not None:
            self._try("TensorBoard", lambda: self.writers.update(TensorBoard=_TensorBoard(folder, recipe, step)))
            if recipe.log.wandb:
                name = "Weights & Biases"
                self._try(name, lambda: self.writers.update({name: _WeightsAndBiases(folder, recipe, step)}))

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *exc: object) -> None:
        self._all(lambda writer: writer.close())
        self.writers.clear()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of a training step."""
        self._all(lambda writer: writer.scalars(step, {f"step/{name}": value for name, value in figures.items()}))

    def epoch(self, step: int, row: Mapping[str, float]) -> None:
        """Log an epoch's row of summary.csv, at the step that ended it, and see that it is on disk."""
        self._all(lambda writer: writer.scalars(step, {f"epoch/{name}": value for name, value in row.items()}))
        self._all(lambda writer: writer.flush())

    def pictures(self, step: int, files: Mapping[str, Path]) -> None:
        """Log pictures by their names."""
        self._all(lambda writer: writer.pictures(step, files))

    def _all(self, act: Callable[[Any], None]) -> None:
        for name, writer in list(self.writers.items()):
            self._try(name, lambda writer=writer: act(writer))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a writer raises, of a full disk or a server, a training is worth more
            self.writers.pop(name, None)
            reason = str(error) or type(error).__name__
            self.note(f"{name} failed ({reason}); the training goes on without it", "yellow")
