"""A run's checkpoints: folders that torch.distributed.checkpoint writes beside the training, and which of them to keep.

A folder is written as NAME.unfinished and renamed when the last process is done, so that one that is cut off is never
taken for a checkpoint. The names count finished epochs and, in the middle of an epoch, steps: epoch_0003,
epoch_0003_step_00001200.
"""

import contextlib
import io
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from visionmix.tools import checkpoint

KEEP = 2  # newest checkpoints, besides that of the best epoch
UNFINISHED = ".unfinished"
_NAME = re.compile(r"epoch_(\d+)(?:_step_(\d+))?")


def name_of(epoch: int, step: int | None = None) -> str:
    """Return the name of a checkpoint after so many epochs, and steps of the run where the next epoch has begun."""
    return f"epoch_{epoch:04d}" + ("" if step is None else f"_step_{step:08d}")


def _place(path: Path) -> tuple[int, int] | None:
    """Return (epochs, steps) of a checkpoint's name, by which checkpoints sort in time; None for other names."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _listed(folder: Path) -> list[Path]:
    """Return the folders with a checkpoint's name, the newest first."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in inside if _place(path) is not None), key=_place, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return (the newest whole checkpoint of a folder or None, cut-off and damaged ones that are passed over)."""
    broken = sorted(folder.glob(f"*{UNFINISHED}"))
    for path in _listed(folder):
        if checkpoint.is_whole(path):
            return path, broken
        broken.append(path)
    return None, broken


class _Honest(io.FileIO):
    """A file that remembers why writing failed: torch.save hides an OSError behind a RuntimeError of its own."""

    put, error = io.FileIO.write, None

    def write(self, content) -> int:
        rest = memoryview(content).cast("B")
        try:
            while rest:
                rest = rest[self.put(rest) :]
        except OSError as error:
            self.error = self.error or error
            raise
        return memoryview(content).nbytes


class _Files(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path, mode):
        if mode != "wb":
            with super().create_stream(path, mode) as file:
                yield file
            return
        with _Honest(path, mode) as file:
            try:
                yield file
            except RuntimeError as error:
                raise file.error or error from error


class _Writer(FileSystemWriter):
    """Writes aside, renames the folder when all processes' files are whole, then deletes what is not to be kept."""

    def __init__(self, path: Path, best: str | None) -> None:
        super().__init__(path.with_name(path.name + UNFINISHED))
        self.fs = _Files()
        self.aside, self.final, self.best = Path(self.path), path, best

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        if is_coordinator:  # the remains of one that was cut off
            shutil.rmtree(self.aside, ignore_errors=True)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)  # in the first process, after the last one has written its files
        old = self.final.with_name(f"old_{self.final.name}{UNFINISHED}")
        if self.final.exists():  # of the same step, before the run went on from an earlier checkpoint
            shutil.rmtree(old, ignore_errors=True)
            self.final.rename(old)
        self.aside.rename(self.final)
        with contextlib.suppress(OSError):  # not every file system can
            folder = os.open(self.final.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        _prune(self.final, self.best)


def _prune(current: Path, best: str | None) -> None:
    """Delete unfinished checkpoints, those that come after the current one, and old ones but the best epoch's."""
    earlier = [path for path in _listed(current.parent) if _place(path) <= _place(current)]
    kept = {path.name for path in earlier[:KEEP]} | {path.name for path in earlier if path.name == best}
    for path in (*_listed(current.parent), *current.parent.glob(f"*{UNFINISHED}")):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


class Saver:
    """Writes a run's checkpoints while the training goes on; all processes call its methods together.

    A checkpoint that cannot be written is told, and the run goes on.

    Args:
        folder: of the checkpoints.
        say: prints a warning.
        world: number of processes.
        rank: of this process.
        steps: between two checkpoints in an epoch; 0 for none.
        minutes: between two checkpoints in an epoch; 0 for none.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str, str], None],
        *,
        rank: int = 0,
        world: int = 1,
        steps: int = 0,
        minutes: float = 0,
    ) -> None:
        self.folder, self.say, self.rank, self.steps, self.minutes = folder, say, rank, steps, minutes
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of each checkpoint of one process
        self.writing, self.saved = None, time.monotonic()
        # Collectives of the writing thread must not meet those of the training, and copies in memory need gloo.
        self.group, self.clock = (dist.new_group(backend="gloo") if world > 1 else None for _ in range(2))

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after this step, in all processes the same."""
        if self.steps and step % self.steps == 0:
            return True
        if not self.minutes:
            return False
        late = [time.monotonic() - self.saved >= 60 * self.minutes]
        if self.clock:  # that of the first process
            dist.broadcast_object_list(late, src=0, group=self.clock)
        return late[0]

    def save(self, name: str, content: Mapping, best: str | None = None) -> None:
        """Begin to write a checkpoint, when the one before is written; `best` names that of the best epoch."""
        self.wait()
        self.saved = time.monotonic()
        path = self.folder / name
        future = dcp.async_save(
            checkpoint.to_parts(content, self.rank),
            storage_writer=_Writer(path, best),
            process_group=self.group,
            no_dist=self.group is None,
        )
        self.writing = path, future

    def wait(self) -> None:
        """Wait until the last checkpoint is written; print a warning where it could not be."""
        if self.writing is None:
            return
        path, future = self.writing
        self.writing = None
        try:
            future.result()
        except (OSError, CheckpointException) as error:
            if self.rank:
                return
            shutil.rmtree(path.with_name(path.name + UNFINISHED), ignore_errors=True)
            earlier, _ = newest(self.folder)
            kept = f"; {earlier.name} is whole, and" if earlier else ";"
            self.say(f"could not write {path}: {checkpoint.reason(error)}{kept} the training goes on", "bold red")
