"""Exported files as functions from images to logits, and what they say about themselves."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmix.private_api import load_compiled_package
from visionmix.tools.arguments import absent
from visionmix.tools.export_files import METADATA, library, reason

Run = Callable[[Tensor], Tensor]


def is_compiled(path: Path) -> bool:
    """Return whether a .pt2 file holds machine code rather than a program of torch.export."""
    with zipfile.ZipFile(path) as file:
        return any("/aotinductor/" in name for name in file.namelist())


def open_file(path: Path, threads: int | None = None) -> tuple[Run, dict[str, Any]]:
    """Return (a function from images to logits, the metadata) of a file that `visionmix export` wrote.

    The name's end says its format; what ends in neither .onnx, .xml nor .pt2 is TorchScript. Files of ONNX and OpenVINO
    run on the CPU, in the precision they are written in.

    Args:
        path: of the file.
        threads: of ONNX Runtime and OpenVINO; None for PyTorch's number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the package that runs it is not installed, or cannot run what the file holds, or it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {absent(path)}; visionmix export writes it")
    try:
        return _open(path, threads or torch.get_num_threads())
    except (ValueError, OSError):
        raise
    except Exception as error:  # every runtime has errors of its own
        raise ValueError(f"{path} cannot be opened: {reason(error)}; write it anew by visionmix export") from error


def _open(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    if path.suffix == ".onnx":
        return _open_onnx(path, threads)
    if path.suffix == ".xml":
        return _open_openvino(path, threads)
    extra = {METADATA: ""}
    if path.suffix != ".pt2":
        script = torch.jit.load(path, _extra_files=extra)
        return script, _read(extra[METADATA])
    if is_compiled(path):
        package = load_compiled_package(path)
        return package, _read(package.get_metadata().get(METADATA))
    program = torch.export.load(path, extra_files=extra)
    return program.module(), _read(extra[METADATA])


def _read(text: str | bytes | None) -> dict[str, Any]:
    said = json.loads(text) if text else {}
    return said if isinstance(said, dict) else {}


def _unable(runtime: str, path: Path, error: Exception) -> ValueError:
    return ValueError(f"{runtime} cannot run {path.name}: {reason(error)}; if it is --dynamic, export a size at a time")


def _open_onnx(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of ONNX Runtime's own kinds
        raise _unable("ONNX Runtime", path, error) from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run, _read(session.get_modelmeta().custom_metadata_map.get(METADATA))


def _open_openvino(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    openvino = library("openvino")
    model = openvino.Core().read_model(path)
    # On recent CPUs OpenVINO would compute in bfloat16.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    try:
        compiled = openvino.Core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise _unable("OpenVINO", path, error) from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return run, _read(model.get_rt_info(METADATA).astype(str) if model.has_rt_info(METADATA) else None)
