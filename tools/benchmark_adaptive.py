"""Time of a model with adaptive computation modules beside the plain one, in one run.

    python tools/benchmark_adaptive.py deit_small_patch16_224 --share 0.5 --batch 8

Weights and images are random. The gates are set so that each module's tokens choose all numbers of learners, and use
the given share of the learners: a trained model's choices differ, its time for the same share hardly does. The models
are timed in turn, round by round, so that a change of the machine's speed meets all of them.
"""

import argparse
import statistics
import sys
import time

import torch
from rich.table import Table
from torch import Tensor, nn

from visionmix import adaptive
from visionmix.tools import display, models, timing
from visionmix.tools.arguments import check_least

_WARM = 2
LAYERS = {"feed-forwards": ["*blocks.*.mlp"], "all": list(adaptive.conversion.LAYERS)}


def shares_of_choices(choices: int, first: int, share: float) -> list[float]:
    """Return shares of the tokens for the choices `first`, ..., `choices` - 1, falling or rising by a constant factor,
    whose mean choice is `share` of the largest."""
    low, high = 1e-6, 1e6
    weights = [1.0]
    for _ in range(200):
        factor = (low * high) ** 0.5
        weights = [factor**index for index in range(choices - first)]
        mean = sum(weight * (first + index) for index, weight in enumerate(weights)) / sum(weights)
        low, high = (factor, high) if mean < share * (choices - 1) else (low, factor)
    return [weight / sum(weights) for weight in weights]


@torch.no_grad()
def set_gate(module: adaptive.ACM, x: Tensor, share: float) -> None:
    """Let the gate order tokens like x (..., in_features) by a random projection, and use `share` of the learners."""
    gate, tokens = module.gating_network, x.reshape(-1, module.in_features)
    shares = shares_of_choices(gate.num_choices, gate.min_choice, share)
    direction = torch.randn(module.in_features)
    places = (torch.tensor(shares).cumsum(0)[:-1] * len(tokens)).long().clamp(max=len(tokens) - 1)
    thresholds = (tokens @ direction).sort().values[places]
    # The largest of k t - (sum of the first k thresholds) is at the number of thresholds below t.
    gate.fc.weight.copy_(torch.arange(len(shares)).unsqueeze(1) * direction)
    gate.fc.bias.copy_(-torch.cat([torch.zeros(1), thresholds.cumsum(0)]))


def make(model: nn.Module, layers: list[str], share: float, images: Tensor) -> nn.Module:
    """Return `model` converted, with gates that use `share` of the learners for `images`."""
    new = adaptive.convert(model, layers=layers).eval()

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for part in [module] if isinstance(module, adaptive.ACM) else module.children():
            set_gate(part, inputs[0], share)

    outer = [module for module in new.modules() if isinstance(module, adaptive.ACM | adaptive.SplitACM)]
    handles = [module.register_forward_pre_hook(before) for module in outer]
    with torch.no_grad():
        new(images)
    for handle in handles:
        handle.remove()
    return new


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmark_adaptive", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name that timm knows")
    parser.add_argument("--share", type=float, default=0.5, help="of the learners that tokens use")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    try:
        check_least(1, batch=args.batch, threads=args.threads, rounds=args.rounds)
        if not 0 < args.share <= 1:
            raise ValueError(f"--share={args.share} is no share of the learners; give a number above 0, up to 1")
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        model = models.create_model(args.model).eval()
        for layer in model.modules():
            if isinstance(layer, nn.Linear):  # so that tokens differ from one another in every block
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        images = torch.randn(args.batch, *model.pretrained_cfg["input_size"])
        made = {"plain": model} | {name: make(model, layers, args.share, images) for name, layers in LAYERS.items()}
    except ValueError as error:
        parser.error(str(error))
    console = display.table_console()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    try:
        timing.wait_until_quiet()
    except timing.NoisyMachine as error:
        console.print(f"nothing measured: {error}", style="red")
        return 1
    with torch.inference_mode():
        for _ in range(_WARM + args.rounds):
            for name, each in made.items():
                start = time.perf_counter()
                each(images)
                seconds[name].append(time.perf_counter() - start)
    table = Table(title=f"{args.model}, batch {args.batch}, {args.threads} threads")
    for column in ("converted", "share used", "ms", "times as fast"):
        table.add_column(column)
    median = {name: statistics.median(values[_WARM:]) for name, values in seconds.items()}
    for name, each in made.items():
        used = "" if name == "plain" else f"{adaptive.usage(each, images).share:.3f}"
        table.add_row(name, used, f"{median[name] * 1e3:.1f}", f"{median['plain'] / median[name]:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
