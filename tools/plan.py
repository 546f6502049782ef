"""Plan a training run before it costs anything: time a step, memory a GPU, data rate, hours and GPU-hours.

    visionmix plan vig_b --gpus 256 --gpu h100 --batch 4096
    visionmix plan vmamba_tiny --gpus 8 --gpu a100 --batch 1024 --amp bfloat16 --epochs 100

Counted, on tensors without data: the FLOPs of every op, the bytes that it reads and writes, and the memory that is
alive at any time in a step of the recipe (`tools/step_cost.py` says how). Assumed, printed and set by options: the
shares of a device's peak rates that are reached, and the host's time to start an op. An op takes the longer of its
FLOPs at the peak rate and its bytes at the peak bandwidth. On a GPU a pass takes the longer of its ops' time and the
host's; on a CPU, their sum.

Not counted: loading and augmentation of images, which must keep up with the data rate; saving; restarts; compilation by
`torch.compile`, which would join ops; MESA's passes; the loss of a teacher, whose own passes are counted. Ops are those
of PyTorch on a CPU: under autocast a GPU casts a few more values to float32, and an RMSNorm in float32 is one op there.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from visionmix.registry import nearest
from visionmix.tools import display, models, recipe
from visionmix.tools.arguments import check_least
from visionmix.tools.devices import CPU, DEVICES, GIB, GPU, OPTIONS, Assumed, Device
from visionmix.tools.recipe import Recipe
from visionmix.tools.step_cost import StepCost, count
from visionmix.tools.step_time import Estimate, cpu, estimate

# ImageNet-1k: images to train and to test on, classes, and the mean file (147.9 GB of training images).
_TRAIN, _TEST, _CLASSES, _IMAGE_KB = 1_281_167, 50_000, 1000, 115.0


def largest_batch(peak: Callable[[int], int], batch: int, limit: float) -> int:
    """Return the largest batch whose `peak` is at most `limit`, 0 if there is none; that of `batch` is larger.

    The peak is the largest of a few sums that are linear in the batch, so that a line through two points leads near.
    """
    top = peak(batch)
    slope = (peak(2 * batch) - top) / batch
    while batch > 0 and top > limit:
        batch = max(0, min(batch - 1, batch - math.ceil((top - limit) / slope)))
        top = peak(batch) if batch else 0
    return batch


def read_recipe(model: str, name: str | None, overrides: dict, settings: list[str]) -> tuple[Recipe, str]:
    """Return the recipe called `name` for `model`, and where it comes from.

    Without a name it is the packaged recipe of the model, or else the default settings at the model's own image size.

    Raises:
        FileNotFoundError: there is no recipe of this name.
        ValueError: the model is unknown, or a key or value of the recipe is wrong.
        TypeError: a value of the recipe has the wrong type.
    """
    size = (models.weights_cfg(model).input_size or (3, 224, 224))[-1]
    overrides.setdefault("model", {})["name"] = model
    if name is not None:
        return recipe.read(name, overrides, settings), name
    packaged = f"imagenet/{model.partition('.')[0]}.yaml"
    try:
        return recipe.read(packaged, overrides, settings), packaged
    except FileNotFoundError:
        own = {"data": {"image_size": size}}
        return recipe.override(own, "the default settings", overrides, settings), "the default settings"


@dataclass(frozen=True)
class Run:
    """A training run to be planned: its recipe, whose batch size is that of a GPU, and the machines."""

    made: Recipe
    source: str
    gpu: str
    device: Device
    assumed: Assumed
    gpus: int
    a_node: int
    images: int
    image_kb: float

    @property
    def batch(self) -> int:
        """Images of all GPUs at each step."""
        return self.made.data.batch_size * self.made.train.accumulate * self.gpus

    def count(self, batch: int, checkpointing: bool) -> StepCost:
        """Return what a step costs that takes `batch` images a GPU at once; raises as `step_cost.count` does."""
        return count(self.made, batch, classes=_CLASSES, checkpointing=checkpointing, foreach=self.gpu != "cpu")

    def estimate(self, cost: StepCost) -> Estimate:
        """Return what a step of this cost takes."""
        serial = self.gpu == "cpu"
        return estimate(cost, self.device, self.assumed, gpus=self.gpus, a_node=self.a_node, serial=serial)

    def seconds(self, step: Estimate) -> float:
        """Return the seconds of all epochs, each with a test of ImageNet-1k's 50,000 test images."""
        test = step.parts["forward"].seconds * math.ceil(_TEST / self.batch)
        return self.made.schedule.epochs * (self.images // self.batch * step.seconds + test)


def show(run: Run, checkpointing: bool, console: Console) -> bool:
    """Print the plan of `run`; return whether its memory fits."""
    made, device, assumed = run.made, run.device, run.assumed
    per_gpu = made.data.batch_size
    costs = {kept: run.count(per_gpu, not kept) for kept in (True, False) if kept or _checkpoints(made)}
    if checkpointing and False not in costs:
        raise ValueError(f"model {made.model.name!r} has no activation checkpointing; leave --checkpointing out")
    cost = costs[not checkpointing]
    step = run.estimate(cost)
    kept = ", activation checkpointing" if checkpointing else ""
    batches = f" in {made.train.accumulate} batches" if made.train.accumulate > 1 else ""
    console.print(
        f"{made.model.name}, {made.data.image_size} pixels, by {run.source}, amp {made.train.amp}: {run.gpus} x "
        f"{run.gpu}, {run.batch} images a step{batches}, {per_gpu} a GPU{kept}",
        style="bold",
    )
    console.print(_step_table(step))
    limit = device.memory * assumed.usable
    console.print(_memory_table(costs, run.gpus, limit))
    peak = cost.peak(run.gpus)
    if peak > limit:
        most = largest_batch(lambda batch: run.count(batch, checkpointing).peak(run.gpus), per_gpu, limit)
        advice = (
            f"the largest batch is {most} a GPU, {most * run.gpus} in all{batches and ' at once'}"
            if most
            else "no batch does"
        )
        console.print(f"DOES NOT FIT: {_gib(peak)} of {_gib(limit)} GiB; {advice}", style="bold red")
        if not checkpointing and False in costs:
            fits = "fits" if costs[False].peak(run.gpus) <= limit else "does not fit, either"
            console.print(f"With --checkpointing this batch {fits}.", style="red")
    console.print(_run_table(run, step))
    if False in costs and not checkpointing:
        slower = run.estimate(costs[False]).seconds / step.seconds
        console.print(f"Activation checkpointing would take {slower:.2f} times the time of a step.")
    _print_assumptions(run, console)
    return peak <= limit


def _checkpoints(made: Recipe) -> bool:
    """Return whether the model offers activation checkpointing."""
    with torch.device("meta"):
        model = models.create_model(made.model.name, reduction=made.model.reduction, **made.model.kwargs)
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        return False
    return True


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _step_table(step: Estimate) -> Table:
    table = Table(title="a step, on each GPU")
    for column in ("part", "TFLOP", "GB moved", "device, ms", "host, ms", "estimate, ms"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, each in step.parts.items():
        figures = (each.device * 1e3, each.host * 1e3, each.seconds * 1e3)
        table.add_row(
            name, f"{each.flops / 1e12:.3f}", f"{each.moved / 1e9:.2f}", *(f"{figure:.2f}" for figure in figures)
        )
    table.add_row("all-reduce", "", "", f"{step.all_reduce * 1e3:.2f}", "", f"{step.exposed * 1e3:.2f} not hidden")
    table.add_row("step", "", "", "", "", f"{step.seconds * 1e3:.2f}", style="bold")
    return table


def _memory_table(costs: dict[bool, StepCost], gpus: int, limit: float) -> Table:
    table = Table(title=f"memory of a GPU, GiB, of {_gib(limit)}")
    table.add_column("")
    for kept in costs:
        table.add_column("all activations kept" if kept else "activation checkpointing", justify="right")
    rows: dict[str, Callable[[StepCost], float]] = {
        "parameters and buffers": lambda cost: cost.parameters,
        "gradients": lambda cost: cost.gradients,
        "optimiser state": lambda cost: cost.optimizer,
        "moving average": lambda cost: cost.average,
        "teacher": lambda cost: cost.given,
        "all-reduce buffers": lambda cost: cost.gradients if gpus > 1 else 0,
        "activations": lambda cost: cost.activations,
    }
    if not any(cost.given for cost in costs.values()):
        del rows["teacher"]
    for name, size in rows.items():
        table.add_row(name, *(_gib(size(cost)) for cost in costs.values()))
    rest = (cost.peak(gpus) - sum(size(cost) for size in rows.values()) for cost in costs.values())
    table.add_row("working space, less what the peak lacks", *(_gib(size) for size in rest))
    table.add_row("peak", *(_gib(cost.peak(gpus)) for cost in costs.values()), style="bold")
    return table


def _run_table(run: Run, step: Estimate) -> Table:
    rate = run.batch / step.seconds
    hours = run.seconds(step) / 3600
    table = Table(title="the run", show_header=False)
    table.add_row("images a second", f"{rate:,.0f}, {rate / run.gpus:,.1f} a GPU")
    table.add_row("data rate", f"{rate * run.image_kb / 1e3:,.0f} MB a second at {run.image_kb:g} kB an image")
    table.add_row(
        "epochs", f"{run.made.schedule.epochs} of {run.images:,} images, {run.images // run.batch:,} steps each"
    )
    table.add_row("hours", f"{hours:,.2f}, {hours * run.gpus:,.1f} GPU-hours, with a test after each epoch")
    return table


def _print_assumptions(run: Run, console: Console) -> None:
    device = run.device
    links = (
        f", link {device.link / 1e9:.4g} GB/s, network {device.network / 1e9:.4g} GB/s a GPU, {run.a_node} GPUs a node"
    )
    console.print(
        f"Peak rates of {run.gpu} ({device.source}): {device.half / 1e12:.4g} TFLOP/s in 16 bits, "
        f"{device.single / 1e12:.4g} in float32, memory {device.bandwidth / 1e9:.4g} GB/s"
        f"{links if run.gpus > 1 else ''}."
    )
    options = (f"--{name} {value:g}" for name, value in dataclasses.asdict(run.assumed).items())
    console.print(f"Counted: FLOPs, bytes and memory of every op. Assumed: {', '.join(options)}; see --help.")


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("model", help="timm model name")
    parse.add_argument("--gpu", default="h100", help=f"{', '.join(DEVICES)}, or cpu: this machine, measured (h100)")
    parse.add_argument("--gpus", type=int, default=1, help="how many, a process each (1)")
    parse.add_argument("--gpus-per-node", type=int, default=8, help="of them in a machine (8)")
    parse.add_argument("--batch", type=int, help="images of all GPUs at each step (the recipe's, times --gpus)")
    parse.add_argument("--recipe", help="a path or packaged name (imagenet/MODEL.yaml if there is one, else defaults)")
    parse.add_argument("--epochs", type=int, help="epochs in all (schedule.epochs)")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels (data.image_size)")
    parse.add_argument("--amp", help="mixed precision: none, float16, bfloat16 or pure_bfloat16 (train.amp)")
    parse.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    parse.add_argument(
        "--checkpointing", action="store_true", help="compute blocks again in the backward pass (train.checkpointing)"
    )
    parse.add_argument("--images", type=int, default=_TRAIN, help=f"images of an epoch ({_TRAIN}, ImageNet-1k's)")
    parse.add_argument("--image-kb", type=float, default=_IMAGE_KB, help=f"kB of a file ({_IMAGE_KB:g}, ImageNet-1k's)")
    for name, text in OPTIONS.items():
        gpu, processor = getattr(GPU, name), getattr(CPU, name)
        parse.add_argument(f"--{name}", type=float, help=f"{text} ({gpu:g}; of a CPU {processor:g})")
    return parse


def prepare(args: argparse.Namespace) -> Run:
    """Return the run that the arguments ask for, everything checked before any work.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: at a wrong name, value or combination of arguments.
        TypeError: at a recipe value of the wrong type.
    """
    if args.gpu != "cpu" and args.gpu not in DEVICES:
        raise ValueError(
            f"gpu={args.gpu!r} is not known{nearest(args.gpu, DEVICES)}; choose one of {', '.join(DEVICES)}, or cpu"
        )
    check_least(1, gpus=args.gpus, gpus_per_node=args.gpus_per_node, batch=args.batch, images=args.images)
    if args.gpu == "cpu" and args.gpus > 1:
        raise ValueError(f"gpus={args.gpus} with gpu='cpu'; the plan of a CPU is that of one process, leave --gpus out")
    if not 0 < args.image_kb < math.inf:
        raise ValueError(f"image_kb={args.image_kb:g} is not a size; give the mean size of a file in kB, e.g. 115")
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        least, most = (0 if name in ("overlap", "launch") else 1e-6), (math.inf if name == "launch" else 1)
        if not least <= value <= most:
            wanted = "0 or more seconds" if name == "launch" else "a share between 0 and 1"
            raise ValueError(f"{name}={value:g} is out of range; give {wanted}")
    overrides: dict = {}
    for section, option, value in (
        ("schedule", "epochs", args.epochs),
        ("data", "image_size", args.img_size),
        ("train", "amp", args.amp),
        ("train", "checkpointing", args.checkpointing or None),
    ):
        if value is not None:
            overrides.setdefault(section, {})[option] = value
    made, source = read_recipe(args.model, args.recipe, overrides, args.set)
    at_once = args.gpus * made.train.accumulate
    if args.batch is not None:
        if args.batch % at_once:
            times = f" x train.accumulate={made.train.accumulate}" if made.train.accumulate > 1 else ""
            below = args.batch // at_once * at_once
            raise ValueError(
                f"batch={args.batch} is not divisible by gpus={args.gpus}{times}; give "
                + (f"{below} or {below + at_once}" if below else f"{at_once}")
            )
        overrides.setdefault("data", {})["batch_size"] = args.batch // at_once
        made, source = read_recipe(args.model, args.recipe, overrides, args.set)
    batch = made.data.batch_size * at_once
    if args.images < batch:
        raise ValueError(f"images={args.images} are fewer than a step of batch={batch} takes; lower --batch")
    assumed = dataclasses.replace(CPU if args.gpu == "cpu" else GPU, **given)
    device = cpu(made.train.amp, assumed) if args.gpu == "cpu" else DEVICES[args.gpu]
    return Run(made, source, args.gpu, device, assumed, args.gpus, args.gpus_per_node, args.images, args.image_kb)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return 0, or 1 where the memory does not fit."""
    parse = parser()
    args = parse.parse_args(argv)
    try:
        run = prepare(args)
        fits = show(run, run.made.train.checkpointing, display.table_console())
    except (ValueError, TypeError, OSError) as error:
        parse.error(str(error))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
