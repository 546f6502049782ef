"""Facts of a model: `python tools/info.py vig_s` (or `visionmix info vig_s`, with a tag: `agent_swin_base.in1k_384`).

Prints parameters, multiply-adds by op, activations, published figures, the licence of the weights and where they lie.
In a clone, `--write` counts every model anew and writes benchmarks/costs.csv, docs/models.md and the cards in
docs/models/, which takes minutes; `--pages` writes the pages from the counts that are there, in seconds; and
`--families README.md` puts a row per family between the markers in that file.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionmix.models.family import published, weights_of
from visionmix.private_api import TorchDispatchMode, tree_leaves
from visionmix.scans import num_steps
from visionmix.tools import display, model_facts, model_pages
from visionmix.tools.arguments import check_least

_COUNTED = ("aten.convolution", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")


@dataclass(frozen=True)
class Cost:
    """The cost of a forward pass of one image.

    Attributes:
        params: Parameters.
        macs: Multiply-adds by op: half of what each op's FLOP formula gives, but for selective scans, which count
            9 x length x channels x states, and length x channels for D, as their papers do.
        activations: Elements of the outputs of convolutions, matrix products and fused ops.
    """

    params: int
    macs: dict[str, float]
    activations: int


class _Counter(TorchDispatchMode):
    """Counts activations, and selective scans by the convention of their papers."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0
        self.scans: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = str(func).rsplit(".", 1)[0]
        if op.startswith("visionmix.") or op in _COUNTED:
            self.activations += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        if op == "visionmix.selective_scan":
            u, _, A, _, _, D, *_ = args
            self._add(op, u.shape[0] * u.shape[2], A, D)
        elif op == "visionmix.selective_scan_2d":
            x, _, delta_weight, A, _, _, D, _, _, orders, *rest = args
            cells = rest[5] if len(rest) > 5 else None
            for route in range(len(A)):
                steps = num_steps(orders.split(",")[route], *x.shape[1:3]) if cells is None else cells.shape[2]
                self._add(op, x.shape[0] * steps, A[route], D, None if delta_weight is None else delta_weight[route])
        return out

    def _add(self, op: str, steps: int, A: Tensor, D: Tensor | None, delta_weight: Tensor | None = None) -> None:
        """Add 9 per step, channel and state, 1 per step and channel for D, and the product that widens a low-rank
        delta."""
        products = 0 if delta_weight is None else delta_weight.numel()
        skip = 0 if D is None else A.shape[0]
        self.scans[op] = self.scans.get(op, 0) + steps * (9 * A.numel() + skip + products)


def measure(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Return what a forward pass of one image of `input_size` (channels, height, width) costs, without running it.

    A model whose shapes depend on the image (token reduction by "ats" or "algm") is run on noise.
    """
    counted = _count(copy.deepcopy(model).to("meta"), torch.empty(1, *input_size, device="meta"))
    if counted is None:
        noise = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
        with sdpa_kernel(SDPBackend.MATH):  # whose products are counted, where those of a CPU's fused kernel are not
            counted = _count(model, noise.to(next(model.parameters())))
    assert counted is not None
    return counted


def _count(model: nn.Module, images: Tensor) -> Cost | None:
    """Return the cost of a pass over `images`, or None where tensors on the meta device lack the values it needs."""
    flops, counter = FlopCounterMode(display=False), _Counter()
    try:
        with torch.no_grad(), flops, counter:
            model.eval()(images)
    except (NotImplementedError, RuntimeError) as error:
        if images.is_meta and "meta" in str(error).lower():
            return None
        raise
    macs = {str(op): count / 2 for op, count in flops.get_flop_counts()["Global"].items()}
    return Cost(sum(value.numel() for value in model.parameters()), macs | counter.scans, counter.activations)


def _build(name: str, img_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.device("meta"):
        model = timm.create_model(name)
    channels, height, width = model.default_cfg["input_size"]
    return model, (channels, height if img_size is None else img_size, width if img_size is None else img_size)


def show(name: str, img_size: int | None, console: Console) -> None:
    """Print one model."""
    facts, weights = published(name), weights_of(name)
    model, size = _build(name, img_size)
    cost = measure(model, size)
    table = Table(title=f"{name} at {size[1]}x{size[2]}", show_header=False)
    table.add_row("parameters", f"{cost.params / 1e6:.2f} M" + _claim(facts.params, "M"))
    table.add_row("GMACs", f"{sum(cost.macs.values()) / 1e9:.2f}" + _claim(facts.gmacs, ""))
    for op, macs in sorted(cost.macs.items(), key=lambda item: -item[1]):
        table.add_row(f"  {op}", f"{macs / 1e9:.3f}")
    table.add_row("activations", f"{cost.activations / 1e6:.2f} M")
    table.add_row("published top-1", "none" if facts.top1 is None else f"{facts.top1} %")
    table.add_row("paper", facts.paper)
    table.add_row("licence of the weights", model_facts.licence(name))
    table.add_row("weights", " at ".join(filter(None, [weights.file, weights.address])) or "none")
    table.add_row("with tags", ", ".join(model_facts.tagged(name.partition(".")[0])))
    console.print(table)


def _claim(value: float | None, unit: str) -> str:
    return "" if value is None else f" (published: {value:g} {unit})".replace(" )", ")")


def count(name: str) -> model_facts.Counted:
    """Return what a forward pass of the model or tag called `name` costs at its own size."""
    cost = measure(*_build(name, None))
    ops = sorted(op.removeprefix("visionmix.") for op in cost.macs if op.startswith("visionmix."))
    return model_facts.Counted(f"{cost.params / 1e6:.2f}", f"{sum(cost.macs.values()) / 1e9:.2f}", " ".join(ops))


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(prog="visionmix info", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="names of models; see timm.list_models after importing visionmix")
    parser.add_argument("--img-size", type=int, help="count at this size, in pixels per side, instead of the built one")
    parser.add_argument("--write", action="store_true", help="count every model and write the pages of a clone's docs/")
    parser.add_argument("--pages", action="store_true", help="write the pages from the counts that are there")
    parser.add_argument("--families", type=Path, metavar="FILE", help="put a row per family between FILE's markers")
    args = parser.parse_args(argv)
    if not (args.model or args.write or args.pages or args.families):
        parser.error("name a model")
    console = display.table_console()
    try:
        check_least(1, img_size=args.img_size)
        for name in args.model:
            show(name, args.img_size, console)
        if args.write:
            model_facts.write_costs(count)
        if args.write or args.pages:
            model_pages.write(model_pages.FOLDER)
        if args.families:
            model_pages.write_families(args.families)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
