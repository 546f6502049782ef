"""Checkpoints: written so that the old one survives any failure, read without running code that they hold.

A checkpoint is a dictionary of tensors and plain values, written by torch.save:

    format      1
    recipe      the run's recipe, as nested dictionaries
    classes     class names in the order of the outputs
    input       image_size, interpolation, crop_pct, mean, std of the test images
    epoch       finished epochs
    step        finished steps
    history     one dictionary per epoch: the rows of summary.csv
    model       state dict
    ema         state dict of the moving average, or None
    optimizer   state dict
    scaler      state dict of the float16 loss scaler
    projection  state dict of the layer between a student's features and its teacher's, or None
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from visionmix.models.weights import read_checkpoint, unwrap

FORMAT = 1


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the same folder, flush it to disk, then rename it to `path`.

    On any failure `path` is either unchanged or complete, and the temporary file is gone.

    Raises:
        OSError: when the disk is full or refuses, naming the file and whether the earlier one is whole.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        kept = f"; the earlier {path.name} is whole" if path.exists() else ""
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "the disk is full, make room" if full else str(error)
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"could not write {path}{kept}: {remedy}") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class _Honest:
    """A file that remembers why writing failed: torch.save hides an OSError behind a RuntimeError of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, content: bytes) -> int:
        rest = memoryview(content).cast("B")
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
            return len(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, content: dict) -> None:
    """Write a checkpoint; `content` holds tensors and plain values. Raises OSError as `write_aside` does."""

    def write(aside: Path) -> None:
        # Unbuffered, so that a full disk is met in write() and not when the file is closed.
        with aside.open("wb", buffering=0) as raw:
            file = _Honest(raw)
            try:
                torch.save({"format": FORMAT, **content}, file)
            except RuntimeError as error:
                raise file.error or error from error

    write_aside(path, write)


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], metadata: dict) -> None:
    """Write weights as safetensors, with `metadata` as JSON under "visionmix". Raises as `write_aside` does."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
    text = {"visionmix": json.dumps(metadata)}
    write_aside(path, lambda aside: safetensors.torch.save_file(tensors, aside, metadata=text))


def read(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content, or `{"model": state dict}` of a file or folder that another program wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, of another format, or holds no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.is_dir():
        return {"model": read_checkpoint(path)}
    if path.suffix == ".safetensors":
        tensors = read_checkpoint(path)
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("visionmix", "{}"))
        return {**metadata, "model": tensors}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # read_checkpoint reads published files with other objects inside, and explains damage
        return {"model": read_checkpoint(path)}
    if not (isinstance(content, dict) and isinstance(content.get("format"), int)):
        return {"model": unwrap(content, str(path))}
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has format={content['format']}; this version reads format={FORMAT}")
    return content


def weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights to test and use: the moving average where there is one."""
    return content.get("ema") or content["model"]


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict that `train` saved, whose keys and shapes are exactly the model's.

    Raises:
        ValueError: when a key is missing or left over or a shape differs, with all of them, before anything is loaded.
    """
    own = model.state_dict()
    problems = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(getattr(state[key], 'shape', ()))} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and getattr(state[key], "shape", None) != own[key].shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"{source} holds the weights of another model than {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(problems[:12])
            + more
        )
    model.load_state_dict(state)
