"""Launching Triton kernels, and planning the same launches without a GPU.

A Triton implementation allocates its buffers and calls `launch`. While `plan` is active (on meta tensors, which hold
no memory), launches are recorded with their arguments instead of run: `tools/compile_kernels.py` compiles exactly those
ahead of time for any target, and `tools/kernel_traffic.py` counts the bytes they move. Importing this module imports no
Triton.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from visionmix.kernels.dispatch import Implementation, Unavailable

_logger = logging.getLogger("visionmix.kernels")

TUNE_VARIABLE = "VISIONMIX_TUNE"

# Registers that a thread can have on NVIDIA.
_MOST_REGISTERS = 255

# Candidates of (num_warps, num_stages) where tuning is asked for; tiles are not tuned, since scratch depends on them.
_CANDIDATES = tuple((warps, stages) for warps in (1, 2, 4, 8) for stages in (1, 2, 3))


@dataclass(frozen=True)
class Target:
    """The target of compilation: `backend` "cuda", "hip" or "interpreter"; `arch` as Triton names it."""

    backend: str
    arch: int | str


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, `kernel[grid](**arguments)`, and its cost.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        arguments: by parameter name; None for a tensor not given.
        options: what the compiler takes: num_warps, the warps of a program, num_stages, the software pipeline stages of
            its loops, and on NVIDIA maxnreg, the registers of a thread at most.
        passes: how often the kernel reads or writes a tensor argument from one end to the other; 1 where not named.
        flops: floating-point operations of the useful part of the tiles.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    passes: dict[str, float]
    flops: int

    def bytes_moved(self) -> int:
        """Return the bytes that all programs together read and write, re-reads by other programs included."""
        tensors = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        return round(sum(x.numel() * x.element_size() * self.passes.get(name, 1) for name, x in tensors.items()))


_plan: list[Launch] | None = None
_target: Target | None = None


@contextmanager
def plan(target: Target) -> Iterator[list[Launch]]:
    """Record launches, configured for `target`, instead of running them; yields the list of `Launch`."""
    global _plan, _target
    _plan, _target = [], target
    try:
        yield _plan
    finally:
        _plan = _target = None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Record launches and run them too; yields the list of `Launch`, which keeps their tensors."""
    global _plan
    _plan = []
    try:
        yield _plan
    finally:
        _plan = None


def interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1, set before they are imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _device_target() -> Target:
    if interpreting():
        return Target("interpreter", "")
    import triton

    found = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch)


def target() -> Target:
    """Return the target to configure kernels for: the plan's, the interpreter, or the current device."""
    return _target or _device_target()


def dot_precision(*tensors: Tensor | None) -> str:
    """Return `tl.dot`'s `input_precision`; products run on float32 values, whatever comes in.

    Half-precision inputs have at most the 11 significant bits of TF32, which has the range of float32, so that states
    cannot overflow. With float32 inputs, products are exact on AMD ("ieee", on matrix cores) and in the interpreter.
    NVIDIA's tensor cores take three TF32 products instead, which keep 22 bits: Triton's "ieee" there unrolls whole
    tiles into registers and spills them.
    """
    here = target()
    full = any(x is not None and x.dtype == torch.float32 for x in tensors)
    if here.backend == "cuda":
        return "tf32x3" if full else "tf32"
    return "tf32" if here.arch == "gfx942" and not full else "ieee"


def _options(num_warps: int, num_stages: int, limited: bool) -> dict[str, int]:
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options | {"maxnreg": _MOST_REGISTERS} if limited and target().backend == "cuda" else options


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int,
    num_stages: int = 1,
    passes: dict[str, float] | None = None,
    flops: int = 0,
    limited: bool = True,
    **arguments: Any,
) -> None:
    """Run `kernel[grid](**arguments)`, or record it while a plan is active. The rest is as in `Launch` and its options.

    `limited` tells NVIDIA's assembler the most registers that a thread can have. Where it is not told, it spills a
    few in many kernels so that more programs fit on a processor; where it is, it uses more in all, and spills in some
    kernels of large products that it else fits in. Both were found by compiling for all targets.
    """
    if 0 in grid:
        return
    if _plan is not None:
        _plan.append(Launch(kernel, grid, arguments, _options(num_warps, num_stages, limited), passes or {}, flops))
        if _target is not None:
            return
    if os.environ.get(TUNE_VARIABLE) == "1" and not interpreting():
        num_warps, num_stages = _tuned(kernel, grid, arguments, (num_warps, num_stages), limited)
    kernel[grid](**arguments, **_options(num_warps, num_stages, limited))


_winners: dict[tuple, tuple[int, int]] = {}


def _bucket(size: int) -> int:
    """Return the next power of two: sizes in between share one tuning."""
    return 1 << max(0, size - 1).bit_length()


def _tuned(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], default: tuple[int, int], limited: bool
) -> tuple[int, int]:
    """Return the fastest (num_warps, num_stages); timed once a kernel, dtypes, tile and bucket of the grid's sizes.

    The kernel must write every output from its inputs alone, so that a timed run can be repeated.
    """
    constants = tuple(arguments[parameter.name] for parameter in kernel.params if parameter.is_constexpr)
    dtypes = tuple(x.dtype for x in arguments.values() if isinstance(x, Tensor))
    key = (kernel.fn.__qualname__, target(), constants, dtypes, tuple(map(_bucket, grid)))
    if key not in _winners:
        import triton

        def time(candidate: tuple[int, int]) -> float:
            try:
                return triton.testing.do_bench(
                    lambda: kernel[grid](**arguments, **_options(*candidate, limited)), return_mode="median"
                )
            except triton.runtime.errors.OutOfResources:
                return float("inf")

        _winners[key] = min(dict.fromkeys((default, *_CANDIDATES)), key=time)
        _logger.info("%s%s: num_warps, num_stages = %s", kernel.fn.__qualname__, constants, _winners[key])
    return _winners[key]


@cache
def _log_float64(op: str) -> None:
    _logger.warning("%s runs its PyTorch reference on float64 tensors; pass float32 for the Triton kernels", op)


def _guarded(op: str, function: Callable, reference: Callable) -> Callable:
    def run(arguments: tuple, *gradients: tuple):
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in arguments):
            _log_float64(op)
            return reference(arguments, *gradients)
        device = arguments[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return function(arguments, *gradients)

    return run


def loader(op: str, folder: str, forward: str = "forward", backward: str = "backward") -> Callable[[], Implementation]:
    """Return a loader, for `dispatch.register`, of the functions `forward` and `backward` of `folder`/triton.py.

    float64 goes to the functions of the same names in `folder`/reference.py.
    """

    def load() -> Implementation:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise Unavailable(f"triton cannot be imported ({error})", "install it with: pip install triton") from error
        if not interpreting() and not torch.cuda.is_available():
            raise Unavailable("PyTorch sees no CUDA or ROCm GPU", "set TRITON_INTERPRET=1 to interpret the kernels")
        fast, slow = (importlib.import_module(f"visionmix.kernels.{folder}.{name}") for name in ("triton", "reference"))
        return Implementation(*(_guarded(op, getattr(fast, name), getattr(slow, name)) for name in (forward, backward)))

    return load
