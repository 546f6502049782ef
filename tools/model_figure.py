"""A model drawn from its layers: its stages with the shapes of their maps, and what each kind of block computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

import torch
from torch import Tensor, nn

from visionmix.backbones.block import Residual
from visionmix.mixers.registry import is_mixer

_WIDTH, _ROW, _LINE_HEIGHT, _GAP, _EDGE = 420, 28, 18, 10, 14
_CHARACTER = 6.6  # width in pixels, at most, of most characters at a font size of 12
_COLOURS = {"mixer": "#c7d2fe", "plain": "#f4f4f5", "stage": "#e0f2fe", "sum": "#fef3c7"}
_LINE = "#52525b"


@dataclass
class _Seen:
    """What a forward pass shows: shapes by the name of a stage, a block's parts in the order of their calls."""

    shapes: dict[str, str] = field(default_factory=dict)
    calls: dict[str, list[str]] = field(default_factory=dict)


def figure(model: nn.Module, input_size: Sequence[int]) -> str:
    """Return a picture of `model`, as SVG, for images of `input_size` (channels, height, width).

    The model runs on tensors without data.
    """
    stages = _stages(model)
    seen = _run(model, input_size, stages)
    picture = _Picture()
    for name, blocks in stages.items():
        text = _summary(blocks) if blocks else _name(model.get_submodule(name))
        picture.stage(name.removeprefix("stages."), text, seen.shapes.get(name, ""))
    kinds: dict[tuple, nn.Module] = {}
    for name, block in ((block_name, block) for blocks in stages.values() for block_name, block in blocks.items()):
        parts = [(part, block.get_submodule(part)) for part in seen.calls.get(name, ())]
        rows = _branches(parts)
        kinds.setdefault((_kind(block), tuple(map(tuple, rows))), rows)
    for (kind, _), rows in kinds.items():
        picture.block(kind, rows)
    return picture.text()


def _stages(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Return the stem, each stage with its blocks by name, and the head."""
    stages: dict[str, dict[str, nn.Module]] = {}
    for name, part in model.named_children():
        if name == "stages":
            for index, stage in enumerate(part):
                prefix = f"stages.{index}"
                stages[prefix] = {f"{prefix}.{inner}": block for inner, block in _blocks(stage)}
        elif name == "blocks":
            stages[name] = {f"blocks.{index}": block for index, block in enumerate(part)}
        elif name in ("stem", "neck", "head"):
            stages[name] = {}
    return stages


def _blocks(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules of a stage that close a branch by a `Residual` or hold a mixer of their own."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in stage.named_modules():
        inside = any(name == outer or name.startswith(f"{outer}.") for outer, _ in found)
        parts = list(module.children())
        if name and not inside and any(isinstance(part, Residual) or is_mixer(part) for part in parts):
            found.append((name, module))
    return found


def _run(model: nn.Module, input_size: Sequence[int], stages: dict[str, dict[str, nn.Module]]) -> _Seen:
    seen, handles = _Seen(), []

    def shape_of(name: str):
        def hook(_, inputs, output) -> None:
            seen.shapes[name] = _shown_shape(output)

        return hook

    def call_of(block: str, part: str):
        def hook(*_) -> None:
            calls = seen.calls.setdefault(block, [])
            if calls[-1:] != [part]:
                calls.append(part)

        return hook

    for name, blocks in stages.items():
        handles.append(model.get_submodule(name).register_forward_hook(shape_of(name)) if name != "blocks" else None)
        last = list(blocks)[-1:] if name == "blocks" else []
        handles += [model.get_submodule(block).register_forward_hook(shape_of(name)) for block in last]
        for block_name, block in blocks.items():
            for part, module in block.named_children():
                # Some blocks call a part by another method than `forward`: what it holds shows when.
                handles += [inner.register_forward_pre_hook(call_of(block_name, part)) for inner in module.modules()]
    with torch.no_grad():
        model.to("meta").eval()(torch.empty(1, *input_size, device="meta"))
    for handle in handles:
        if handle is not None:
            handle.remove()
    return seen


def _shown_shape(output) -> str:
    """Return the axes of the first map in `output`, without the batch; of maps side by side, those of each."""
    if isinstance(output, Tensor):
        return " x ".join(map(str, output.shape[1:]))
    if isinstance(output, tuple):  # (map, tensors for later stages)
        return _shown_shape(output[0]) if output else ""
    if isinstance(output, list):
        return ", ".join(filter(None, map(_shown_shape, output)))
    return ""


def _name(module: nn.Module) -> str:
    return type(module).__name__.lstrip("_")


def _kind(block: nn.Module) -> str:
    """Return the name of the block's mixer, else of its class."""
    mixers = [module for module in block.modules() if is_mixer(module)]
    return _name(mixers[0]) if mixers else _name(block)


def _summary(blocks: dict[str, nn.Module]) -> str:
    kinds = [_kind(block) for block in blocks.values()]
    half = len(kinds) // 2
    if len(set(kinds)) == 2 and len(kinds) == 2 * half and kinds == kinds[:2] * half:
        return f"{half} x ({kinds[0]}, {kinds[1]})"
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return ", ".join(f"{count} x {kind}" for kind, count in runs)


def _branches(parts: list[tuple[str, nn.Module]]) -> list[list[tuple[str, str]]]:
    """Return the parts of a block as rows of (label, colour); a row ends where a branch is added."""
    rows: list[list[tuple[str, str]]] = [[]]
    for name, module in parts:
        if isinstance(module, Residual):
            rows[-1].append(("+", "sum"))
            rows.append([])
        elif not isinstance(module, nn.Identity):
            label = name if isinstance(module, nn.Sequential | nn.ModuleList) else _name(module)
            rows[-1].append((label, "mixer" if is_mixer(module) else "plain"))
    return [row for row in rows if row]


class _Picture:
    """Boxes from top to bottom."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = _EDGE

    def stage(self, name: str, text: str, shape: str) -> None:
        """Add a wide box: the stage's number or name, what it holds, and the shape behind it."""
        label = f"stage {int(name) + 1}" if name.isdigit() else name
        self._box(_EDGE, _WIDTH - 2 * _EDGE, "stage", 2 * _LINE_HEIGHT + 10)
        self._text(_EDGE + 10, label, "start", "bold")
        self._text(_WIDTH - _EDGE - 10, _cut(shape, 54), "end")
        self.y += _LINE_HEIGHT
        self._text(_EDGE + 10, _cut(text, 60), "start")
        self.y += _LINE_HEIGHT + 14

    def block(self, kind: str, rows: list[list[tuple[str, str]]]) -> None:
        """Add what a block computes, a line per branch."""
        self.y += _GAP
        self._text(_EDGE, f"a block of {kind}", "start", "bold")
        self.y += _ROW
        for row in rows:
            x = _EDGE
            for index, (label, colour) in enumerate(row):
                width = max(26.0, len(label) * _CHARACTER + 16)
                if x + width > _WIDTH - _EDGE:
                    x, self.y = _EDGE + 26, self.y + _ROW + 6
                self._box(x, width, colour)
                self._text(x + width / 2, label, "middle")
                x += width
                if index + 1 < len(row):
                    middle = self.y + _ROW / 2
                    self.parts.append(f'<path d="M{x:g} {middle:g}h14" stroke="{_LINE}" marker-end="url(#a)"/>')
                    x += 20
            self.y += _ROW + 8

    def _box(self, x: float, width: float, colour: str, height: float = _ROW) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{self.y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{_COLOURS[colour]}"/>'
        )

    def _text(self, x: float, text: str, anchor: str, weight: str = "normal") -> None:
        y = self.y + _ROW / 2 + 4
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
        )

    def text(self) -> str:
        """Return the SVG."""
        height = self.y + _EDGE
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" '
            f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#18181b">'
        )
        arrow = (
            '<defs><marker id="a" viewBox="0 0 6 6" refX="3" refY="3" markerWidth="6" markerHeight="6">'
            f'<path d="M0 0L6 3L0 6z" fill="{_LINE}"/></marker></defs>'
        )
        ground = f'<rect width="{_WIDTH}" height="{height:g}" rx="8" fill="white"/>'
        return "\n".join([head, arrow, ground, *self.parts, "</svg>"]) + "\n"


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
