"""What goes on inside a model during a pass: choices of gates, inputs and results of layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionmix.adaptive.conversion import modules
from visionmix.adaptive.losses import used_share
from visionmix.adaptive.module import SplitACM


class Usage(NamedTuple):
    """How much of a converted model's learners images use.

    Attributes:
        share: Cost of the learners that ran, over that of all learners: what `budget_loss` compares with the budget.
        modules: Share of the learners that ran in each module, by name.
    """

    share: float
    modules: dict[str, float]


@torch.no_grad()
def usage(model: nn.Module, images: Tensor) -> Usage:
    """Return what share of its learners `model` uses for `images` in evaluation.

    Multiply-adds of the whole model are counted by `torch.utils.flop_counter`, which sees what really runs.

    Args:
        model: A converted model whose gates choose; its mode does not change.
        images: (batch, channels, height, width).

    Raises:
        ValueError: `model` has no `ACM`, or the number of learners is set by `set_learners`.
    """
    check_gates_choose(model)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with recorded(model) as gates:
            model(images)
    finally:
        for module, mode in training.items():
            module.training = mode
    chosen = {name: choices(gate, images.shape[0]) for name, gate in gates.items()}
    shares = {name: used_share({name: gate}, {name: 1.0}).item() for name, gate in chosen.items()}
    return Usage(used_share(chosen, learner_costs(model)).item(), shares)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Return the gates that each `ACM` of `model` chooses while the context lasts, by name."""
    found = modules(model)
    gates: dict[str, list[Tensor]] = {name: [] for name in found}
    try:
        for name, module in found.items():
            module.record = gates[name]
        yield gates
    finally:
        for module in found.values():
            module.record = None


def choices(gates: list[Tensor], batch: int) -> Tensor:
    """Return a module's recorded gates as (batch, tokens, choices); windows of an image count as its tokens."""
    return torch.cat([gate.reshape(batch, -1, gate.shape[-1]) for gate in gates], dim=1)


def learner_costs(model: nn.Module) -> dict[str, float]:
    """Return the multiply-adds of one learner of each `ACM` for one token, by name."""
    return {name: module.learner_macs for name, module in modules(model).items()}


def check_gates_choose(model: nn.Module) -> None:
    """Raise ValueError unless the gates of all `ACM` of `model` choose."""
    for name, module in modules(model).items():
        if module.learners is not None:
            raise ValueError(f"{name} has learners={module.learners} for all tokens; call set_learners(model, None)")


@torch.compiler.disable  # hooks cannot be registered in a graph
@torch.no_grad()
def observe(teacher: nn.Module, model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the teacher's logits, and the input and result of the layer that each `ACM` of `model` replaces.

    Args:
        teacher: The model that `model` was converted from.
        model: The converted model.
        images: (batch, channels, height, width).

    Raises:
        ValueError: the teacher trains or lacks a layer, or `model` has no `ACM`.
    """
    if teacher.training:
        raise ValueError("teacher is in training mode, in which its results vary; call teacher.eval()")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []

    def keep(names: list[str]):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
            for name, part in zip(names, result.chunk(len(names), dim=-1), strict=True):
                seen[name] = inputs[0], part

        return hook

    try:
        for layer, names in replaced(model).items():
            handles.append(_layer(teacher, layer).register_forward_hook(keep(names)))
        logits = teacher(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def replaced(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the layers that were replaced, and of the `ACM` that stand for each."""
    found: dict[str, list[str]] = {}
    for name in modules(model):
        outer = name.rpartition(".")[0]
        split = outer and isinstance(model.get_submodule(outer), SplitACM)
        found.setdefault(outer if split else name, []).append(name)
    return found


def _layer(teacher: nn.Module, name: str) -> nn.Module:
    try:
        return teacher.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"teacher, a {type(teacher).__qualname__}, has no layer {name}; give the model that was converted"
        ) from None
