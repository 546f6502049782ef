"""Estimate the time of a training step from what it costs, the rates of a device, and the shares reached of them."""

import dataclasses
import math
import os
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2

from visionmix.tools import models, recipe, timing
from visionmix.tools.devices import Assumed, Device
from visionmix.tools.evaluation import AMP_DTYPES
from visionmix.tools.recipe import Recipe
from visionmix.tools.step_cost import Call, StepCost, count, loss

_CACHED = (1 << 20, 1 << 22, 1 << 24, 1 << 26)  # bytes that the copies which caches may hold read and write
# The model, images and classes of the step by which a CPU's rates are corrected.
_REFERENCE, _BATCH, _CLASSES = "swin_tiny_patch4_window7_224", 2, 1000


@dataclass(frozen=True)
class Part:
    """A part of a step: FLOPs, bytes moved, and seconds of the device, of the host, and in all."""

    flops: int
    moved: int
    device: float
    host: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a step is estimated to take.

    Attributes:
        parts: Forward pass, the teacher's if there is one, backward pass and update, of all batches of the step.
        all_reduce: Seconds that the gradients' all-reduce takes.
        exposed: Seconds of it that the backward pass does not hide.
    """

    parts: dict[str, Part]
    all_reduce: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(part.seconds for part in self.parts.values()) + self.exposed


def part(calls: list[Call], device: Device, assumed: Assumed, serial: bool) -> Part:
    """Return the estimate of a part of a step; `serial` says that the host computes, too, and waits for each op."""
    seconds = 0.0
    for call in calls:
        compute = call.flops / (device.half if call.half else device.single) / assumed.compute
        memory = call.moved / device.rate(call.moved) / assumed.memory
        if call.fused:
            compute = call.flops / device.single / assumed.fused
            memory = call.moved / device.rate(call.moved) / assumed.fused
        seconds += max(compute, memory)
    host = len(calls) * assumed.launch
    total = seconds + host if serial else max(seconds, host)
    return Part(sum(call.flops for call in calls), sum(call.moved for call in calls), seconds, host, total)


def all_reduce(size: int, gpus: int, a_node: int, device: Device, assumed: Assumed) -> float:
    """Return the seconds of an all-reduce of `size` bytes over `gpus` devices, `a_node` of them in a node.

    In a ring each device, and so each node, sends 2 (gpus - 1) / gpus of the bytes; a node's network cards share them.
    """
    rate = device.link if gpus <= a_node else min(device.link, a_node * device.network)
    return 2 * (gpus - 1) / gpus * size / (rate * assumed.link) if gpus > 1 else 0.0


def estimate(
    cost: StepCost, device: Device, assumed: Assumed, *, gpus: int = 1, a_node: int = 8, serial: bool = False
) -> Estimate:
    """Return what a step of `cost` takes on each of `gpus` devices; arguments as `part` and `all_reduce` take them."""
    names = [name for name in ("forward", "teacher", "backward", "update") if name != "teacher" or cost.teacher]
    parts = {name: part(getattr(cost, name), device, assumed, serial) for name in names}
    reduce = all_reduce(cost.gradients, gpus, a_node, device, assumed)
    last = parts["backward"].seconds / cost.accumulate  # the processes add up their gradients once a step
    return Estimate(parts, reduce, max(0.0, reduce - assumed.overlap * last))


def cpu(amp: str, assumed: Assumed) -> Device:
    """Return this machine's CPU as a device; its rates are measured in about ten seconds, with PyTorch's threads.

    They are those of copies of several sizes and of a matrix product, times the factor by which they estimate a step of
    swin_tiny's training rightly: products smaller than the measured one change what a step reaches.
    """
    bandwidth, single = timing.quick_limits()
    half = single
    if amp != "none":
        half = timing.quick_limits(AMP_DTYPES.get(amp, torch.bfloat16))[1]
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not told on this system
        memory = math.inf
    cached = tuple((size, rate) for size, rate in timing.copy_rates(_CACHED).items() if rate > bandwidth)
    device = Device(
        half, single, bandwidth, memory, math.inf, math.inf, "copies and a matrix product, measured now", cached
    )
    made = recipe.from_dict(
        {
            "model": {"name": _REFERENCE},
            "data": {"image_size": 224, "batch_size": _BATCH},
            "optimizer": {"clip_grad": None},
            "train": {"amp": amp, "ema_decay": None},
        },
        "the step that is measured",
    )
    cost = count(made, _BATCH, classes=_CLASSES, foreach=False)
    factor = estimate(cost, device, assumed, serial=True).seconds / _measured_step(made)
    return dataclasses.replace(
        device,
        half=half * factor,
        single=single * factor,
        bandwidth=bandwidth * factor,
        cached=tuple((size, rate * factor) for size, rate in cached),
        source=f"{device.source}, times {factor:.2f} by a step of {_REFERENCE}",
    )


def _measured_step(made: Recipe) -> float:
    """Return the seconds of the fastest training step by this recipe in two seconds."""
    model = models.create_model(made.model.name, num_classes=_CLASSES).train()
    if made.train.amp == "pure_bfloat16":
        model.to(torch.bfloat16)
    optimizer = create_optimizer_v2(model, opt=made.optimizer.name, lr=made.optimizer.lr)
    size = made.data.image_size
    images, targets = torch.randn(_BATCH, 3, size, size), torch.rand(_BATCH, _CLASSES).softmax(1)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, made, images, targets).backward()
        optimizer.step()

    return timing.fastest(step, 2.0)
