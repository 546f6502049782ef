"""Everything about this library that a person with a GPU wants to know, in minutes: `python tools/gpu.py --out FOLDER`.

    python tools/gpu.py --minutes 9 --out gpu
    python tools/gpu.py --minutes 20 --out gpu --sweep --peer mamba_ssm=../mamba --peer vmamba=../VMamba
    python tools/gpu.py --out gpu --device cpu

What matters most comes first, each part within its share of the time: the card, and its speeds of copying and of
matrix products; every op's outputs and gradients beside float64, twice, in memory filled with NaN; ops beside other
packages' kernels on the same tensors; models beside timm's, and the kernels that they spend their time in; with
`--sweep` warps, stages and tiles. FOLDER/gpu.csv has a row a measurement and FOLDER/gpu.md shows them; both are written
after each, so that a run that is cut off loses nothing. Parts run in processes of their own: what fails, hangs or
crashes is a row. FOLDER/log.txt has what they print.

Without a GPU, or with `--device cpu`, tiny problems run in Triton's interpreter, and nothing is timed. Exits with
status 1 if a check of correctness fails or was not made in time.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from visionmix.tools import display, gpu_parts, gpu_peers
from visionmix.tools.gpu_page import Report
from visionmix.tools.kernel_problems import BENCHMARKS, PROBLEMS, TINY
from visionmix.tools.workers import Task, Worker, run_all

# Shares of the time that is left; what a part does not need goes to the later ones.
_SHARES = {"machine": 0.5, "correctness": 3.0, "ops": 3.0, "models": 5.0, "sweep": 4.0}
_WORKERS, _GIB_A_WORKER = 16, 8  # that check correctness side by side
_FULL_BATCHES = {False: 128, True: 64}  # of inference and training
_LARGE = ("vig_t", "deit_tiny_patch16_224")  # at 1024 pixels
_TINY_MODEL = "test_mavit"


class Run:
    """One run: its report, its worker processes, and the time that is left.

    Args:
        folder: Holds what it writes.
        device: "cuda" or "cpu".
        minutes: Of the whole run.
        ops: Names of those to look at.
        folders: Source folders of peers by name.
        command: How it was called.
    """

    def __init__(
        self, folder: Path, device: str, minutes: float, ops: list[str], folders: dict[str, Path], command: str
    ):
        self.begun = time.monotonic()
        self.end = self.begun + 60 * minutes
        self.device, self.op_names = device, ops
        self.folders = {name: str(path.resolve()) for name, path in folders.items()}
        self.build = str((folder / "build").resolve())
        console = display.table_console()
        self.report = Report(folder, command, lambda line: console.print(line, soft_wrap=True))
        environment = {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
        self.workers = [Worker("visionmix.tools.gpu_parts", folder / "log.txt", environment) for _ in range(_WORKERS)]
        self.builder = Worker("visionmix.tools.gpu_parts", folder / "log.txt", environment)
        self.building: threading.Thread | None = None
        self.limits: dict[str, float] = {}  # bytes and FLOPs a second
        self.memory = 0.0  # GiB

    def task(self, part: str, seconds: float, **item) -> Task:
        return Task(part, item | {"device": self.device}, seconds)

    def keep(self, task: Task, row: dict | None, error: str = "") -> None:
        """Add a task's row to the report, or what ended it."""
        item = task.item
        if task.part == "conditions" and row:
            self.report.conditions = row
            return
        if row is None and not error:
            return
        subject = f"{item['op']} {item['problem']}" if "op" in item else item.get("model") or item.get("peer")
        base = {"part": task.part, "subject": subject, "second": round(time.monotonic() - self.begun, 1)}
        base |= {"dtype": item["dtype"]} if "dtype" in item else {}
        if row is None:
            said = ("img_size", "batch", "train", "compiled", "profile", "tile")
            what = ", ".join(f"{key} {item[key]}" for key in said if item.get(key))
            row = {"what": what, "by": "", "unit": "", "passed": False, "note": error}
        self.report.add(base | row)
        if task.part == "machine" and "value" in row:
            known = {"copying": ("copied", 1e12), "matrix products": ("multiplied", 1e12)}
            if row["subject"] in known:
                key, unit = known[row["subject"]]
                self.limits[key] = row["value"] * unit
            elif row["subject"] == "memory":
                self.memory = row["value"]

    def perform(self, tasks: Iterable[Task], deadline: float, count: int = 1) -> None:
        """Run tasks with so many workers; those whose memory ran out once more, one after another."""
        again: list[Task] = []

        def keep(task: Task, row: dict | None, error: str = "") -> None:
            if count > 1 and "OutOfMemory" in error:
                again.append(task)
            else:
                self.keep(task, row, error)

        left = run_all(tasks, self.workers[:count], deadline, keep)
        for worker in self.workers[1:]:
            worker.stop()
        if again:
            left += run_all(again, self.workers[:1], deadline, self.keep)
        if left:
            names = ", ".join(dict.fromkeys(str(t.item.get("problem") or t.item.get("model")) for t in left))
            note = f"{len(left)} were not begun in time: {names}; give more --minutes"
            row = {"what": "left out", "by": "", "unit": "", "passed": False, "note": note}
            self.report.add({"part": left[0].part, "second": round(time.monotonic() - self.begun, 1)} | row)

    def run(self, parts: list[str]) -> None:
        """Run the parts in order."""
        build = bool(self.folders) and self.device == "cuda" and "ops" in parts
        # `timeout` and schedulers end a process so; workers must not outlive it.
        former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            self.perform([self.task("conditions", 120)], self.end)
            for number, part in enumerate(parts):
                if build and part != "machine":
                    self.begin_builds()
                    build = False
                shares = [_SHARES[name] for name in parts[number:]]
                now = time.monotonic()
                getattr(self, part)(now + (self.end - now) * shares[0] / sum(shares))
        finally:
            signal.signal(signal.SIGTERM, former)
            for worker in [*self.workers, self.builder]:
                worker.stop()

    def machine(self, deadline: float) -> None:
        self.perform([self.task("machine", 60)], deadline)

    def correctness(self, deadline: float) -> None:
        table = TINY if self.device == "cpu" else gpu_parts.CHECKED
        # Large problems last; of the rest the type of models first.
        ranked = sorted(
            (problem in BENCHMARKS[op], turn, place, op, problem.name, dtype)
            for op in self.op_names
            for place, problem in enumerate(table[op])
            for turn, dtype in enumerate(("bfloat16", "float32", "float16"))
        )
        tasks = [
            self.task("correctness", 200, op=op, problem=problem, dtype=dtype, threads=1)
            for *_, op, problem, dtype in ranked
        ]
        count = min(_WORKERS, os.cpu_count() or 1, max(1, int(self.memory / _GIB_A_WORKER)))
        self.perform(tasks, deadline, 1 if self.device == "cpu" else count)

    def begin_builds(self) -> None:
        """Compile peers' sources beside the parts that are not timed."""
        tasks = [
            self.task("build", self.end - time.monotonic(), peer=name, folder=folder, build=self.build)
            for name, folder in self.folders.items()
        ]
        self.building = threading.Thread(target=run_all, args=(tasks, [self.builder], self.end, self.keep), daemon=True)
        self.building.start()

    def ops_tasks(self, ops: Iterable[str]) -> list[Task]:
        table = TINY if self.device == "cpu" else BENCHMARKS
        return [
            self.task(
                "ops", 200, op=op, problem=problem.name, dtype="float32" if self.device == "cpu" else "bfloat16",
                folders=self.folders, build=self.build, **self.limits,
            )
            for op in ops
            for problem in table[op]
        ]  # fmt: skip

    def ops(self, deadline: float) -> None:
        waiting = {op for op in self.op_names if any(peer.name in self.folders for peer in gpu_peers.PEERS[op])}
        self.perform(self.ops_tasks(op for op in self.op_names if op not in waiting), deadline)
        if waiting:
            # Half of what is left is for the measurements.
            if self.building:
                self.building.join(max(0.0, (deadline - time.monotonic()) / 2))
                self.builder.stop()
            self.perform(self.ops_tasks(op for op in self.op_names if op in waiting), deadline)

    def model_task(self, seconds: float, model: str, img_size: int, batch: int, **options) -> Task:
        settings = {"train": False, "compiled": False, "profile": False} | options
        return self.task("models", seconds, model=model, img_size=img_size, batch=batch, **settings)

    def models(self, deadline: float) -> None:
        if self.device == "cpu":
            self.perform([self.model_task(60, _TINY_MODEL, 64, 2, profile=each) for each in (False, True)], deadline)
            return
        # Beside each other: what is compared is never far apart if the time runs out.
        names = [*gpu_parts.TIMM_MODELS, *gpu_parts.MODELS]
        tasks = []
        for compiled in (False, True):
            for train, batch in _FULL_BATCHES.items():
                seconds = 200 if compiled else 60
                tasks += [self.model_task(seconds, n, 224, batch, train=train, compiled=compiled) for n in names]
            if not compiled:
                tasks += [self.model_task(60, name, 1024, batch) for batch in (1, 16) for name in _LARGE]
                tasks += [
                    self.model_task(60, name, 224, batch, train=train, profile=True)
                    for train, batch in _FULL_BATCHES.items()
                    for name in gpu_parts.MODELS
                ]
        self.perform(tasks, deadline)

    def sweep(self, deadline: float) -> None:
        tasks = []
        for op in self.op_names:
            settings = [None, *([*tile[:2], value] for tile in gpu_parts.TILES[op] for value in tile[2])]
            tasks += [
                self.task("sweep", 150, op=op, problem=BENCHMARKS[op][0].name, dtype="bfloat16", tile=tile)
                for tile in settings
            ]
        self.perform(tasks, deadline)


def _folder(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} names no folder; write it as mamba_ssm=FOLDER")
    try:
        gpu_peers.check_folder(name, Path(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, Path(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(prog="visionmix gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.csv, gpu.md and log.txt")
    parser.add_argument("--minutes", type=float, default=9, help="of the whole run; 9")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="ROCm's is cuda too; a GPU where there is one")
    parser.add_argument("--op", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="ops to look at; all")
    parser.add_argument("--part", nargs="+", choices=_SHARES, help="parts to run; all but sweep")
    parser.add_argument("--sweep", action="store_true", help="time other warps, stages and tiles too")
    sources = "; ".join(f"{name}: {text}" for name, text in gpu_peers.SOURCES.items())
    parser.add_argument(
        "--peer", type=_folder, action="append", default=[], metavar="NAME=FOLDER", help=f"may be repeated; {sources}"
    )
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} is no time; give some minutes, such as 9")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU; leave it out to run tiny problems in Triton's interpreter")
    asked = set(args.part or set(_SHARES) - {"sweep"}) | ({"sweep"} if args.sweep else set())
    if device == "cpu" and "sweep" in asked:
        parser.error("--sweep: nothing is timed without a GPU; leave it out")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python tools/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        run = Run(args.out, device, args.minutes, args.op, dict(args.peer), command)
    except ValueError as error:
        parser.error(str(error))
    run.run([part for part in _SHARES if part in asked])
    print(f"{run.report.page} and {run.report.csv} are written")
    return 1 if run.report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
