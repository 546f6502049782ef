"""Which cells or pixels an output depends on: rows of attention, and effective receptive fields."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionmix.mixers.registry import is_mixer
from visionmix.mixers.softmax import Attention

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Parts of the gradient, after RepLKNet's table."""
_PROBES = 32


@dataclass
class _Call:
    """What a mixer was called with and what it gave, still in the graph of the pass."""

    source: Tensor
    result: Tensor
    values: Tensor | None = None
    attended: Tensor | None = None
    grid: Any = None


@dataclass
class Row:
    """What one cell's result in a mixer depends on.

    Attributes:
        layer: Name of the mixer's module in the model.
        weights: (rows, columns), not negative, with sum 1: a share for each cell of the map.
        query: Row and column of the cell.
        exact: Whether these are the weights that the mixer gives to values, or the sizes of derivatives.
    """

    layer: str
    weights: np.ndarray
    query: tuple[int, int]
    exact: bool


def mixer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the token mixers inside `model` by name, in order; none stands inside another.

    These are registered mixers, and the modules called `attn` of timm's models.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if is_mixer(module) or name.rpartition(".")[2] == "attn":
            found[name] = module
    return found


def chosen_layers(names: Sequence[str], wanted: int = 4) -> list[str]:
    """Return `wanted` of the names or fewer, at equal distances up to the last."""
    count = min(wanted, len(names))
    return [names[(at + 1) * len(names) // count - 1] for at in range(count)]


@contextmanager
def _followed(layers: dict[str, nn.Module], calls: dict[str, _Call]) -> Iterator[None]:
    """Note the calls of the mixers in `layers`, by whatever method a block calls them."""
    changed: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, method: str, function: Callable[..., Any]) -> None:
        changed.append((module, method))
        setattr(module, method, function)

    def follow(name: str, module: nn.Module, method: str) -> None:
        call = getattr(module, method)

        def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = call(x, *args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(x, Tensor) and isinstance(first, Tensor) and name not in calls:
                grid = next((value for value in args if hasattr(value, "prefix_positions")), None)
                calls[name] = _Call(x, first, *heads.get(name, (None, None)), grid=grid)
            return result

        replace(module, method, noted)

    heads: dict[str, tuple[Tensor, Tensor]] = {}

    def follow_attend(name: str, module: Attention) -> None:
        call = module.attend

        def noted(qk: Tensor, v: Tensor, height: int, width: int) -> Tensor:
            out = call(qk, v, height, width)
            heads[name] = (v, out)
            return out

        replace(module, "attend", noted)

    try:
        for name, module in layers.items():
            for method in ("forward", "forward_tokens", "forward_from"):
                if hasattr(module, method):
                    follow(name, module, method)
            if isinstance(module, Attention):
                follow_attend(name, module)
        yield
    finally:
        for module, method in changed:
            module.__dict__.pop(method, None)


def attention_rows(
    model: nn.Module, image: Tensor, query: tuple[float, float], layers: Sequence[str] | None = None
) -> list[Row]:
    """Return what one place of the image attends to in some of the model's mixers.

    Where a mixer's result is a weighted sum of values, as in softmax and linear attention, a share is the absolute
    weight of a cell's value, averaged over heads. Elsewhere, in recurrences and convolutions, it is the size of the
    derivative, ``sqrt(sum of squares of d out_query / d x_cell)`` over the channels of both, estimated from 32 random
    combinations of the result's channels.

    Args:
        model: In eval mode.
        image: Normalised (1, 3, height, width).
        query: Row and column as shares of height and width, from 0 up to 1.
        layers: Names of mixers, as `mixer_layers` has them; None for four at equal distances.

    Raises:
        ValueError: the model has no such mixers, or one is not called with a map or a sequence of its cells.
    """
    found = mixer_layers(model)
    if not found:
        raise ValueError(f"the model, a {type(model).__name__}, has no token mixers that are known here")
    names = chosen_layers(list(found)) if layers is None else list(layers)
    for name in names:
        if name not in found:
            raise ValueError(f"layer={name!r} is no token mixer of the model; it has {', '.join(found)}")
    calls: dict[str, _Call] = {}
    with torch.enable_grad(), _followed({name: found[name] for name in names}, calls):
        model(image.clone().requires_grad_())
        return [_row(name, calls.get(name), tuple(image.shape[2:]), query) for name in names]


def _row(name: str, call: _Call | None, size: tuple[int, ...], query: tuple[float, float]) -> Row:
    if call is None or call.source.shape[:-1] != call.result.shape[:-1] or call.source.shape[0] != 1:
        raise ValueError(f"layer {name!r} is not called with all cells of a map at once, so it has no row to draw")
    rows, columns, prefix = _grid(call, size, name)
    at = (min(int(query[0] * rows), rows - 1), min(int(query[1] * columns), columns - 1))
    cells = [token for token in range(rows * columns + len(prefix)) if token not in prefix]
    token = cells[at[0] * columns + at[1]]
    if call.values is not None and call.attended is not None:
        v, out = call.values, call.attended
        shares, exact = torch.zeros(v.shape[1]), True
        for head in range(v.shape[2]):
            (grad,) = torch.autograd.grad(out[0, token, head, 0], v, retain_graph=True)
            shares = shares + grad[0, :, head, 0].abs()
    else:
        result, squares, exact = call.result.reshape(-1, call.result.shape[-1]), torch.zeros(()), False
        generator = torch.Generator().manual_seed(0)
        for _ in range(_PROBES):
            probe = torch.randn(result.shape[1], generator=generator).to(result)
            (grad,) = torch.autograd.grad(result[token] @ probe, call.source, retain_graph=True)
            squares = squares + grad.reshape(-1, grad.shape[-1]).square().sum(1)
        shares = (squares / _PROBES).sqrt()
    weights = shares[cells].reshape(rows, columns).double()
    total = float(weights.sum())
    return Row(name, (weights / total if total > 0 else weights).numpy(), at, exact)


def _grid(call: _Call, size: tuple[int, ...], name: str) -> tuple[int, int, list[int]]:
    """Return rows, columns and the positions of tokens that are no cells."""
    if call.grid is not None:
        return call.grid.height, call.grid.width, list(call.grid.prefix_positions)
    shape = call.source.shape
    if len(shape) == 4:
        return shape[1], shape[2], []
    # A sequence of one of timm's models, class tokens first: the largest map of the image's shape that fits.
    tokens = shape[1]
    for rows in range(int(tokens**0.5 * 2), 0, -1):
        columns = round(rows * size[1] / size[0])
        if 0 <= tokens - rows * columns < 10 and columns > 0:
            return rows, columns, list(range(tokens - rows * columns))
    raise ValueError(
        f"layer {name!r} mixes {tokens} tokens, which are no map of an image of {size[0]}x{size[1]} pixels"
    )


def receptive_field(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return how much each pixel adds to the middle cell of the last map, float64 (height, width), with maximum 1.

        R = sum over images and colours of relu(d sum over channels of relu(out_middle) / d image)

    Source: RepLKNet (Ding et al. 2022, arXiv 2203.06717), after effective receptive fields (Luo et al. 2016, arXiv
    1701.04128).

    Args:
        model: In eval mode; its `forward_features` gives a map or a sequence of cells.
        images: Normalised (batch, 3, height, width); they pass one at a time.

    Raises:
        ValueError: the model's features are no map of the image.
    """
    total = torch.zeros(images.shape[2:], dtype=torch.float64)
    for image in images.split(1):
        image = image.clone().requires_grad_()
        with torch.enable_grad():
            features = model.forward_features(image)
            middle = _middle(model, features, tuple(image.shape[2:]))
            (grad,) = torch.autograd.grad(middle.relu().sum(), image)
        total += grad[0].clamp(min=0).sum(0).double()
    peak = float(total.max())
    return (total / peak if peak > 0 else total).numpy()


def _middle(model: nn.Module, features: Tensor, size: tuple[int, ...]) -> Tensor:
    if features.ndim == 4:
        maps = features if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
        return maps[0, maps.shape[1] // 2, maps.shape[2] // 2]
    if features.ndim == 3:
        rows, columns, prefix = _grid(_Call(features, features), size, "forward_features")
        cells = [token for token in range(features.shape[1]) if token not in prefix]
        return features[0, cells[rows // 2 * columns + columns // 2]]
    raise ValueError(f"forward_features returns a tensor of shape {tuple(features.shape)}, which is no map")


def side_that_holds(field: np.ndarray, share: float) -> float:
    """Return the side of the smallest square around the middle that holds `share` of `field`, over the image's side.

    The side is a share of the shorter side, as RepLKNet's table has the area's.
    """
    rows, columns = field.shape
    total = field.sum()
    for reach in range(min(rows, columns) // 2 + 1):
        square = field[rows // 2 - reach : rows // 2 + reach + 1, columns // 2 - reach : columns // 2 + reach + 1]
        if square.sum() >= share * total:
            return min(1.0, (2 * reach + 1) / min(rows, columns))
    return 1.0
