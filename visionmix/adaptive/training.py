"""The three phases in which a converted model is trained, as losses of a pass and as models for `visionmix train`."""

from functools import cache
from typing import Any

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.adaptive.conversion import modules, set_learners
from visionmix.adaptive.losses import (
    budget_loss,
    check_budget,
    distillation_loss,
    diversity_loss,
    entropy_loss,
    routing_loss,
    routing_targets,
)
from visionmix.adaptive.module import ACM
from visionmix.adaptive.observing import check_gates_choose, choices, learner_costs, observe, recorded
from visionmix.reduction.sharing import share
from visionmix.registry import check_positive, is_number

PHASES = ("distill", "route", "finetune")


def distillation_losses(model: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the teacher's logits and, as "distillation", the loss of phase 1: the mean over modules of their own.

    Each `ACM` learns by itself to give, with every number of learners, what the layer that it replaces makes of the
    teacher's activations: see `visionmix.adaptive.losses.distillation_loss`. Gates and all other layers have no part.
    Activations within a module are computed again in the backward pass, since the results of all numbers of learners
    are large.

    Source: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193).

    Args:
        model: A converted model.
        teacher: The model that it was converted from, in evaluation mode.
        images: (batch, channels, height, width).

    Raises:
        ValueError: the teacher trains or lacks a layer, or `model` has no `ACM`.
    """
    logits, seen = observe(teacher, model, images)
    losses = [checkpoint(_distill, module, *seen[name]) for name, module in modules(model).items()]
    return logits, {"distillation": torch.stack(losses).mean()}


def routing_losses(
    model: nn.Module, teacher: nn.Module, images: Tensor, ratio: float = 1.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the teacher's logits and, as "routing", the loss of phase 2: the mean over modules of their own.

    Each gate learns by cross entropy, from the teacher's activations, how many learners a token needs: see
    `visionmix.adaptive.losses.routing_targets`. Learners and all other layers have no part.

    Source: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193).

    Args:
        model: A converted model after phase 1.
        teacher: The model that it was converted from, in evaluation mode.
        images: (batch, channels, height, width).
        ratio: Factor by which one more learner must lower the error.

    Raises:
        TypeError: `ratio` is no number.
        ValueError: `ratio` is not above 0, the teacher trains or lacks a layer, or `model` has no `ACM`.
    """
    check_positive(ratio=ratio)
    logits, seen = observe(teacher, model, images)
    losses = []
    for name, module in modules(model).items():
        x, target = seen[name]
        gate = module.gating_network
        with torch.no_grad():
            needed = routing_targets(module.prefixes(x), target, ratio).clamp(min=gate.min_choice)
        losses.append(routing_loss(gate.logits(x), needed))
    return logits, {"routing": torch.stack(losses).mean()}


def finetuning_losses(
    model: nn.Module,
    images: Tensor,
    budget: float,
    *,
    budget_weight: float = 0.1,
    entropy_weight: float = 0.05,
    diversity_weight: float = 0.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and the losses of phase 3 beside that of the labels, with their weights in them.

    "budget" is the distance of the learners' cost from its share `budget`, "entropy" and "diversity" grow where tokens
    of an image, and images, all choose alike: see `visionmix.adaptive.losses`. A weight of 0 leaves a loss out. The
    gates learn from the loss of the labels too, straight through their choices (in the released code they do not).

    Source: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193).

    Args:
        model: A converted model after phase 2, in training mode.
        images: (batch, channels, height, width).
        budget: Cost of the learners to aim at, as a share of all learners' cost.
        budget_weight: Weight of the budget's loss; this and the following are published for ViT-B.
        entropy_weight: Weight of the entropy's.
        diversity_weight: Weight of the diversity's.

    Raises:
        TypeError: a number is of another type.
        ValueError: `budget` is outside of [0, 1], a weight is negative, `model` has no `ACM`, or the number of learners
            is set by `set_learners`.
    """
    _check_finetuning(budget, budget_weight, entropy_weight, diversity_weight)
    check_gates_choose(model)
    with recorded(model) as record:
        logits = model(images)
    gates = {name: choices(gate, images.shape[0]) for name, gate in record.items() if gate}
    losses = {}
    if budget_weight:
        losses["budget"] = budget_weight * budget_loss(gates, learner_costs(model), budget)
    if entropy_weight:
        losses["entropy"] = entropy_weight * entropy_loss(gates)
    if diversity_weight:
        losses["diversity"] = diversity_weight * diversity_loss(gates)
    return logits, losses


class InPhase(nn.Module):
    """A converted model in one phase of its training; see `in_phase`."""

    base: type[nn.Module]
    phase: str
    phase_options: dict[str, Any]

    def forward_train(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and the phase's own losses, scalars by name.

        The logits of phases "distill" and "route" are the teacher's, from which no gradient comes.
        """
        if self.phase == "finetune":
            return finetuning_losses(self, images, **self.phase_options)
        losses = distillation_losses if self.phase == "distill" else routing_losses
        return losses(self, self.__dict__["teacher"], images, **self.phase_options)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        if self.__dict__["teacher"] is not None:  # it is no part of the model, and goes where the model goes
            self.__dict__["teacher"]._apply(fn)
        return super()._apply(fn, recurse)

    def __reduce__(self) -> tuple:
        return _blank, (self.base,), self.__getstate__()


def in_phase(model: nn.Module, phase: str, teacher: nn.Module | None = None, **options: Any) -> nn.Module:
    """Return `model` with a ``forward_train(images)`` that returns logits and the losses of a phase of its training.

    The result is of a subclass of the model's class and shares its layers, so that training one trains both.
    Parameters that the phase does not train are frozen: all but the learners' in "distill", all but the gates' in
    "route", none in "finetune". In "distill" all learners run in evaluation, in the others as many as the gates choose.
    "finetune" compiles to one graph; the teacher's pass in the other two stays outside of a compiled graph.

    Args:
        model: A converted model.
        phase: "distill", "route" or "finetune", one after another: `distillation_losses`, `routing_losses` and
            `finetuning_losses`.
        teacher: The model that `model` was converted from, for the first two; it is put into evaluation mode. It is no
            part of the result, but moves to a device or type with it.
        **options: Those of the phase's losses, checked.

    Raises:
        TypeError: an option is unknown or of a wrong type.
        ValueError: `phase` is unknown, `teacher` is missing or not needed, `model` has no `ACM`, or an option's value
            is refused.
    """
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: give one of {', '.join(map(repr, PHASES))}")
    if (teacher is None) != (phase == "finetune"):
        need = "has no use for a teacher" if phase == "finetune" else "needs the model that was converted as teacher"
        raise ValueError(f"teacher: phase {phase!r} {need}")
    found = modules(model)
    known = {"distill": (), "route": ("ratio",), "finetune": _FINETUNING}[phase]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}={options[name]!r} is no option of phase {phase!r}, which has {list(known)}")
    if phase == "route":
        check_positive(**options)
    if phase == "finetune":
        if "budget" not in options:
            raise TypeError("budget is missing: give the learners' cost to aim at, from 0 to 1")
        _check_finetuning(**options)
    new = share(model, _class(type(model)))
    new.phase, new.phase_options = phase, options
    new.__dict__["teacher"] = None if teacher is None else teacher.eval().requires_grad_(False)
    new.requires_grad_(phase == "finetune")
    for module in found.values():
        for name, parameter in module.named_parameters():
            gate = name.startswith("gating_network.")
            parameter.requires_grad_(phase == "finetune" or gate == (phase == "route"))
    set_learners(new, 1.0 if phase == "distill" else None)
    return new


_FINETUNING = ("budget", "budget_weight", "entropy_weight", "diversity_weight")


def _check_finetuning(budget: float, *weights: float, **named: float) -> None:
    check_budget(budget)
    for name, value in {**dict(zip(_FINETUNING[1:], weights, strict=False)), **named}.items():
        if not is_number(value):
            raise TypeError(f"{name}={value!r}: give a number")
        if not value >= 0:
            raise ValueError(f"{name}={value}: give 0 or more")


def _distill(module: ACM, x: Tensor, target: Tensor) -> Tensor:
    return distillation_loss(module.prefixes(x), target)


@cache
def _class(base: type[nn.Module]) -> type[InPhase]:
    """Return the class of `base` with a `forward_train`."""
    if issubclass(base, InPhase):
        return base
    name = f"InPhase{base.__name__}"
    space = {"__module__": __name__, "__qualname__": name, "__doc__": InPhase.__doc__, "base": base}
    return type(name, (InPhase, base), space)


def _blank(base: type[nn.Module]) -> InPhase:
    cls = _class(base)
    return cls.__new__(cls)
