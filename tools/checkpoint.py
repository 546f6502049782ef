"""Checkpoints: read without running code that they hold; and files written so that the old one survives any failure.

A checkpoint of `train` is a folder that torch.distributed.checkpoint wrote, by any number of processes, with or without
sharding. It holds tensors alone; plain values are a tensor of the bytes that torch.save makes of them. Its content is

    recipe      the run's recipe, as nested dictionaries
    classes     class names in the order of the outputs
    input       image_size, interpolation, crop_pct, mean, std of the test images
    epoch       finished epochs
    step        finished steps
    steps       an epoch's
    history     one dictionary per epoch: the rows of summary.csv
    model       state dict
    ema         state dict of the moving average, or None
    optimizer   state dict, with names of parameters in place of numbers
    scaler      state dict of the float16 loss scaler
    projection  state dict of the layer between a student's features and its teacher's, or None
    place       the loader's place within the next epoch, or None between two epochs
    processes   for each process its sums over that epoch and its generators, or None
"""

import errno
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint import BytesStorageMetadata, CheckpointException, FileSystemReader, metadata

from visionmix.models.loading import check_numbers
from visionmix.models.weights import read_checkpoint
from visionmix.private_api import load_whole_state_dict

METADATA = ".metadata"  # of torch.distributed.checkpoint, which writes it last


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the same folder, flush it to disk, then rename it to `path`.

    On any failure `path` is either unchanged or complete, and the temporary file is gone.

    Raises:
        OSError: when the disk is full or refuses, naming the file and whether the earlier one is whole.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors lets the owner alone read its files
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        kept = f"; the earlier {path.name} is whole" if path.exists() else ""
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"could not write {path}{kept}: {reason(error)}") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    """Return why a file could not be read or written, in a line."""
    causes = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    if any(getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause) for cause in causes):
        return "the disk is full, make room"
    return (str(causes[0]).strip() or type(causes[0]).__name__).splitlines()[0]


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], metadata: dict) -> None:
    """Write weights as safetensors, with `metadata` as JSON under "visionmix". Raises as `write_aside` does."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
    text = {"visionmix": json.dumps(metadata)}
    write_aside(path, lambda aside: safetensors.torch.save_file(tensors, aside, metadata=text))


def to_parts(content: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """Return the tensors of nested dictionaries, with all else as a tensor "plain" for each process.

    Args:
        content: of a checkpoint, with "process" in place of "processes".
        rank: of this process; others than the first give their "process" alone.
    """
    plain, tensors = _split(content)
    if rank:
        plain = {"process": plain["process"]}
    file = io.BytesIO()
    torch.save(plain, file)
    return tensors | {"plain": {str(rank): torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)}}


def _split(content: Mapping[str, Any]) -> tuple[dict, dict]:
    plain, tensors = {}, {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value
        elif isinstance(value, Mapping) and key != "process":
            plain[key], inside = _split(value)
            if inside:
                tensors[key] = inside
        else:
            plain[key] = value
    return plain, tensors


def _join(plain: dict, tensors: Mapping[str, Any]) -> dict:
    for key, value in tensors.items():
        plain[key] = _join(plain[key], value) if isinstance(value, dict) else value
    return plain


class _Unpickler(pickle.Unpickler):
    """Reads the metadata of torch.distributed.checkpoint, and no other objects."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        )
        known = known or (module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"))
        known = known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        described = getattr(metadata, name, None) if module == metadata.__name__ else None
        if known or (isinstance(described, type) and described.__module__ == module):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any):
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Unpickler(file).load()


def is_whole(path: Path) -> bool:
    """Return whether a folder is a checkpoint of torch.distributed.checkpoint whose files have all their bytes."""
    try:
        parts = _Reader(path).read_metadata().storage_data.values()
        return all((path / part.relative_path).stat().st_size >= part.offset + part.length for part in parts)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError):
        return False


def _read_folder(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint that torch.distributed.checkpoint wrote, whole in this process's memory."""
    if path.name.endswith(".unfinished") or not is_whole(path):
        raise ValueError(f"checkpoint {path} is damaged, or was cut off while it was written; take an earlier one")
    reader = _Reader(path)
    held = reader.read_metadata().state_dict_metadata
    if "plain.0" not in held or any(isinstance(value, BytesStorageMetadata) for value in held.values()):
        raise ValueError(f"{path} is a checkpoint of torch.distributed.checkpoint, but not one of train.py")
    try:
        tensors = load_whole_state_dict(reader)
        plain = tensors.pop("plain")
        processes = [
            torch.load(io.BytesIO(plain[str(rank)].numpy().tobytes()), weights_only=True) for rank in range(len(plain))
        ]
    except (CheckpointException, RuntimeError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {reason(error)}") from error
    content = _join(dict(processes[0]), tensors)
    content["processes"] = [process["process"] for process in processes]
    return content


def read(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content, or `{"model": state dict}` of a file or folder that another program wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, was cut off while it was written, or holds no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if (path / METADATA).exists() or path.name.endswith(".unfinished"):
        return _read_folder(path)
    if path.is_dir() or path.suffix != ".safetensors":
        return {"model": read_checkpoint(path)}
    tensors = read_checkpoint(path)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("visionmix", "{}")
    return {**_about(path, text), "model": tensors}


def _about(path: Path, text: str) -> dict[str, Any]:
    """Return what `save_weights` wrote beside the tensors.

    Raises:
        ValueError: it is nothing that `save_weights` writes.
    """
    try:
        about = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of visionmix train: its metadata is no JSON ({error})") from error
    kinds = {"": (about, dict)}
    if isinstance(about, dict):
        recipe = about.get("recipe", {})
        model = recipe.get("model", {}) if isinstance(recipe, dict) else {}
        model = model if isinstance(model, dict) else {"name": model}
        given = about.get("input") or {}
        kinds |= {"recipe": (recipe, dict), "recipe.model.name": (model.get("name", ""), str)}
        kinds |= {"recipe.model.kwargs": (model.get("kwargs", {}), dict), "ema": (about.get("ema") or {}, dict)}
        # A model of a recipe has as many classes as there are names.
        kinds["classes"] = (about.get("classes", None if model else []), list)
        kinds["input"] = (given, dict)
        if isinstance(given, dict):
            kinds["input.image_size"] = (given.get("image_size", 1), int | list)
    for key, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            meant = getattr(kind, "__name__", kind)
            place = key or "its metadata"
            raise ValueError(f"{path} is no checkpoint of visionmix train: {place} is {value!r}, no {meant}")
    return about


def weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights to test and use: the moving average where there is one."""
    return without_splits(content.get("ema") or content["model"])


def without_splits(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict without the batch norms that `timm.layers.convert_splitbn_model` adds for training alone."""
    return {name: value for name, value in state.items() if ".aux_bn." not in name}


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict that `train` saved; raises ValueError as `check_weights` does, before anything is loaded."""
    check_weights(model, state, source)
    model.load_state_dict(state)


def check_weights(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that keys and shapes of a state dict are exactly the model's, and its numbers such as a model has.

    Raises:
        ValueError: when a key is missing or left over, a shape differs, or a number is not finite, with all of them.
    """
    own = model.state_dict()
    problems = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(getattr(state[key], 'shape', ()))} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and getattr(state[key], "shape", None) != own[key].shape
    ]
    if not problems:
        check_numbers(state, own, source)
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"{source} holds the weights of another model than {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(problems[:12])
            + more
        )
