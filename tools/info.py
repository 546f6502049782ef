"""What a model is: `python tools/info.py vig_s` (or `visionmix info vig_s`).

Prints parameters, multiply-adds by op, activations, what its paper claims, the licence of its weights and where they
lie.
`--all` prints a row a model, `--write README.md` puts those rows into the file's table of models.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from visionmix.models.family import Family, family_of, list_family_models
from visionmix.models.weights import weights_file
from visionmix.scans import num_steps
from visionmix.tools import display

_BEGIN, _END = "<!-- models: written by tools/info.py -->", "<!-- /models -->"
_GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
_COUNTED = ("aten.convolution", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")


@dataclass(frozen=True)
class Cost:
    """What a forward pass of one image takes.

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
            x, _, delta_weight, A, _, _, D, _, _, orders, *_ = args
            for route, order in enumerate(orders.split(",")):
                steps = x.shape[0] * num_steps(order, x.shape[1], x.shape[2])
                self._add(op, steps, A[route], D, None if delta_weight is None else delta_weight[route])
        return out

    def _add(self, op: str, steps: int, A: Tensor, D: Tensor | None, delta_weight: Tensor | None = None) -> None:
        """Add 9 a step, channel and state, 1 a step and channel for D, and the product that widens a low-rank delta."""
        products = 0 if delta_weight is None else delta_weight.numel()
        skip = 0 if D is None else A.shape[0]
        self.scans[op] = self.scans.get(op, 0) + steps * (9 * A.numel() + skip + products)


def measure(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Return what a forward pass of one image of `input_size` (channels, height, width) costs, without running it."""
    model = model.to("meta").eval()
    image = torch.empty(1, *input_size, device="meta")
    flops, counter = FlopCounterMode(display=False), _Counter()
    with torch.no_grad(), flops, counter:
        model(image)
    macs = {str(op): count / 2 for op, count in flops.get_flop_counts()["Global"].items()}
    return Cost(sum(value.numel() for value in model.parameters()), macs | counter.scans, counter.activations)


def _build(name: str, img_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.device("meta"):
        model = timm.create_model(name)
    channels, height, width = model.default_cfg["input_size"]
    return model, (channels, img_size or height, img_size or width)


def _weights(family: Family, name: str) -> tuple[str, str]:
    """Return the name and the address of the published weights."""
    variant = family.variants[name]
    if "hf_hub_id" in variant.weights:
        return variant.weights["hf_hub_filename"], f"https://huggingface.co/{variant.weights['hf_hub_id']}"
    if "url" in variant.weights:
        return weights_file(variant.weights["url"], name), variant.weights["url"]
    return ("page", variant.page) if variant.page else ("none", "")


def _equality(name: str) -> str:
    sizes = [path.stem.partition("__")[2] or "built size" for path in sorted(_GOLDENS.glob(f"{name}*.npz"))
             if path.stem.partition("__")[0] == name]  # fmt: skip
    return ", ".join(sizes) or "not compared"


def show(name: str, img_size: int | None, console: Console) -> None:
    """Print one model."""
    family = family_of(name)
    published = family.variants[name].published
    model, size = _build(name, img_size)
    cost = measure(model, size)
    table = Table(title=f"{name} at {size[1]}x{size[2]}", show_header=False)
    table.add_row("parameters", f"{cost.params / 1e6:.2f} M" + _claim(published.params, "M"))
    table.add_row("GMACs", f"{sum(cost.macs.values()) / 1e9:.2f}" + _claim(published.gmacs, ""))
    for op, macs in sorted(cost.macs.items(), key=lambda item: -item[1]):
        table.add_row(f"  {op}", f"{macs / 1e9:.3f}")
    table.add_row("activations", f"{cost.activations / 1e6:.2f} M")
    table.add_row("published top-1", "none" if published.top1 is None else f"{published.top1} %")
    table.add_row("paper", family.paper)
    table.add_row("licence of the weights", family.license)
    table.add_row("weights", " at ".join(filter(None, _weights(family, name))))
    console.print(table)


def _claim(value: float | None, unit: str) -> str:
    return "" if value is None else f" (published: {value:g} {unit})".replace(" )", ")")


def markdown() -> str:
    """Return the table of all published models, in Markdown."""
    rows = ["| model | parameters, M | GMACs | ImageNet top-1, published | licence of the weights | weights | equal to "
            "the published code at |", "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in list_family_models():
        if name.startswith("test_"):
            continue
        family = family_of(name)
        cost = measure(*_build(name, None))
        top1 = family.variants[name].published.top1
        file, address = _weights(family, name)
        rows.append(
            f"| `{name}` | {cost.params / 1e6:.2f} | {sum(cost.macs.values()) / 1e9:.2f} | {top1 or 'none'} | "
            f"{family.license} | {f'[{file}]({address})' if address else file} | {_equality(name)} |"
        )
    return "\n".join(rows)


def write_table(path: Path) -> None:
    """Replace the table of models between its markers in `path`.

    Raises:
        ValueError: `path` has no such markers.
    """
    text = path.read_text()
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"{path} has no table of models; put the lines {_BEGIN} and {_END} where it should stand")
    head, rest = text.split(_BEGIN, 1)
    aside = path.with_name(path.name + ".new")
    aside.write_text(f"{head}{_BEGIN}\n\n{markdown()}\n\n{_END}{rest.split(_END, 1)[1]}")
    aside.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(prog="visionmix info", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="names of models; see timm.list_models after importing visionmix")
    parser.add_argument("--img-size", type=int, help="count at this size, in pixels a side, instead of the built one")
    parser.add_argument("--all", action="store_true", help="print a row for every model, as Markdown")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put those rows between the markers in FILE")
    args = parser.parse_args(argv)
    if not (args.model or args.all or args.write):
        parser.error("name a model, or give --all")
    console = display.table_console()
    try:
        for name in args.model:
            show(name, args.img_size, console)
        if args.write:
            write_table(args.write)
    except ValueError as error:
        parser.error(str(error))
    if args.all:
        print(markdown())


if __name__ == "__main__":
    main()
