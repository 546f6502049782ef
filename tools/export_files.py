"""From a model to a file that runs without its Python code: ONNX, TorchScript, torch.export, AOTInductor, OpenVINO.

Each function writes one format and no more; `visionmix.tools.export` checks what it wrote. Ops of the library that no
other program knows are exported as their PyTorch reference, so that a file needs nothing of visionmix.
"""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from visionmix import kernels
from visionmix.private_api import compile_and_package
from visionmix.tools.optional import load

if TYPE_CHECKING:
    import onnx_ir

library = partial(load, extra="export", user="exported files")

SUFFIXES = {"onnx": (".onnx",), "torchscript": (".pt", ".ts", ".torchscript"), "pt2": (".pt2",), "openvino": (".xml",)}
METADATA = "visionmix"  # the key under which files say which model they hold and which images it takes
INPUT, OUTPUT = "images", "logits"
# The axes of (batch, channels, height, width) images that may be dynamic.
DYNAMIC = {"none": {}, "batch": {0: "batch"}, "all": {0: "batch", 2: "height", 3: "width"}}
_ONNX_LIMIT = 2**31 - 2**24  # bytes of one protobuf file, less some for the graph


# What OpenVINO writes around a reason: where in its own source it stood, and headings.
_AROUND = ("Exception from", "Check '", "While validating", "FrontEnd API", "Model wasn't", "Details:", "Summary:")


def reason(error: Exception) -> str:
    """Return what a runtime's error says, in one line, without where in the runtime's own source it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(_AROUND)]
    return " ".join(lines)[:300] or type(error).__name__


class HalfInside(nn.Module):
    """A model in float16 that takes and returns float32.

    Args:
        model: as it is built, in float32; its parameters are cast in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.half()).float()


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; at the end, move it and what lies beside it to `path`.

    The file called `path.name` is moved last. After an error nothing is moved, and an earlier file stays as it was.

    Raises:
        OSError: the disk is full or refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder, path.name)
        yield aside
        files = sorted(aside.parent.iterdir(), key=lambda file: file == aside)
        for file in files:
            if (target := path.with_name(file.name)).is_dir():
                raise IsADirectoryError(f"{target} is a folder; move it, or give another file")
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        for file in files:
            file.replace(path.with_name(file.name))


def to_program(
    module: nn.Module, example: Tensor, *, dynamic: Mapping[int, str] | None = None, fused: bool = False
) -> ExportedProgram:
    """Return `module` as a program of torch.export.

    Args:
        module: in eval mode.
        example: its input. Dynamic axes of it are better of different lengths above 1: torch.export takes two axes
            that are equal for one.
        dynamic: names of the axes whose length may change, by their place.
        fused: keep the library's ops, which only a process that imports visionmix can run.

    Raises:
        ValueError: the model is tied to the length of an axis that is to be dynamic.
    """
    dynamic = dynamic or {}
    with kernels.use("auto" if fused else "reference"), torch.no_grad(), _quiet():
        program = torch.export.export(module, (example,), dynamic_shapes=(dict.fromkeys(dynamic, Dim.AUTO),))
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    sizes = inputs[0].meta["val"].shape
    # A symbol that became a number is still a SymInt.
    if fixed := [name for axis, name in dynamic.items() if str(sizes[axis]).isdigit()]:
        raise ValueError(
            f"dynamic {', '.join(fixed)}: {type(module).__name__} computes with that length as a number, so that the "
            "graph would serve no other; export it with --dynamic batch, or without --dynamic, once a size"
        )
    if len({str(sizes[axis]) for axis in dynamic}) < len(dynamic):
        raise ValueError(
            f"the example {tuple(example.shape)} has equal lengths along {', '.join(dynamic.values())}, which would "
            "have to stay equal; give each axis another one"
        )
    return program


def to_onnx(
    module: nn.Module,
    example: Tensor,
    path: Path,
    *,
    dynamic: Mapping[int, str] | None = None,
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `module` as ONNX, with the weights inside, or in `path`.data where a file of ONNX cannot hold them.

    Args:
        module: in eval mode, with one input; its first output is called "logits".
        example: as `to_program` takes it.
        path: of the file.
        dynamic: as `to_program` takes it.
        opset: version of ONNX's operators; None for the exporter's own.
        metadata: kept in the file as JSON under "visionmix".

    Raises:
        ValueError: onnx or onnxscript is not installed, an axis cannot be dynamic, or ONNX has no operator for one of
            the model's.
    """
    for name in ("onnx", "onnxscript"):
        library(name)
    program = to_program(module, example, dynamic=dynamic)
    symbols = _symbols(program, dynamic or {})
    any_size = not {2, 3}.isdisjoint(dynamic or {})
    try:
        with _quiet():
            options = {"input_names": [INPUT], "opset_version": opset, "optimize": not any_size}
            exported = torch.onnx.export(program, verbose=False, **options)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ValueError(f"ONNX cannot hold this model: {str(cause).strip().splitlines()[0]}") from error
    if any_size:
        _simplify(exported.model)
    if opset is not None and (got := exported.model.opset_imports.get("")) != opset:
        raise ValueError(
            f"opset={opset} is none that the exporter can write this model in; it gave {got}, leave it out"
        )
    exported.rename_axes(symbols)
    exported.model.graph.outputs[0].name = OUTPUT
    for node in exported.model.graph:  # lines of the source files of this machine, three quarters of a small file
        node.metadata_props.clear()
    if metadata:
        exported.model.metadata_props[METADATA] = json.dumps(metadata)
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    exported.save(path, external_data=size > _ONNX_LIMIT)


def _simplify(model: "onnx_ir.Model") -> None:
    """Do what the exporter's own optimization does, without its rules for patterns of nodes.

    These search every node for every pattern: in a graph for any size, which has many nodes, they took two fifths of an
    export's time, and the files ran no faster for them.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants_ir

    passes.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model)
        passes.RemoveUnusedNodesPass()(model)
    last = (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )
    for each in last:
        each(model)


def to_torchscript(
    module: nn.Module,
    example: Tensor,
    path: Path,
    *,
    scripted: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write `module` as TorchScript, and return the ops of the library that it calls.

    Args:
        module: in eval mode.
        example: its input, which a traced file is tied to.
        path: of the file.
        scripted: compile the code, which serves every batch and size and calls the library's ops, rather than record
            what it does with `example`, in PyTorch's own operators.
        metadata: kept in the file as JSON under "visionmix".

    Raises:
        ValueError: the code cannot be compiled.
    """
    with torch.no_grad(), _quiet():
        if scripted:
            try:
                script = torch.jit.script(module)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"TorchScript does not compile {type(module).__name__} ({reason}); leave --dynamic and --fused "
                    "out, for a trace of one size"
                ) from error
        else:
            with kernels.use("reference"):
                script = torch.jit.trace(module, example, check_trace=False)
        torch.jit.save(script, path, _extra_files={METADATA: json.dumps(metadata or {})})
        return sorted(name for name in torch.jit.export_opnames(script) if name.startswith("visionmix::"))


def to_pt2(
    module: nn.Module,
    example: Tensor,
    path: Path,
    *,
    dynamic: Mapping[int, str] | None = None,
    fused: bool = False,
    compiled: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `module` as a program of torch.export, or as machine code that AOTInductor makes from it.

    Args:
        module: in eval mode.
        example: as `to_program` takes it.
        path: of the file, whose name ends in .pt2.
        dynamic: as `to_program` takes it.
        fused: as `to_program` takes it.
        compiled: compile it for the device that `example` is on; such a file needs no Python.
        metadata: kept in the file as JSON under "visionmix".

    Raises:
        ValueError: an axis cannot be dynamic.
    """
    program = to_program(module, example, dynamic=dynamic, fused=fused)
    text = json.dumps(metadata or {})
    if compiled:
        with _quiet():
            compile_and_package(program, path, {METADATA: text})
    else:
        torch.export.save(program, path, extra_files={METADATA: text})


def to_openvino(onnx: Path, path: Path, *, half: bool = False, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an ONNX file as OpenVINO's intermediate representation: `path`, and its weights beside it as .bin.

    Args:
        onnx: the file.
        path: whose name ends in .xml.
        half: store the weights in float16; OpenVINO computes in the precision that its device likes best.
        metadata: kept as JSON under "visionmix".

    Raises:
        ValueError: openvino is not installed, or does not know one of the operators.
    """
    openvino = library("openvino")
    try:
        model = openvino.convert_model(str(onnx))
    except Exception as error:
        raise ValueError(f"OpenVINO does not take this model: {reason(error)}") from error
    model.set_rt_info(json.dumps(metadata or {}), METADATA)
    openvino.save_model(model, str(path), compress_to_fp16=half)


def _symbols(program: ExportedProgram, dynamic: Mapping[int, str]) -> dict[str, str]:
    """Return the names of the dynamic axes by the symbols that stand for them."""
    (node,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    return {str(node.meta["val"].shape[axis]): name for axis, name in dynamic.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporters say about themselves: deprecations, and sizes that a trace fixes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
