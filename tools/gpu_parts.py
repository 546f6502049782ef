"""What `tools/gpu.py` measures, a part each: a worker process runs one item of a part and gives its rows.

An item is a dict that travels as JSON. On a CPU the same code runs once, in Triton's interpreter, and is not timed.
"""

import importlib
import math
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionmix.kernels import gpu
from visionmix.tools import gpu_peers, kernel_checks, timing, workers
from visionmix.tools.kernel_problems import BENCHMARKS, PROBLEMS, TINY, Call, Tensors

Row = dict[str, Any]

CHECKED = {op: [*problems, *BENCHMARKS[op]] for op, problems in PROBLEMS.items()}

MODELS = ("vmamba_tiny", "vig_s", "nat_mini", "agent_swin_tiny", "mavit_tiny")
TIMM_MODELS = ("swin_tiny_patch4_window7_224", "deit_small_patch16_224")
# Constants of an op's module that choose its tiles, and what a sweep tries in their place.
TILES: dict[str, list[tuple[str, str, list]]] = {
    "selective_scan": [
        ("triton", "_FORWARD_TILE", [(1, 4), (4, 4), (1, 8), (2, 8)]),
        ("triton", "_BACKWARD_TILE", [(1, 4), (2, 4), (2, 8)]),
    ],
    "selective_scan_2d": [
        ("triton", "_WIDE", [32, 128]),
        ("triton", "_ENOUGH_PROGRAMS", [1024, 16384]),
    ],
    "gated_linear_attention": [],
    "neighborhood_attention": [
        ("triton_boxes", "_ROWS", [32, 64]),
        ("triton_boxes", "_IMAGES", [4, 16]),
    ],
}
_WARPS, _STAGES = (1, 2, 4, 8), (1, 2, 3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROFILED, _KERNELS = 5, 5
_NAME = 80  # characters of a kernel's name


def _problem(table: dict, item: Row) -> Call:
    return next(problem.run for problem in table[item["op"]] if problem.name == item["problem"])


def _time(call: Callable[[], object], device: str, seconds: float = 0.3) -> Row:
    """Return the columns of a time in milliseconds; on a CPU run the call once and leave them empty."""
    if device == "cpu":
        call()
        return {}
    time = timing.measure_on_gpu(call, seconds)
    return {"value": time.p50 * 1e3, "p20": time.p20 * 1e3, "p80": time.p80 * 1e3}


def _driver() -> str:
    if torch.version.hip:
        file = Path("/sys/module/amdgpu/version")
        return f"HIP {torch.version.hip}" + (f", amdgpu {file.read_text().strip()}" if file.exists() else "")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _commit() -> str:
    """Return the library's commit, with a + where files differ from it; its version outside a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {version('visionmix')}"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def conditions(device: str) -> Row:
    """Return the conditions of every row."""
    try:
        triton = version("triton")
    except ImportError:
        triton = "none"
    driver = _driver() if device == "cuda" else "none"
    return timing.conditions(device) | {"driver": driver, "triton": triton, "commit": _commit()}


def machine(item: Row) -> Iterator[Row]:
    """The card, its memory, and its speeds of copying and of matrix products."""
    if item["device"] == "cpu":
        return
    card = torch.cuda.get_device_properties(0)
    yield {"subject": "memory", "value": card.total_memory / 2**30, "unit": "GiB"}
    yield {"subject": "processors", "value": card.multi_processor_count, "unit": "SMs or CUs"}
    copied, multiplied = timing.machine_limits("cuda", torch.bfloat16)
    yield {"subject": "copying", "value": copied / 1e12, "unit": "TB/s", "note": "bytes read and written"}
    yield {"subject": "matrix products", "dtype": "bfloat16", "value": multiplied / 1e12, "unit": "TFLOP/s"}


def correctness(item: Row) -> Iterator[Row]:
    """One problem in one type: every output and gradient beside float64, and two runs beside each other."""
    call = _problem(TINY if item["device"] == "cpu" else CHECKED, item)
    for found in kernel_checks.check(call, DTYPES[item["dtype"]], item["device"]):
        yield {
            "what": found.result,
            "value": found.error,
            "unit": "of the largest value",
            "limit": found.tolerance,
            "passed": found.passed,
            "note": "" if found.repeats else "a second run gave other bits",
        }


def _ours(call: Call, arguments: tuple, backward: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return our op as a function of its tensors, which gives its first output, and the tensors."""
    places = [place for place in call.schema.tensors if arguments[place] is not None]
    values = list(arguments._replace(implementation="triton"))
    if "keep_states" in arguments._fields:
        values[arguments._fields.index("keep_states")] = backward
    op = getattr(torch.ops.visionmix, call.schema.name)

    def run(*tensors: Tensor) -> Tensor:
        given = list(values)
        for place, x in zip(places, tensors, strict=True):
            given[place] = x
        out = op(*given)
        return out[0] if isinstance(out, tuple) else out

    return run, [arguments[place] for place in places]


def _floor(run: Callable[[], object], tensors: list[Tensor], out: Tensor, backward: bool, item: Row) -> Row:
    """Return the least time in milliseconds, by the bytes that must move and by the FLOPs, whichever is longer.

    The backward pass reads the inputs and the output's gradient again and writes the inputs' gradients.
    """
    if not item.get("copied"):
        return {}
    with FlopCounterMode(display=False) as flops:
        run()
    moved = sum(x.nbytes for x in [*tensors, out]) * (3 if backward else 1)
    least = max(moved / item["copied"], flops.get_total_flops() / item["multiplied"]) * 1e3
    return {"limit": least, "note": f"{moved / 1e6:.0f} MB, {flops.get_total_flops() / 1e9:.1f} GFLOP"}


def _peers(item: Row, arguments: tuple) -> Iterator[tuple[gpu_peers.Peer, gpu_peers.Ready | str]]:
    for name, folder in item.get("folders", {}).items():
        gpu_peers.use_folder(name, Path(folder), Path(item["build"]))
    for peer in gpu_peers.PEERS[item["op"]]:
        try:
            yield peer, peer.prepare(arguments)
        except Exception as error:  # whatever another package raises
            yield peer, workers.in_a_line(error)


def ops(item: Row) -> Iterator[Row]:
    """One benchmark problem: forward, then forward and backward, ours first; then the time of each of our kernels."""
    device, dtype = item["device"], DTYPES[item["dtype"]]
    call = _problem(TINY if device == "cpu" else BENCHMARKS, item)
    arguments = call.arguments(Tensors(dtype, device))
    ready = [] if device == "cpu" else list(_peers(item, arguments))
    for backward, what in enumerate(("forward", "forward + backward")):
        row = {"what": what, "unit": "ms"}
        run, tensors = _ours(call, arguments, bool(backward))
        with torch.no_grad():
            out = run(*tensors)
        timed = timing.passes(run, tensors, bool(backward))
        floor = _floor(timed, tensors, out, bool(backward), item)
        yield row | {"by": "visionmix"} | _time(timed, device) | floor
        for peer, found in ready:
            yield from _beside(peer, found, call, arguments, row, bool(backward), out)
    yield from _kernel_times(call, arguments, device)


def _beside(
    peer: gpu_peers.Peer,
    found: gpu_peers.Ready | str,
    call: Call,
    arguments: tuple,
    row: Row,
    backward: bool,
    out: Tensor,
) -> Iterator[Row]:
    """Yield a peer's row, and ours without what the peer lacks."""
    row = row | {"by": peer.name}
    if isinstance(found, str):
        if not backward:
            yield row | {"passed": False, "note": found}
        return
    try:
        if peer.lacks:
            run, tensors = _ours(call, arguments._replace(**dict.fromkeys(peer.lacks)), backward)
            with torch.no_grad():
                out = run(*tensors)
            without = f"without {', '.join(peer.lacks)}"
            yield row | {"by": f"visionmix {without}"} | _time(timing.passes(run, tensors, backward), "cuda")
            row["note"] = without
        with torch.no_grad():
            error = kernel_checks.relative_error(found.view(found.function(*found.tensors)), out)
        if not error <= 2 * kernel_checks.TOLERANCE[torch.bfloat16]:
            yield row | {"passed": False, "note": f"differs from ours by {error:.1e} of the largest value; not timed"}
            return
        yield row | _time(timing.passes(found.function, found.tensors, backward), "cuda")
    except Exception as error:  # whatever another package raises
        yield row | {"passed": False, "note": workers.in_a_line(error)}


def _launches(call: Call, arguments: tuple) -> list[tuple[gpu.Launch, int]]:
    """Return the launches of a forward and backward pass, which have run, alike ones once with how many they are."""
    run, tensors = _ours(call, arguments, True)
    timed = timing.passes(run, tensors, True)
    with gpu.record() as launches:
        timed()
    keys = [(launch.kernel.fn.__name__, launch.grid, *launch.options.values()) for launch in launches]
    return [(launch, keys.count(key)) for key, launch in dict(zip(keys, launches, strict=True)).items()]


def _run(launch: gpu.Launch, options: dict[str, int]) -> Callable[[], object]:
    return lambda: launch.kernel[launch.grid](**launch.arguments, **options)


def _setting(options: dict[str, int]) -> str:
    return f"{options['num_warps']} warps, {options['num_stages']} stages"


def _kernel_times(call: Call, arguments: tuple, device: str) -> Iterator[Row]:
    for launch, times in _launches(call, arguments):
        moved = f"{launch.bytes_moved() / 1e6:.0f} MB through the caches"
        note = f"{times} a step, {_setting(launch.options)}, {math.prod(launch.grid)} programs, {moved}"
        row = {"what": launch.kernel.fn.__name__, "by": "kernel", "unit": "ms", "note": note}
        yield row | _time(_run(launch, launch.options), device, 0.1)


def _change(module: ModuleType, constant: str, value: Any) -> None:
    """Set a module's constant, and forget what its functions have chosen by the former one."""
    setattr(module, constant, value)
    for function in vars(module).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def sweep(item: Row) -> Iterator[Row]:
    """One benchmark problem's kernels with other warps and stages, or, with the item's `tile`, with another tile."""
    call, tile = _problem(BENCHMARKS, item), item.get("tile")
    arguments = call.arguments(Tensors(DTYPES[item["dtype"]], item["device"]))
    if tile:
        module, constant, value = tile
        value = tuple(value) if isinstance(value, list) else value
        module = importlib.import_module(f"visionmix.kernels.{item['op']}.{module}")
        former = getattr(module, constant)
        _change(module, constant, value)
        try:
            for row in _kernel_times(call, arguments, item["device"]):
                yield row | {"by": f"{constant.strip('_')} {value}"}
        finally:
            _change(module, constant, former)
        return
    for (launch, _), warps, stages in product(_launches(call, arguments), _WARPS, _STAGES):
        options = launch.options | {"num_warps": warps, "num_stages": stages}
        row = {"what": launch.kernel.fn.__name__, "by": _setting(options), "unit": "ms"}
        if options == launch.options:
            row["note"] = "the default"
        try:
            yield row | _time(_run(launch, options), item["device"], 0.05)
        except Exception as error:  # out of shared memory or registers, or the compiler's own
            yield row | {"passed": False, "note": workers.in_a_line(error)}


def models(item: Row) -> Iterator[Row]:
    """One model: images a second, the same of a GMAC, and its memory; or, with `profile`, its dearest kernels."""
    from visionmix.tools import benchmark, info  # brings timm

    name, img_size, batch, train, device = (item[key] for key in ("model", "img_size", "batch", "train", "device"))
    row = {
        "what": f"{'training' if train else 'inference'}, {img_size} pixels, batch {batch}",
        "by": "torch.compile" if item["compiled"] else "eager",
    }
    amp = "bfloat16" if device == "cuda" else ""
    call = benchmark.call_of(name, img_size, batch, train, device, amp, item["compiled"])
    if item["profile"]:
        yield from _profile(call, row, device)
        return
    time = _time(call, device, 1.0)
    if not time:
        yield row | {"unit": "images/s"}
        return
    rates = {key: batch / value * 1e3 for key, value in time.items()}
    rates["p20"], rates["p80"] = rates["p80"], rates["p20"]
    yield row | {"unit": "images/s"} | rates
    yield row | {"unit": "MB", "value": timing.peak_gpu_memory(call) / 1e6, "note": "at the peak, above the weights"}
    cost = info.measure(benchmark.build(name, img_size), (3, img_size, img_size))
    gmacs = sum(cost.macs.values()) / 1e9
    note = f"{gmacs:.2f} GMACs an image"
    yield row | {"unit": "GMAC/s", "value": rates["value"] * gmacs, "note": note}


def _profile(call: Callable[[], object], row: Row, device: str) -> Iterator[Row]:
    """Yield the kernels that take the most of the GPU's time; on a CPU the ops."""
    for _ in range(3):
        call()
    kind = torch.profiler.ProfilerActivity.CPU if device == "cpu" else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(_PROFILED):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    column = f"self_{'cpu' if device == 'cpu' else 'device'}_time_total"
    events = profiler.key_averages()
    if device == "cuda":
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, column) for event in events)
    for event in sorted(events, key=lambda event: getattr(event, column), reverse=True)[:_KERNELS]:
        found = row | {"by": event.key[:_NAME], "unit": "% of the time"}
        if device == "cuda":
            spent = getattr(event, column)
            note = f"{spent / _PROFILED / 1e3:.3f} ms in {event.count / _PROFILED:g} calls"
            found |= {"value": 100 * spent / total, "note": note}
        yield found


def build(item: Row) -> Iterator[Row]:
    """Compile a peer's CUDA sources."""
    gpu_peers.build_extension(item["peer"], Path(item["folder"]), Path(item["build"]))
    yield {"subject": item["peer"], "what": "built", "passed": True}


PARTS: dict[str, Callable[[Row], Iterator[Row]]] = {
    part.__name__: part for part in (machine, correctness, ops, sweep, models, build)
}


def run(part: str, item: Row) -> Iterator[Row]:
    """Yield the rows of a part's item; the part "conditions" has one."""
    if part == "conditions":
        yield conditions(item["device"])
        return
    torch.set_num_threads(item.get("threads", torch.get_num_threads()))
    try:
        yield from PARTS[part](item)
    finally:
        if item["device"] == "cuda":
            torch.cuda.empty_cache()


def spoilt(device: str) -> bool:
    """Return whether the GPU answers this process no more, as after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    workers.serve(run, partial(spoilt, "cuda") if torch.cuda.is_available() else lambda: False)
