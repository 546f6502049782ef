"""Time, measured on a quiet machine until two rounds agree, and peak memory, measured in a process of its own."""

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visionmix.tools.rows import append_rows as add_rows

_BUSY = 0.10  # of one core
_AGREE = 0.10
_SECONDS, _LONGEST = 1.0, 5.0  # of a round
_ROUNDS = 8


class NoisyMachine(RuntimeError):
    """Something else keeps the machine busy, so nothing is measured."""


@dataclass(frozen=True)
class Time:
    """Seconds a call: the 20th, 50th and 80th percentile of its samples."""

    p20: float
    p50: float
    p80: float


def wait_until_quiet(patience: float = 60.0) -> None:
    """Return once other processes take less than a tenth of a core, over half a second.

    Args:
        patience: Seconds to wait for it.

    Raises:
        NoisyMachine: the machine stayed busy for as long.
    """
    import psutil

    deadline = time.monotonic() + patience
    while (busy := psutil.cpu_percent(interval=0.5) / 100 * psutil.cpu_count()) > _BUSY:
        if time.monotonic() > deadline:
            raise NoisyMachine(
                f"other processes have taken a tenth of a core or more for {patience:.0f} s, {busy:.2f} cores at the "
                "end; stop them, or begin again when they have ended"
            )


def measure(call: Callable[[], object]) -> Time:
    """Return the time of `call`, measured in rounds until the medians of two in a row agree within a tenth.

    A round is one of `torch.utils.benchmark.Timer`: it warms up, synchronizes a GPU where there is one, puts calls of
    microseconds together, and lasts from 1 to 5 seconds, until the middle half of its samples lie within a tenth.

    Raises:
        NoisyMachine: no two rounds in a row agreed.
    """
    from torch.utils.benchmark import Timer  # logs a line where there is a CUDA toolkit and no GPU

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    medians: list[float] = []
    for _ in range(_ROUNDS):
        samples = timer.adaptive_autorange(_AGREE, min_run_time=_SECONDS, max_run_time=_LONGEST).times
        medians.append(statistics.median(samples))
        if len(medians) > 1 and abs(medians[-1] - medians[-2]) <= _AGREE * min(medians[-2:]):
            p20, p80 = np.quantile(samples, (0.2, 0.8)).tolist()
            return Time(p20, medians[-1], p80)
    raise NoisyMachine(f"{_ROUNDS} rounds disagree: medians {[f'{value * 1e3:.3g} ms' for value in medians]}")


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each of `rounds`, in which all are called one after another.

    A machine whose speed changes then changes it for all of them: compare the times of one round.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warms up
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    return samples


def spread(samples: Iterable[float]) -> Time:
    """Return the 20th, 50th and 80th percentile of `samples`, in seconds."""
    return Time(*np.quantile(list(samples), (0.2, 0.5, 0.8)).tolist())


def measure_on_gpu(call: Callable[[], object], seconds: float = 0.3) -> Time:
    """Return the GPU's time of `call`, its second-level cache emptied before each: a fraction of a second in all."""
    import triton

    samples = triton.testing.do_bench(call, warmup=100, rep=round(seconds * 1e3), return_mode="all")
    return Time(*(np.quantile(samples, (0.2, 0.5, 0.8)) / 1e3).tolist())


def passes(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> Callable[[], None]:
    """Return a call of `function` on `inputs`, without gradients or with the gradients of all inputs."""
    if not backward:

        def forward_pass() -> None:
            with torch.no_grad():
                function(*inputs)

        return forward_pass
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        weight = torch.randn_like(function(*inputs))

    def both_passes() -> None:
        torch.autograd.grad(function(*inputs), inputs, weight)

    return both_passes


def peak_memory(arguments: Iterable[str]) -> float:
    """Return by how many bytes the resident set of `python arguments` grew, which `print_growth` prints there."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_gpu_memory(call: Callable[[], object]) -> float:
    """Return by how many bytes the tensors on the GPU were larger at the peak of `call` than before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_growth(call: Callable[[], object]) -> None:
    """Run `call` and print by how many bytes the resident set of this process was larger at its peak than before."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        print("nan")  # elsewhere the peak cannot be reset, and importing PyTorch has the highest one
        return
    before = _resident("VmRSS")
    reset.write_text("5")
    call()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def page_faults() -> int:
    """Return how many pages this process has fetched from the system so far, 0 where that is not counted."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _copy_and_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], int, Callable[[], object], int]:
    """Return a large copy, the bytes that it reads and writes, a large matrix product in `dtype`, and its FLOPs.

    A GPU is slow on small ones, and faster on zeros and ones than on anything else.
    """
    x = torch.randn(1 << (29 if device == "cuda" else 26), device=device)
    y = torch.empty_like(x)
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    return lambda: y.copy_(x), 2 * x.nbytes, lambda: a @ a, 2 * side**3


@cache
def machine_limits(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Return (bytes a second of a large copy, reads and writes; FLOPs a second of a large product in `dtype`)."""
    copy, moved, product, flops = _copy_and_product(device, dtype)
    return moved / measure(copy).p20, flops / measure(product).p20


def quick_limits(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> tuple[float, float]:
    """Return what `machine_limits` returns for the CPU, from the fastest of the calls made in `seconds` each.

    A busy machine is not refused, and shows lower limits than it has.
    """
    copy, moved, product, flops = _copy_and_product("cpu", dtype)
    return moved / fastest(copy, seconds), flops / fastest(product, seconds)


def copy_rates(sizes: Iterable[int], seconds: float = 0.2) -> dict[int, float]:
    """Return the bytes a second of a CPU's copies that read and write so many bytes, by these."""
    rates = {}
    for size in sizes:
        x = torch.randn(size // 8)
        y = torch.empty_like(x)
        rates[size] = size / fastest(lambda x=x, y=y: y.copy_(x), seconds)
    return rates


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Return the seconds of the fastest call, after a first one that is not counted."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def conditions(device: str = "cpu") -> dict[str, str]:
    """Return the conditions of a measurement: date, device, threads and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append `rows` to the CSV file `path`, with a header where it is new; it is at every moment whole.

    Raises:
        ValueError: the file has other columns.
        OSError: the disk is full or refuses.
    """
    rows = list(rows)
    if rows:
        add_rows(path, rows, list(rows[0]))
