"""Time of exported files beside the model in PyTorch, on this CPU.

    visionmix export vig_s --random-weights --format onnx --out vig_s.onnx
    visionmix export vig_s --random-weights --format openvino --out vig_s.xml
    python tools/benchmark_exports.py vig_s.onnx vig_s.xml

The files are of one model, as they say themselves. All are measured in turns, twice, PyTorch first, and the second turn
must agree with the first within a tenth. Appends a row each to benchmarks/exports.csv. Random weights take as long as
trained ones.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.table import Table

from visionmix.tools import display, timing
from visionmix.tools.export_runs import is_compiled, open_file

_CSV = Path("benchmarks/exports.csv")
_KINDS = {".onnx": "ONNX Runtime", ".xml": "OpenVINO", ".pt2": "torch.export"}
_AGREE = 0.10


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
    about = {(each.get("model"), tuple(each.get("input", {}).get("image_size", ()))) for _, each in opened}
    if len(about) != 1 or None in (found := about.pop()):
        raise ValueError(f"the files are not all of one model and size ({about or found}); export them anew")
    name, size = found
    model, images = timm.create_model(name).eval(), torch.randn(batch, 3, *size)
    calls = {"PyTorch": lambda: model(images)}
    for path, (run, said) in zip(files, opened, strict=True):
        kind = f"{_kind(path)}, {said['precision']}" + (f", dynamic {said['dynamic']}" * (said["dynamic"] != "none"))
        calls[kind] = lambda run=run: run(images)
    return name, size[0], calls


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, timing.Time]:
    """Return the time of each call, of the second of two turns.

    Raises:
        NoisyMachine: something keeps the machine busy, or the turns of a call disagree.
    """
    with torch.inference_mode():
        first, second = ({name: timing.measure(call) for name, call in calls.items()} for _ in range(2))
    for name, time in second.items():
        if abs(time.p50 - first[name].p50) > _AGREE * min(time.p50, first[name].p50):
            turns = f"{first[name].p50 * 1e3:.3g} and {time.p50 * 1e3:.3g} ms"
            raise timing.NoisyMachine(f"two turns of {name} disagree: {turns}")
    return second


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="visionmix benchmark-exports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="+", type=Path, help="files that visionmix export wrote, of one model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=_CSV, help="file the rows are appended to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = display.table_console()
    try:
        name, side, calls = prepare(args.file, args.batch)
        timing.wait_until_quiet()
        times = in_turns(calls)
    except (timing.NoisyMachine, ValueError, OSError) as error:
        console.print(f"nothing recorded: {error}", style="red")
        return 1
    rows = [
        {
            "model": name,
            "program": kind,
            "img_size": side,
            "batch": args.batch,
            "p20_ms": f"{time.p20 * 1e3:.4g}",
            "p50_ms": f"{time.p50 * 1e3:.4g}",
            "p80_ms": f"{time.p80 * 1e3:.4g}",
            **timing.conditions(),
        }
        for kind, time in times.items()
    ]
    timing.append_rows(args.csv, rows)
    table = Table("program", "p50_ms", "times PyTorch", title=f"{name}, {side} pixels, batch {args.batch}")
    for row in rows:
        ratio = float(row["p50_ms"]) / float(rows[0]["p50_ms"])
        table.add_row(row["program"], row["p50_ms"], f"{ratio:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
