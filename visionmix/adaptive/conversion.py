"""Models whose feed-forwards and projections are adaptive computation modules."""

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from visionmix.adaptive.initial import begin_with
from visionmix.adaptive.module import ACM, SplitACM
from visionmix.mixers.softmax import Attention
from visionmix.registry import check_positive, is_int, is_number

LAYERS = ("*blocks.*.mlp", "*blocks.*.qkv", "*blocks.*.proj")
_PARTS = ("q", "k", "v", "gate")


def convert(
    model: nn.Module,
    learners: int = 4,
    *,
    layers: Sequence[str] = LAYERS,
    cost: float = 1.0,
    init: str = "random",
    min_learners: int = 0,
    min_projection_learners: int = 1,
    **options: Any,
) -> nn.Module:
    """Return a copy of `model` with an `ACM` in the place of each of its `layers`; the given model does not change.

    A feed-forward (timm's Mlp, GluMlp or SwiGLU) becomes an `ACM` with its activation and dropout, a linear layer one
    without an activation. A linear layer called "qkv" becomes one for each of q, k, v (and the gate of this library's
    attention), with gates of their own. With all learners, a module takes `cost` times the multiply-adds of the layer.
    All other layers, and the names of their parameters, stay as they are.

    The result is no use before it is trained: see `distillation_losses`, `routing_losses` and `finetuning_losses`.

    Example:
        ``acm = adaptive.convert(timm.create_model("deit_small_patch16_224", pretrained=True))``

    Args:
        model: A VisionTransformer of timm, DeiT included, a plain model of this library with softmax attention, or any
            model whose `layers` read one token at a time.
        learners: Number of learners of each module.
        layers: Names of the layers, with ``*`` for any part of a name, dots included.
        cost: Multiply-adds of a whole module over those of its layer.
        init: "random" draws the learners' weights, as published; "weights" takes them from the layer, which needs
            ``out_bias=True`` where the layer has a bias (see `visionmix.adaptive.initial.begin_with`).
        min_learners: Least number of learners of a token in a feed-forward.
        min_projection_learners: The same in a linear layer; 1 is published.
        **options: More options of `ACM`: `hidden_bias`, `out_bias`, `gate_dims`, `temperature`, `released`.

    Raises:
        TypeError: a layer can be no `ACM`, or an option is of a wrong type.
        ValueError: `model` is converted already, a name in `layers` finds no layer, one layer lies in another, or an
            option's value is refused.
    """
    check_positive(cost=cost)
    if init not in ("random", "weights"):
        raise ValueError(f"init={init!r}: give 'random' or 'weights'")
    for option in ("in_features", "out_features", "learner_dim", "num_learners", "act_layer", "drop"):
        if option in options:
            raise ValueError(f"{option}={options[option]!r} follows from the layer; leave it out")
    names = _find(model, layers)
    new = copy.deepcopy(model)
    for name in names:
        parent = new.get_submodule(name.rpartition(".")[0])
        layer, leaf = new.get_submodule(name), name.rpartition(".")[2]
        if isinstance(layer, nn.Linear):
            acm = _projections(layer, leaf, learners, cost, init, min_learners=min_projection_learners, **options)
        else:
            acm = _feed_forward(layer, learners, cost, init, min_learners=min_learners, **options)
        setattr(parent, leaf, acm.train(layer.training))
    return new


def modules(model: nn.Module) -> dict[str, ACM]:
    """Return the adaptive computation modules of `model` by name.

    Raises:
        ValueError: there are none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, ACM)}
    if not found:
        raise ValueError(f"the model, a {type(model).__qualname__}, has no ACM; adaptive.convert makes such models")
    return found


def set_learners(model: nn.Module, learners: int | float | None) -> None:
    """Give every token the same number of learners, in all modules of `model`; None lets the gates choose again.

    Args:
        model: A converted model.
        learners: A number of learners as an int; a share of all as a float from 0.0 to 1.0, rounded; or None.

    Raises:
        TypeError: `learners` is no number.
        ValueError: a module has fewer learners, the share is outside of [0, 1], or `model` has no `ACM`.
    """
    found = modules(model)
    if learners is not None and not is_number(learners):
        raise TypeError(f"learners={learners!r}: give a number of learners, a share from 0.0 to 1.0, or None")
    if isinstance(learners, float) and not 0 <= learners <= 1:
        raise ValueError(f"learners={learners}: give a share from 0.0 to 1.0, or an int")
    for name, module in found.items():
        if is_int(learners) and not 0 <= learners <= module.num_learners:
            raise ValueError(f"learners={learners}: give 0 to {module.num_learners}, which {name} has")
    for module in found.values():
        module.learners = round(learners * module.num_learners) if isinstance(learners, float) else learners


def _find(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the names of the layers to replace, checked."""
    if isinstance(layers, str) or not all(isinstance(pattern, str) for pattern in layers):
        raise TypeError(f"layers={layers!r}: give a list of names such as {LAYERS[0]!r}")
    if any(isinstance(module, ACM) for module in model.modules()):
        raise ValueError("model is converted already; give the model that it was made from")
    everything = dict(model.named_modules())
    names = [name for name in everything if any(fnmatchcase(name, pattern) for pattern in layers)]
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"layers: {pattern!r} finds no layer in the {type(model).__qualname__}; leave it out")
    for name in names:
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"layers: {name} lies in {outer}, which is replaced as well; take one of them")
        _check(everything, name)
    return names


def _check(everything: dict[str, nn.Module], name: str) -> None:
    """Raise TypeError unless the layer called `name` can be an `ACM`."""
    layer, parent = everything[name], everything[name.rpartition(".")[0]]
    fits = isinstance(layer, nn.Linear)
    if isinstance(layer, Mlp | GluMlp | SwiGLU):
        fits = isinstance(layer.fc2, nn.Linear)
    if not fits:
        raise TypeError(
            f"layers: {name}, a {type(layer).__qualname__}, can be no ACM; a Linear and timm's Mlp, GluMlp and SwiGLU "
            f"without convolutions can; give other layers"
        )
    if isinstance(parent, Attention) and parent.gate and layer is parent.proj:
        raise TypeError(f"layers: {name} has a gated input, which needs a linear layer; leave it out of layers")


def _projections(layer: nn.Linear, leaf: str, learners: int, cost: float, init: str, **options: Any) -> nn.Module:
    wide, out = layer.in_features, layer.out_features
    parts = out // wide if leaf == "qkv" and out % wide == 0 and 1 < out // wide <= len(_PARTS) else 1
    each = out // parts
    width = (wide * each + each) / (wide + each + 1)
    options |= {"act_layer": nn.Identity, "device": layer.weight.device, "dtype": layer.weight.dtype}
    made = []
    for part in range(parts):
        acm = ACM(wide, each, _learner_dim(cost, learners, width), learners, **options)
        if init == "weights":
            begin_with(acm, layer, slice(part * each, (part + 1) * each))
        made.append(acm)
    return made[0] if parts == 1 else SplitACM(dict(zip(_PARTS, made, strict=False)))


def _feed_forward(layer: nn.Module, learners: int, cost: float, init: str, **options: Any) -> ACM:
    first, last = (layer.fc1_x if isinstance(layer, SwiGLU) else layer.fc1), layer.fc2
    wide, out = first.in_features, last.out_features
    width: float = first.out_features
    if not isinstance(layer, Mlp):  # gated: the ungated one with as many multiply-adds
        gate = wide * width if isinstance(layer, SwiGLU) else 0
        width = (wide * width + gate + last.in_features * out) / (wide + out)
    options |= {"device": first.weight.device, "dtype": first.weight.dtype}
    act, drop = layer.act, layer.drop1.p
    acm = ACM(
        wide,
        out,
        _learner_dim(cost, learners, width),
        learners,
        act_layer=lambda: copy.deepcopy(act),
        drop=drop,
        **options,
    )
    if init == "weights":
        begin_with(acm, layer)
    return acm


def _learner_dim(cost: float, learners: int, width: float) -> int:
    """Return the hidden channels of each learner, of layers with `width` hidden channels or as many multiply-adds.

    Source: arXiv 2312.10193; ``(d^2 + d) / (2 d + 1)`` is its width of a square linear layer.
    """
    return max(1, round(cost / max(learners, 1) * width))
