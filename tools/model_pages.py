"""The pages about models: docs/models.md, a card and a figure for each family in docs/models/, the README's table."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import timm
import torch

from visionmix.models.family import family_of, published, variant_of, weights_of
from visionmix.models.weights import file_name
from visionmix.tools import model_facts, model_figure
from visionmix.tools.model_facts import Comparison, Counted

FOLDER = model_facts.ROOT / "docs"
BEGIN, END = "<!-- models: written by tools/info.py -->", "<!-- /models -->"

_INDEX = """# Models

`python tools/info.py --write` generates this page and the card of each family. `timm.create_model("vig_s.in1k",
pretrained=True)` loads the weights of a tag; a name without a tag means the first tag in its table. A tag with another
image size builds the model at that size, and a tag of 22k classes builds 21,841 outputs.

Parameters and GMACs (thousands of millions of multiply-adds at the image size, fused ops by their formulas) are counted
here; top-1 is ImageNet accuracy as the authors publish it. The licence is that of the weights: "unknown" where
their authors state none, "no weights" where none are known. No address of weights has been tried.

## How equality is checked

A family's card lists where its outputs were compared with those of the published code. Both get the same image and the
same weights, made by a rule that fills every key of the published checkpoint. The largest difference is at most 1e-5 of
the largest logit, in float32. Models with re-parameterised batch norms, SG-Former, Vision-LSTM and `vir_base` are
compared in float64, to 1e-6: with the weights of the comparison activations grow, cells of nearly equal rank change
places, or sums are divided by heads near zero, until float32, the published code's too, has lost digits. Two of them,
`pvt_tiny_prepbn` and a shallower `slab_swin_tiny`, are held to 1e-4 and 2e-4 in float32. The larger VANs are compared
with fewer blocks. A model that no card lists as compared is not claimed to be equal.
"""
_FAMILY_HEAD = ("family", "token mixing", "parameters, M", "best top-1", "licence of weights")
_ALL_HEAD = ("model and tag", "pixels", "parameters, M", "GMACs", "top-1", "licence")
_MODEL_HEAD = (
    *("model and tag", "pixels", "parameters, M (published)", "GMACs (published)", "published top-1, %"),
    *("licence", "weights"),
)
_CELL, _LINE = 40, 200  # characters of an option's value in a table and in a list
_MEASURED_HEAD = ("model", "pass", "pixels", "batch", "median, ms", "runs", "date")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def family_table(costs: Mapping[str, Counted], cards: str) -> str:
    """Return a table with a row per family; `cards` is the path of the folder with the cards."""
    rows = []
    for module, names in model_facts.families().items():
        family, about = model_facts.family_title(module)
        sizes = [float(costs[tag].params_m) for name in names for tag in model_facts.tagged(name)[:1]]
        span = " to ".join(dict.fromkeys(f"{size:.0f}" for size in (min(sizes), max(sizes))))
        best = model_facts.best_top1(names)
        link = f"[{family}]({cards}/{stem(module)}.md)"
        rows.append([link, about, span, "none" if best is None else str(best), model_facts.licences(names)])
    return table(_FAMILY_HEAD, rows)


def stem(module: str) -> str:
    """Return the name of the card of the family in `module`, without its ending."""
    return module.rpartition(".")[2]


def index(costs: Mapping[str, Counted]) -> str:
    """Return docs/models.md: the families, then every model and tag."""
    rows = []
    for tag in [tag for names in model_facts.families().values() for name in names for tag in model_facts.tagged(name)]:
        facts, cost = published(tag), costs[tag]
        top1 = "none" if facts.top1 is None else str(facts.top1)
        rows.append([f"`{tag}`", _pixels(tag), cost.params_m, cost.gmacs, top1, model_facts.licence(tag)])
    parts = ["## Families", family_table(costs, "models"), "## Every model", table(_ALL_HEAD, rows)]
    return "\n\n".join([_INDEX.rstrip(), *parts]) + "\n"


def card(module: str, costs: Mapping[str, Counted]) -> str:
    """Return the card of the family in `module`."""
    names = model_facts.families()[module]
    family, about = model_facts.family_title(module)
    rows = [_model_row(tag, costs[tag]) for name in names for tag in model_facts.tagged(name)]
    parts = [
        f"# {family}",
        f"{about[:1].upper()}{about[1:]}.",
        model_facts.family_text(module),
        f"![Layers of {names[0]}]({stem(module)}.svg)",
        f"The stages of `{names[0]}` with the shape after each, and the parts of its blocks.",
        "## Sizes, weights and accuracy",
        table(_MODEL_HEAD, rows),
        _ops(names, costs),
        "## Options",
        _options(names),
        "## Measured times",
        _measured(names),
        "## Compared with the published code",
        _compared(names),
        "## Citation",
        _citation(names),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _model_row(tag: str, cost: Counted) -> list[str]:
    facts = published(tag)
    sizes = [f"{ours}{_claim(theirs)}" for ours, theirs in ((cost.params_m, facts.params), (cost.gmacs, facts.gmacs))]
    top1 = "none" if facts.top1 is None else str(facts.top1)
    return [f"`{tag}`", _pixels(tag), *sizes, top1, model_facts.licence(tag), _file(tag)]


def _claim(value: float | None) -> str:
    return "" if value is None else f" ({value:g})"


def _pixels(tag: str) -> str:
    size = weights_of(tag).input_size or variant_of(tag).layout.options.get("img_size", 224)
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _file(name: str) -> str:
    """Return the file's name of the published weights of `name`, in Markdown with its address."""
    weights = weights_of(name)
    if not weights.address:
        return "none"
    file = weights.file or (file_name(weights.url) or "file" if weights.url else "page")
    return f"[{file}]({weights.address})"


def _ops(names: Sequence[str], costs: Mapping[str, Counted]) -> str:
    ops = sorted({op for name in names for tag in model_facts.tagged(name) for op in costs[tag].ops.split()})
    if not ops:
        return "These models call no fused op of this library: they are made of PyTorch's own layers."
    called = ", ".join(f"`{op}`" for op in ops)
    return f"Fused ops that these models call: {called} ([kernels](../kernels.md))."


def _options(names: Sequence[str]) -> str:
    """Return the options of the family's models, in Markdown: those that differ as a table, the others as a list."""
    options = {name: variant_of(name).layout.options for name in names}
    keys = list(dict.fromkeys(key for each in options.values() for key in each))
    text = model_facts.option_text
    shown = {key: [text(each[key]) if key in each else "" for each in options.values()] for key in keys}
    long = [key for key in keys if max(map(len, shown[key])) > (_CELL if len(set(shown[key])) > 1 else _LINE)]
    differ = [key for key in keys if len(set(shown[key])) > 1 and key not in long]
    same = [f"- `{key}`: {shown[key][0]}" for key in keys if key not in differ and key not in long]
    skeleton = variant_of(names[0]).layout.skeleton.__name__.lstrip("_")
    example = f'timm.create_model("{names[0]}", drop_path_rate=0.2)'
    parts = [f"The skeleton is `{skeleton}`. An option given by keyword replaces the one here: `{example}`."]
    if differ:
        rows = [[f"`{name}`", *(shown[key][row] for key in differ)] for row, name in enumerate(names)]
        parts.append(table(["model", *(f"`{key}`" for key in differ)], rows))
    parts.append("\n".join(same))
    if long:
        file = f"visionmix/models/{stem(family_of(names[0]).module)}.py"
        parts.append(f"Options too long to show stand in `{file}`: {', '.join(f'`{key}`' for key in long)}.")
    return "\n\n".join(filter(None, parts))


def _measured(names: Sequence[str]) -> str:
    rows, machines = [], {}
    grouping = ("model", "pass", "img_size", "batch", "threads", "device")
    for key, group in groupby(model_facts.measured(names), key=lambda row: tuple(row[each] for each in grouping)):
        model, kind, pixels, batch, threads, device = key
        runs = [(row["date"], row["torch"], float(row["p50_ms"])) for row in group]
        date, version, _ = runs[-1]
        medians = [median for *day, median in runs if day == [date, version]]
        span = " to ".join(dict.fromkeys(f"{each:.4g}" for each in (min(medians), max(medians))))
        rows.append([f"`{model}`", kind, pixels, batch, span, str(len(medians)), date])
        machines[f"{device} ({threads} threads, torch {version.partition('+')[0]})"] = None
    if not rows:
        return "None of these models has been timed here; `visionmix benchmark` times them on your machine."
    about = (
        f"Medians in float32 of one run, or the least and the largest median of several, on {' and '.join(machines)}. "
        "[Performance](../performance.md) has the conditions, and other models beside them."
    )
    return f"{about}\n\n{table(_MEASURED_HEAD, rows)}"


def _compared(names: Sequence[str]) -> str:
    rows = [[f"`{name}`", *_comparison(each)] for name in names for each in model_facts.comparisons(name)]
    left = [name for name in names if not model_facts.comparisons(name)]
    parts = []
    if rows:
        parts.append("Outputs agree within the bounds that [models](../models.md#how-equality-is-checked) states.")
        parts.append(table(("model", "image", "published code", "built there by"), rows))
    if left:
        parts.append(f"Not compared: {', '.join(f'`{name}`' for name in left)}.")
    return "\n\n".join(parts)


def _comparison(made: Comparison) -> list[str]:
    image = f"{made.height}x{made.width}" + (f", {made.depths} blocks" if made.depths else "")
    repository, _, remark = made.repository.partition(" ")
    link = f"[{repository}](https://github.com/{repository}"
    link += f"/tree/{made.commit}) at {made.commit[:7]}" if made.commit else ")"
    return [image, f"{link} {remark}".rstrip(), f"`{made.entry}`".replace("|", "\\|")]


def _citation(names: Sequence[str]) -> str:
    papers = sorted({published(tag).paper for name in names for tag in model_facts.tagged(name)})
    lines = []
    for paper in papers:
        number = paper.removeprefix("arXiv ")
        cited = f"[{paper}](https://arxiv.org/abs/{number}) ([BibTeX](https://arxiv.org/bibtex/{number}))"
        lines.append(f"- {cited if number != paper else paper[:1].upper() + paper[1:]}")
    return "\n".join(lines)


def draw(module: str) -> str:
    """Return the figure of the family's first model, as SVG."""
    (name, *_) = model_facts.families()[module]
    with torch.device("meta"):
        model = timm.create_model(name)
    return model_figure.figure(model, model.default_cfg["input_size"])


def write(folder: Path) -> None:
    """Write the index, the cards and the figures below `folder`, and delete cards of families that are no more."""
    costs = model_facts.read_costs()
    files = {folder / "models.md": index(costs)}
    for module in model_facts.families():
        files[folder / "models" / f"{stem(module)}.md"] = card(module, costs)
        files[folder / "models" / f"{stem(module)}.svg"] = draw(module)
    for path, text in files.items():
        model_facts.write_text(path, text)
    for path in (folder / "models").iterdir():
        if path not in files:
            path.unlink()


def write_families(path: Path) -> None:
    """Put the table of families between the markers in `path`, a file at the root of the repository.

    Raises:
        ValueError: `path` has no such markers.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no table of models; put the lines {BEGIN} and {END} where it should stand")
    head, rest = text.split(BEGIN, 1)
    rows = family_table(model_facts.read_costs(), "docs/models")
    model_facts.write_text(path, f"{head}{BEGIN}\n\n{rows}\n\n{END}{rest.split(END, 1)[1]}")
