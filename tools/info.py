"""Facts of a model: `python tools/info.py vig_s` (or `visionmix info vig_s`, with a tag: `agent_swin_base.in1k_384`).

Prints parameters, multiply-adds by op, activations, published figures, the licence of the weights and where they lie.
`--all` prints a row per model and tag, `--write` writes them to docs/models.md, and `--families README.md` puts a row a
family between the markers in that file.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionmix.backbones.contract import image_sides
from visionmix.models.family import family_of, list_family_models, published, variant_of, weights_of
from visionmix.models.weights import file_name
from visionmix.private_api import TorchDispatchMode, tree_leaves
from visionmix.scans import num_steps
from visionmix.tools import display

_BEGIN, _END = "<!-- models: written by tools/info.py -->", "<!-- /models -->"
_ROOT = Path(__file__).resolve().parent.parent
_GOLDENS, _MODELS = _ROOT / "tests" / "goldens", _ROOT / "docs" / "models.md"
_COLUMNS = (
    "model and tag",
    "image size",
    "parameters, M",
    "GMACs",
    "published parameters, M",
    "published GMACs",
    "published top-1, %",
    "licence",
    "weights",
    "equal to the published code at",
)
_ABOUT_MODELS = """# Models

`python tools/info.py --write` generates this page. `timm.create_model("vig_s.in1k", pretrained=True)` loads the weights
of a tag; a name without a tag means the first tag in its table. A tag with another image size builds the model at that
size, and a tag of 22k classes builds 21,841 outputs.

Parameters and GMACs (multiply-adds at the image size, fused ops by their formulas) are counted here; the published
columns repeat what the authors print. The licence is that of the weights. The last column lists the image sizes at
which the outputs equal those of the published code, to 1e-5 of the largest logit, for the same weights. Models with
re-parameterised batch norms, SG-Former, Vision-LSTM and `vir_base` are compared in float64, to 1e-6: with the weights
of the comparison activations grow, cells of nearly equal rank change places, or sums are divided by heads near zero,
until float32, the published code's too, has lost digits. The larger VANs are compared with fewer blocks.
"""
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
            x, _, delta_weight, A, _, _, D, _, _, orders, *_ = args
            for route, order in enumerate(orders.split(",")):
                steps = x.shape[0] * num_steps(order, x.shape[1], x.shape[2])
                self._add(op, steps, A[route], D, None if delta_weight is None else delta_weight[route])
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
    return model, (channels, img_size or height, img_size or width)


def _families() -> dict[str, list[str]]:
    """Return the names of every family's published models by the family's module, in the order of registration."""
    names: dict[str, list[str]] = {}
    for name in list_family_models():
        if not name.startswith("test_"):
            names.setdefault(family_of(name).module, []).append(name)
    return names


def _tagged(name: str) -> list[str]:
    """Return the model's name with each tag that it has weights of, or alone where it has none."""
    return [f"{name}.{tag}" for tag in variant_of(name).weights] or [name]


def _file(name: str) -> str:
    """Return the file's name of the published weights of `name`, in Markdown with its address."""
    weights = weights_of(name)
    if not weights.address:
        return "none"
    file = weights.file or (file_name(weights.url) or "file" if weights.url else "page")
    return f"[{file}]({weights.address})"


def _equality(name: str) -> str:
    """Return the image sizes at which the model's outputs are compared with those of the published code."""
    built = image_sides(variant_of(name).layout.options.get("img_size", 224))
    sizes = []
    for path in sorted(_GOLDENS.glob(f"{name}*.npz")):
        stem, _, size = path.stem.partition("__")
        if stem == name:
            sizes.append(size or _size_of(path, built))
    return ", ".join(sizes) or "not compared"


def _size_of(golden: Path, built: tuple[int, int]) -> str:
    with np.load(golden) as file:
        height, width = json.loads(str(file["meta"]))["image_size"]
    return "built size" if (height, width) == built else f"{height}x{width}"


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
    table.add_row("licence of the weights", facts.license)
    table.add_row("weights", " at ".join(filter(None, [weights.file, weights.address])) or "none")
    table.add_row("with tags", ", ".join(_tagged(name.partition(".")[0])))
    console.print(table)


def _claim(value: float | None, unit: str) -> str:
    return "" if value is None else f" (published: {value:g} {unit})".replace(" )", ")")


def published_columns(name: str) -> list[str]:
    """Return the published facts of the model or tag called `name` for its row of `markdown`."""
    facts, weights = published(name), weights_of(name)
    size = weights.input_size or variant_of(name).layout.options.get("img_size", 224)
    claims = [facts.params, facts.gmacs, facts.top1]
    compared = _equality(name.partition(".")[0])
    return [
        str(size),
        *("" if claim is None else f"{claim:g}" for claim in claims),
        facts.license,
        _file(name),
        compared,
    ]


def markdown() -> str:
    """Return every family's table of models, in Markdown: a row for each model and tag."""
    parts = [_ABOUT_MODELS]
    for module, names in _families().items():
        title, _, rest = (sys.modules[module].__doc__ or "").strip().partition("\n")
        about = " ".join(rest.split("\n\n")[0].split())
        parts.append(f"## {title.rstrip('.')}\n\n{about}\n")
        rows = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
        for tag in [tag for name in names for tag in _tagged(name)]:
            cost = measure(*_build(tag, None))
            counted = [f"{cost.params / 1e6:.2f}", f"{sum(cost.macs.values()) / 1e9:.2f}"]
            size, *claims = published_columns(tag)
            rows.append(f"| {' | '.join([f'`{tag}`', size, *counted, *claims])} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def family_rows() -> str:
    """Return a table with a row per family, in Markdown: what it is, its sizes, best accuracy, licence and paper."""
    rows = [
        "| family | token mixing | parameters, M | best ImageNet top-1 | licence of the weights | paper |",
        f"|{' --- |' * 6}",
    ]
    for module, names in _families().items():
        family, about = family_title(module)
        facts = [published(tag) for name in names for tag in _tagged(name)]
        with torch.device("meta"):
            sizes = [sum(value.numel() for value in timm.create_model(name).parameters()) for name in names]
        span = " to ".join(dict.fromkeys(f"{size / 1e6:.0f}" for size in (min(sizes), max(sizes))))
        best = max((fact.top1 for fact in facts if fact.top1 is not None), default=None)
        licences = ", ".join(sorted({fact.license for fact in facts}))
        papers = ", ".join(_paper_link(paper) for paper in sorted({fact.paper for fact in facts}))
        rows.append(f"| {family} | {about} | {span} | {'none' if best is None else best} | {licences} | {papers} |")
    return "\n".join(rows)


def family_title(module: str) -> tuple[str, str]:
    """Return the family's name and what mixes its tokens, from the first line of its module's docstring."""
    title = (sys.modules[module].__doc__ or "").strip().partition("\n")[0].rstrip(".")
    family, _, about = title.partition(": ")
    return family, about


def _paper_link(paper: str) -> str:
    number = paper.removeprefix("arXiv ")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != paper else paper


def write_models(path: Path) -> None:
    """Write `markdown` to `path`."""
    _write_aside(path, markdown())


def write_families(path: Path) -> None:
    """Put `family_rows` between the markers in `path`.

    Raises:
        ValueError: `path` has no such markers.
    """
    text = path.read_text()
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"{path} has no table of models; put the lines {_BEGIN} and {_END} where it should stand")
    head, rest = text.split(_BEGIN, 1)
    _write_aside(path, f"{head}{_BEGIN}\n\n{family_rows()}\n\n{_END}{rest.split(_END, 1)[1]}")


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(text)
    aside.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(prog="visionmix info", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="names of models; see timm.list_models after importing visionmix")
    parser.add_argument("--img-size", type=int, help="count at this size, in pixels per side, instead of the built one")
    parser.add_argument("--all", action="store_true", help="print a row for every model and tag, as Markdown")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=_MODELS, metavar="FILE", help="write those rows to FILE: docs/models.md"
    )
    parser.add_argument("--families", type=Path, metavar="FILE", help="put a row per family between FILE's markers")
    args = parser.parse_args(argv)
    if not (args.model or args.all or args.write or args.families):
        parser.error("name a model, or give --all")
    console = display.table_console()
    try:
        for name in args.model:
            show(name, args.img_size, console)
        if args.write:
            write_models(args.write)
        if args.families:
            write_families(args.families)
    except ValueError as error:
        parser.error(str(error))
    if args.all:
        print(markdown())


if __name__ == "__main__":
    main()
