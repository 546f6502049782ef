"""Time of exported files beside the model in PyTorch, on this CPU.

    visionmix export vig_s --random-weights --format onnx --out vig_s.onnx
    visionmix export vig_s --random-weights --format openvino --out vig_s.xml
    python tools/benchmark_exports.py vig_s.onnx vig_s.xml

The files are of one model, as they say themselves. All are called in turns, PyTorch first, so that a machine that
changes its speed changes it for all. Appends a row each to benchmarks/exports.csv. Random weights take as long as
trained ones.
"""

import argparse
import operator
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from visionmix.tools import display, models, timing
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.export_checks import compare
from visionmix.tools.export_runs import is_compiled, open_file

_MODEL = ("model", "outputs", "reduction", "kwargs")  # what a file says of how the model is built
_SAID = {*_MODEL, "input", "precision", "dynamic"}
_CSV = Path("benchmarks/exports.csv")
_KINDS = {".onnx": "ONNX Runtime", ".xml": "OpenVINO", ".pt2": "torch.export"}


def _kind(path: Path) -> str:
    if path.suffix == ".pt2" and is_compiled(path):
        return "AOTInductor"
    return _KINDS.get(path.suffix, "TorchScript")


def prepare(files: list[Path], batch: int) -> tuple[str, int, dict[str, Callable[[], object]]]:
    """Return (model, side of the images, what to time by name) of files of one model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are of several models or sizes, or do not say which.
    """
    opened = [open_file(path) for path in files]
    for path, (_, said) in zip(files, opened, strict=True):
        size = said["input"].get("image_size") if isinstance(said.get("input"), dict) else None
        if not (said.keys() >= _SAID and isinstance(size, list) and len(size) == 2):
            raise ValueError(f"{path} does not say which model it holds, and how; write it anew by visionmix export")
    models_said = [{key: said[key] for key in _MODEL} | {"size": said["input"]["image_size"]} for _, said in opened]
    said = models_said[0]
    if others := [each for each in models_said if each != said]:
        raise ValueError(f"the files are not all of one model and size ({said}, {others[0]}); export them anew")
    name, size = said["model"], said["size"]
    model = models.create_model(name, num_classes=said["outputs"], reduction=said["reduction"], **said["kwargs"]).eval()
    images = torch.randn(batch, 3, *size)
    calls = {"PyTorch": lambda: model(images)}
    for run, _ in opened:
        compare(run, model, images)  # says whether it runs at all, which its time does not
    for path, (run, said) in zip(files, opened, strict=True):
        kind = f"{_kind(path)}, {said['precision']}" + (f", dynamic {said['dynamic']}" * (said["dynamic"] != "none"))
        calls[kind] = lambda run=run: run(images)
    return name, size[0], calls


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="visionmix benchmark-exports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="+", type=Path, help="files that visionmix export wrote, of one model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20, help="calls of each, one after another (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=_CSV, help="file the rows are appended to")
    args = parser.parse_args(argv)
    console = display.table_console()
    try:
        check_least(1, batch=args.batch, threads=args.threads, turns=args.turns)
        check_out(args.csv, name="--csv")
        torch.set_num_threads(args.threads)
        name, side, calls = prepare(args.file, args.batch)
        timing.wait_until_quiet()
        with torch.inference_mode():
            samples = timing.in_turns(calls, args.turns)
    except (timing.NoisyMachine, ValueError, OSError) as error:
        console.print(f"nothing recorded: {error}", style="red")
        return 1
    rows = []
    for kind, own in samples.items():
        time = timing.spread(own)
        rows.append({
            "model": name,
            "program": kind,
            "img_size": side,
            "batch": args.batch,
            "p20_ms": f"{time.p20 * 1e3:.4g}",
            "p50_ms": f"{time.p50 * 1e3:.4g}",
            "p80_ms": f"{time.p80 * 1e3:.4g}",
            "times_pytorch": f"{statistics.median(map(operator.truediv, own, samples['PyTorch'])):.3g}",
            **timing.conditions(),
        })  # fmt: skip
    table = Table("program", "p50_ms", "times PyTorch's", title=f"{name}, {side} pixels, batch {args.batch}")
    for row in rows:
        table.add_row(row["program"], row["p50_ms"], row["times_pytorch"])
    console.print(table)
    try:
        timing.append_rows(args.csv, rows)
    except (ValueError, OSError) as error:
        console.print(f"no row was added: {error}", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
