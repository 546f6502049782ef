"""Which implementation of a fused op runs: the process's choice, what is ready, and why something is not.

Every op has a `reference` (chunked PyTorch, any device and dtype) and may have a `cpu` (compiled C++) and a `triton`
(CUDA, ROCm) implementation. An implementation is a loader that is called at first use and returns a forward and a
backward function; one that cannot run here raises `Unavailable`, which is remembered.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

_logger = logging.getLogger("visionmix.kernels")

CHOICES = ("auto", "reference", "cpu", "triton")
VARIABLE = "VISIONMIX_KERNELS"
IMPLEMENTATIONS = CHOICES[1:]

# The fast implementation of a device type; ROCm devices are "cuda" in PyTorch.
_FAST = {"cpu": "cpu", "cuda": "triton"}


class Unavailable(RuntimeError):
    """An implementation cannot run here: `reason` says why, and `remedy` how to change that."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Implementation:
    """The two functions of an op's implementation.

    `forward` takes the op's arguments as one tuple (`Schema.Arguments`); `backward` takes these and a second tuple
    (`Schema.Gradients`). Both return what the schemas say.
    """

    forward: Callable
    backward: Callable


_loaders: dict[str, dict[str, Callable[[], Implementation]]] = {}


def register(op: str, implementation: str, loader: Callable[[], Implementation]) -> None:
    """Add an implementation of `op`; `loader` runs at first use and may raise `Unavailable`."""
    _loaders.setdefault(op, {})[implementation] = loader


def reference_loader(module, forward: str = "forward", backward: str = "backward") -> Callable[[], Implementation]:
    """Return a loader of the functions `forward` and `backward` of a module."""
    return lambda: Implementation(getattr(module, forward), getattr(module, backward))


def _validated(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source}={choice!r} is not a choice of kernels; choose one of {', '.join(CHOICES)}")
    return choice


_choice = _validated(os.environ.get(VARIABLE) or "auto", VARIABLE)


class use:
    """Choose the implementation of every fused op in this process.

    A call sets the choice from here on; a `with` block restores the former one at its end. The variable
    VISIONMIX_KERNELS sets it at import.

    - `"auto"`: Triton on CUDA and ROCm devices and compiled C++ on the CPU where they are ready, else the reference.
    - `"reference"`: chunked PyTorch, called in place of the registered op, so that ONNX export, vmap and double
      backward work.
    - `"cpu"`, `"triton"`: that implementation, or an error saying why it cannot run.

    Raises:
        ValueError: `choice` is none of these.
    """

    def __init__(self, choice: str):
        global _choice
        self._former = _choice
        _choice = _validated(choice, "choice")

    def __enter__(self) -> "use":
        return self

    def __exit__(self, *_) -> None:
        global _choice
        _choice = self._former


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast on `device`: an op decides itself what it casts, and when."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def call_reference(function: Callable, arguments: tuple):
    """Call an op's PyTorch reference in place of the registered op; the first argument names the device."""
    with full_precision(arguments[0].device):
        return function(arguments)


def bypassed() -> bool:
    """Return whether ops call their PyTorch reference in place of the registered op."""
    return _choice == "reference"


@cache
def _load(op: str, implementation: str) -> Implementation | Unavailable:
    loader = _loaders[op].get(implementation)
    if loader is None:
        return Unavailable(f"{op} has no {implementation} implementation", 'choose visionmix.kernels.use("auto")')
    try:
        return loader()
    except Unavailable as error:
        return error


def load(op: str, implementation: str) -> Implementation:
    """Return the forward and backward functions of `op`.

    Raises:
        Unavailable: the implementation does not exist or cannot run here.
    """
    loaded = _load(op, implementation)
    if isinstance(loaded, Unavailable):
        raise loaded
    return loaded


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return the type an op computes in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


@cache
def log_slow_path(op: str, reason: str, remedy: str) -> None:
    _logger.warning("%s runs its PyTorch reference: %s; %s", op, reason, remedy)


def resolve(op: str, implementation: str, device: torch.device) -> str:
    """Return the name of the implementation that runs `op` on `device`.

    `"auto"` stands for the process's choice. Under the choice `"auto"` it is the device's fast implementation, or the
    reference where that is not ready; the reason is logged once.

    Raises:
        ValueError: `implementation` is not a choice, or belongs to another kind of device.
        Unavailable: the implementation asked for does not exist or cannot run here.
    """
    wanted = _choice if _validated(implementation, "implementation") == "auto" else implementation
    if wanted == "reference":
        return wanted
    fast = _FAST.get(device.type)
    if wanted != "auto":
        # Triton's interpreter runs the kernels on CPU tensors.
        if wanted != fast and not (wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(
                f"kernels={wanted!r} cannot run {op} on tensors on {device}; move them, or choose "
                'visionmix.kernels.use("auto")'
            )
        load(op, wanted)
        return wanted
    if fast is None or fast not in _loaders[op]:
        return "reference"
    loaded = _load(op, fast)
    if isinstance(loaded, Unavailable):
        log_slow_path(op, loaded.reason, loaded.remedy)
        return "reference"
    return fast


def backends() -> dict[str, dict[str, str]]:
    """Return, for every op and implementation, `"ready"` or the reason why it cannot run here, with the remedy.

    Loads every implementation: the first call may compile.
    """
    return {
        op: {
            name: str(loaded) if isinstance(loaded := _load(op, name), Unavailable) else "ready"
            for name in IMPLEMENTATIONS
        }
        for op in _loaders
    }
