"""Comparing an op's Triton kernels with its float64 reference: outputs, every gradient, and two runs bit by bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmix.tools.kernel_problems import Call, Tensors

# How far a result may lie from its float64 reference, relative to the largest value. Outputs and gradients are rounded
# to their dtype; the computation is float32 or better.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Check:
    """One result of an op beside its reference.

    Attributes:
        result: "out", another output's name, or "gradient of q".
        error: the largest difference, relative to the largest value; NaN or infinite where a result is.
        tolerance: of the error.
        repeats: whether a second run gave the same bits.
    """

    result: str
    error: float
    tolerance: float
    repeats: bool

    @property
    def passed(self) -> bool:
        """Whether it repeats and lies within the tolerance."""
        return self.repeats and self.error <= self.tolerance


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that a result that reads memory nobody wrote is seen."""
    deterministic, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def results(call: Call, arguments: tuple, implementation: str) -> dict[str, Tensor]:
    """Return an op's outputs and the gradients of its tensors by name, for gradients of the outputs drawn at random.

    Outputs that were not asked for, which are empty, are left out.
    """
    places = [place for place in call.schema.tensors if arguments[place] is not None]
    values = list(arguments._replace(implementation=implementation))
    for place in places:
        values[place] = values[place].detach().requires_grad_()
    op = getattr(torch.ops.visionmix, call.schema.name)
    found = op(*values)
    found = found if isinstance(found, tuple) else (found,)
    outputs = {name: x for name, x in zip(call.schema.outputs, found, strict=True) if x.requires_grad and x.numel()}
    device = arguments[0].device
    generator = torch.Generator(device).manual_seed(1)
    # Halves hold the weights exactly, so that every dtype begins from the same.
    weights = [
        torch.randn(x.shape, generator=generator, device=device).bfloat16().to(x.dtype) for x in outputs.values()
    ]
    inputs = [values[place] for place in places]
    grads = torch.autograd.grad(list(outputs.values()), inputs, weights, allow_unused=True, materialize_grads=True)
    names = [arguments._fields[place] for place in places]
    return {name: x.detach() for name, x in outputs.items()} | {
        f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max|actual - expected| / max|expected|, or the difference itself where nothing but zeros is expected."""
    if expected.numel() == 0:
        return 0.0
    largest = expected.double().abs().max().item() or 1.0
    return (actual.double() - expected.double()).abs().max().item() / largest


def check(call: Call, dtype: torch.dtype, device: str) -> list[Check]:
    """Run the Triton kernels twice, in poisoned memory, and compare them with each other and with float64.

    Returns nothing where the kernels are not to run in the type. States are kept for the backward pass where the op
    can, as in training.
    """
    arguments = call.arguments(Tensors(dtype, device))
    if arguments is None:
        return []
    if "keep_states" in arguments._fields:
        arguments = arguments._replace(keep_states=True)
    with poisoned_memory():
        first, again = (results(call, arguments, "triton") for _ in range(2))
    exact = (x.double() if isinstance(x, Tensor) else x for x in arguments)
    expected = results(call, arguments._make(exact), "reference")
    found = []
    for name, x in first.items():
        # A wider output has the 11 bits of the TF32 products that made it; gradients are of rounded outputs.
        narrow = dtype if name.startswith("gradient") or x.dtype == dtype else torch.float16
        repeats = torch.equal(x, again[name])
        found.append(Check(name, relative_error(x, expected[name]), TOLERANCE[narrow], repeats))
    return found
