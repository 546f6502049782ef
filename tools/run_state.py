"""The state of a run: from a trainer to a checkpoint's content and back, on any number of processes."""

import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from visionmix.tools import checkpoint, data
from visionmix.tools.parallel import shard_like
from visionmix.tools.recipe import to_dict
from visionmix.tools.score import score

if TYPE_CHECKING:
    from visionmix.tools.trainer import Trainer


@dataclass
class Sums:
    """The sums of a process over an epoch.

    Attributes:
        lr: the learning rate at its start.
        batches: trained.
        loss: of all batches.
        own_losses: the same of each loss beside that of the labels.
        unreadable: a line for each file that could not be read.
    """

    lr: float
    batches: int = 0
    loss: float = 0.0
    own_losses: dict[str, float] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def state(trainer: "Trainer", loader: data.Loader | None) -> dict[str, Any]:
    """Return a checkpoint's content, with this process's "process"; `loader` is None between two epochs."""
    projection = trainer.student.projection
    process = None
    if loader is not None:
        process = {"sums": asdict(trainer.sums), "generators": generators(trainer.device)}
    return {
        "recipe": to_dict(trainer.recipe),
        "classes": trainer.classes,
        "input": trainer.input.to_dict(),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "history": list(trainer.history),
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.module.state_dict() if trainer.ema else None,
        "optimizer": optimizer_state(trainer.student, trainer.optimizer),
        "scaler": trainer.scaler.state_dict(),
        "projection": projection.state_dict() if projection is not None else None,
        "place": loader.state_dict() if loader is not None else None,
        "process": process,
    }


def load(trainer: "Trainer", content: dict[str, Any], source: str) -> None:
    """Give a trainer the state that a checkpoint holds.

    Raises:
        ValueError: when the checkpoint is of another model, other classes, or another optimiser, or in the middle of an
            epoch whose images so far are not whole steps of this run.
    """
    if "optimizer" not in content:
        raise ValueError(f"{source} holds weights only; a run resumes from a checkpoint of train.py")
    if content["classes"] != trainer.classes:
        raise ValueError(f"{source} was trained on other classes than those of the data folder")
    place = content.get("place")
    done, rest = divmod(place["images"] if place else 0, trainer.images_a_step)
    if rest:
        raise ValueError(
            f"{source} was written in the middle of an epoch, after {place['images']} of its images, which are no "
            f"whole steps of {trainer.images_a_step} images; go on with as many images a step as before, or from the "
            "end of an epoch"
        )
    wanted, before = trainer.recipe.optimizer, content["recipe"]["optimizer"]
    if wanted.name != before["name"]:
        raise ValueError(
            f"optimizer.name={wanted.name!r} cannot go on from {source}, which holds the state of {before['name']!r}; "
            "resume with that one"
        )
    load_weights(trainer.model, content["model"], source)
    if trainer.ema:
        load_weights(trainer.ema.module, content["ema"] or content["model"], source)
    if trainer.student.projection is not None:
        load_weights(trainer.student.projection, content["projection"] or {}, source)
    # What the recipe says counts, of the options too that it had or has; what an optimiser counted is loaded.
    given = {"lr", "initial_lr", "lr_scale", "weight_decay", *wanted.kwargs, *(before.get("kwargs") or {})}
    fresh = [{key: group[key] for key in given & group.keys()} for group in trainer.optimizer.param_groups]
    load_optimizer(trainer.student, trainer.optimizer, content["optimizer"], source)
    for group, values in zip(trainer.optimizer.param_groups, fresh, strict=True):
        group.pop("lr_scale", None)
        group.update(values)
    if trainer.scaler.is_enabled() and content["scaler"]:
        trainer.scaler.load_state_dict(content["scaler"])
    trainer.epoch, trainer.history = content["epoch"], list(content["history"])
    trainer.step = trainer.epoch * trainer.steps + done
    trainer.begun = {"place": place, "processes": content["processes"]} if place else None
    for epoch, row in enumerate(trainer.history, 1):  # what a plateau's schedule has seen
        trainer.scheduler.step(epoch, score(row))


def go_on(trainer: "Trainer", processes: list[dict[str, Any]]) -> Sums:
    """Set the generators for the rest of an epoch and return its sums so far, from those of the processes before."""
    each = [Sums(**process["sums"]) for process in processes]
    if len(processes) == trainer.world:
        each = [each[trainer.rank]]
        set_generators(processes[trainer.rank]["generators"], trainer.device)
    else:  # generators of other processes are no use, and each takes an equal share of the sums
        data.seed_everything(trainer.recipe.train.seed, trainer.epoch + 1, trainer.rank, trainer.step)
    batches = (trainer.step - trainer.epoch * trainer.steps) * trainer.recipe.train.accumulate
    scale = batches / each[0].batches / len(each)  # 1 where nothing has changed
    return Sums(
        each[0].lr,
        batches,
        sum(sums.loss for sums in each) * scale,
        {name: sum(sums.own_losses[name] for sums in each) * scale for name in each[0].own_losses},
        [line for sums in each for line in sums.unreadable],
    )


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a whole state dict into a model, sharded or not; raises as `checkpoint.load_weights` does."""
    checkpoint.check_weights(model, state, source)
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimiser's state dict with names of parameters in place of numbers.

    `get_optimizer_state_dict` of torch.distributed.checkpoint does the same, but takes a step where there is no state
    yet, which counts in schedules of the optimiser's own and which second-order ones cannot take.
    """
    names = _names(model, optimizer)
    state = optimizer.state_dict()
    groups = [group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return state | {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: str) -> None:
    """Load what `optimizer_state` returned, in other shards where there are.

    Raises:
        ValueError: it is the state of an optimiser of other parameters.
    """
    names = _names(model, optimizer)
    ours = [[names[number] for number in group["params"]] for group in optimizer.state_dict()["param_groups"]]
    if ours != [group["params"] for group in saved["param_groups"]]:
        raise ValueError(f"{source} holds the state of another optimiser: its groups of parameters are others")
    numbers = {name: number for number, name in enumerate(names)}
    parameters = dict(model.named_parameters())
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    state = {
        numbers[name]: {key: shard_like(value, parameters[name]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state, "param_groups": groups})


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of an optimiser's parameters in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def generators(device: torch.device) -> dict[str, Any]:
    """Return the states of python's, numpy's and torch's generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_generators(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `generators` returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
