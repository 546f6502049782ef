"""Time and memory of whole models side by side.

    python tools/benchmark.py vig_s deit_small_patch16_224 --img-size 224
    python tools/benchmark.py deit_small_patch16_224 --reduce tome:r=13 --reduce evit:keep_rate=0.5 --batch 8
    python tools/benchmark.py vmamba_tiny swin_tiny_patch4_window7_224 --device cuda --batch 128 --amp bfloat16
    python tools/benchmark.py deit_small_patch16_224 --reduce mctf_fast --batch 8 --turns 20
    python tools/benchmark.py vig_s --profile
    python tools/benchmark.py --data

Appends a row per model to benchmarks/models.csv. Any name that timm knows will do; all are measured in one run, in
float32 unless `--amp` is given and in eval mode unless `--train` is, which times a forward and backward pass.
`--reduce` adds each model with that token reduction, as NAME+METHOD:OPTIONS. `--profile` records nothing but shows
where time goes, by op and shape, and how often memory was fetched from the system: a page fault costs some
microseconds, and a model that allocates and frees more than the C library keeps meets a thousand per image. `--data`
compares the loaders of training images instead.
"""

import argparse
import operator
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity

from visionmix import reduction
from visionmix.reduction.methods import method_class
from visionmix.reduction.specs import read_spec
from visionmix.tools import benchmark_data, display, info, timing
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.models import choose_device

_CSV = Path("benchmarks/models.csv")
_WARM = 5
_PROFILED = 10
_OPS = 30


def build(name: str, img_size: int) -> torch.nn.Module:
    """Return the model NAME or NAME+REDUCTION at `img_size`: built for it where its sizes are baked in."""
    torch.manual_seed(0)
    name, _, spec = name.partition("+")
    try:
        model = timm.create_model(name, img_size=img_size)
    except TypeError:  # timm's convolutional models take no img_size
        model = timm.create_model(name)
    return reduction.apply(model, spec) if spec else model


def call_of(
    name: str, img_size: int, batch: int, train: bool, device: str, amp: str, compiled: bool = False
) -> Callable[[], None]:
    """Return a function that runs the model on random images once: forward, with `train` backward too."""
    model = build(name, img_size).to(device).train(train)
    model = torch.compile(model) if compiled else model
    images = torch.randn(batch, 3, img_size, img_size, device=device)
    autocast = torch.autocast(device, getattr(torch, amp or "bfloat16"), enabled=bool(amp))

    def infer() -> None:
        with torch.inference_mode(), autocast:
            model(images)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = model(images).float().mean()
        loss.backward()

    return step if train else infer


def profile(name: str, *, img_size: int, batch: int, train: bool, device: str, amp: str) -> None:
    """Print the ops that a call of one model spends its time in, and the page faults it meets."""
    call = call_of(name, img_size, batch, train, device, amp)
    for _ in range(_WARM):
        call()
    before = timing.page_faults()
    call()
    faults = timing.page_faults() - before
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(_PROFILED):
            call()
    sort_by = f"self_{device}_time_total"
    print(f"{name}, {img_size} pixels, batch {batch}: {faults} page faults a call; times are of {_PROFILED} calls")
    print(profiler.key_averages(group_by_input_shape=True).table(sort_by=sort_by, row_limit=_OPS))


def run(name: str, *, img_size: int, batch: int, train: bool, device: str, amp: str, memory: bool) -> dict[str, object]:
    """Return the row of one model."""
    timing.wait_until_quiet()
    call = call_of(name, img_size, batch, train, device, amp)
    time = timing.measure(call)
    peak = float("nan")
    if memory:
        arguments = [__file__, name, "--img-size", str(img_size), "--batch", str(batch), "--child"]
        arguments += [*(["--train"] if train else []), *(["--amp", amp] if amp else [])]
        peak = timing.peak_memory(arguments) if device == "cpu" else timing.peak_gpu_memory(call)
    return _row(name, time, peak, img_size, batch, train, device, amp)


def run_in_turns(
    names: list[str], rounds: int, *, img_size: int, batch: int, train: bool, device: str, amp: str
) -> list[dict[str, object]]:
    """Return the rows of models that are timed in `rounds` of turns, with the column `times_first` more.

    It is the median over the rounds of the first model's time over the model's own, which other work on the machine
    changes little, so that a busy machine is not refused.
    """
    calls = {name: call_of(name, img_size, batch, train, device, amp) for name in names}
    samples = timing.in_turns(calls, rounds)
    rows = []
    for name, own in samples.items():
        row = _row(name, timing.spread(own), float("nan"), img_size, batch, train, device, amp)
        rows.append(row | {"times_first": statistics.median(map(operator.truediv, samples[names[0]], own))})
    return rows


def _row(
    name: str, time: timing.Time, peak: float, img_size: int, batch: int, train: bool, device: str, amp: str
) -> dict[str, object]:
    cost = info.measure(build(name, img_size), (3, img_size, img_size))
    gmacs = sum(cost.macs.values()) / 1e9
    return {
        "model": name,
        "pass": ("forward + backward" if train else "forward") + (f", {amp} autocast" if amp else ""),
        "img_size": img_size,
        "batch": batch,
        "p20_ms": f"{time.p20 * 1e3:.4g}",
        "p50_ms": f"{time.p50 * 1e3:.4g}",
        "p80_ms": f"{time.p80 * 1e3:.4g}",
        "images_s": f"{batch / time.p50:.4g}",
        "gmacs": f"{gmacs:.3g}",
        "ms_a_gmac": f"{time.p50 * 1e3 / (gmacs * batch):.3g}",
        "gflop_s": f"{2 * gmacs * batch * (3 if train else 1) / time.p50:.4g}",
        "peak_mb": f"{peak / 1e6:.4g}",
        "params_m": f"{cost.params / 1e6:.4g}",
        **timing.conditions(device),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(prog="visionmix benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="names that timm knows; the others are compared with the first")
    parser.add_argument("--reduce", action="append", default=[], metavar="METHOD:OPTIONS", help="may be repeated")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="time a forward and backward pass")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), default="", help="compute under autocast")
    parser.add_argument("--profile", action="store_true", help="print the ops that take the time; record nothing")
    parser.add_argument("--data", action="store_true", help="images a second a core of the loader, beside timm's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--turns",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="time the models in turn, one call each a round, for ratios where a machine changes its speed",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--csv", type=Path, default=_CSV, help="file the rows are appended to")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.data == bool(args.model):
        parser.error("give names of models, or --data for the loaders")
    if args.data:
        benchmark_data.show(benchmark_data.run())
        return 0
    unknown = [name for name in args.model if not timm.is_model(name.partition("+")[0])]
    if unknown:
        parser.error(f"timm knows no model called {unknown[0]!r}; timm.list_models() has those it knows")
    try:
        check_least(1, **{"--img-size": args.img_size, "--batch": args.batch, "--threads": args.threads})
        check_least(0, **{"--turns": args.turns})
        check_out(args.csv, name="--csv")
        choose_device(args.device)
        for spec in args.reduce:
            method_class(*read_spec(spec))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    names = [f"{name}{reduction}" for name in args.model for reduction in ("", *(f"+{spec}" for spec in args.reduce))]
    torch.set_num_threads(args.threads)
    if args.child:
        timing.print_growth(call_of(args.model[0], args.img_size, args.batch, args.train, "cpu", args.amp))
        return 0
    options = {"img_size": args.img_size, "batch": args.batch, "train": args.train, "amp": args.amp}
    if args.profile:
        for name in args.model:
            profile(name, **options, device=args.device)
        return 0
    console = display.table_console()
    try:
        if args.turns:
            rows = run_in_turns(names, args.turns, **options, device=args.device)
        else:
            rows = [run(name, **options, device=args.device, memory=not args.no_memory) for name in names]
    except timing.NoisyMachine as error:
        console.print(f"nothing recorded: {error}", style="red")
        return 1
    ratios = [row.pop("times_first", float(rows[0]["p50_ms"]) / float(row["p50_ms"])) for row in rows]
    timing.append_rows(args.csv, rows)
    columns = ["model", "p50_ms", "images_s", "gmacs", "ms_a_gmac", "gflop_s", "peak_mb"]
    table = Table(title=f"{args.img_size} pixels, batch {args.batch}, {rows[0]['pass']}, {args.threads} threads")
    for column in [*columns, "times the first"]:
        table.add_column(column)
    for row, ratio in zip(rows, ratios, strict=True):
        table.add_row(*(str(row[column]) for column in columns), f"{1 / ratio:.3g}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
