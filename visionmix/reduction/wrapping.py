"""Reduced models from given ones, and back."""

from typing import Any

from torch import nn

from visionmix.private_api import FeatureGetterNet
from visionmix.reduction import refused
from visionmix.reduction.backbones import ReducedBackbone, ReducedPlain, ReducedVisionTransformer
from visionmix.reduction.hierarchical import ReducedHierarchical
from visionmix.reduction.methods import Method, method_class
from visionmix.reduction.sharing import Reduced, reduced
from visionmix.reduction.specs import Spec, read_spec

_BACKBONES: tuple[type[ReducedBackbone], ...] = (ReducedVisionTransformer, ReducedPlain, ReducedHierarchical)


class ReducedFeatures(Reduced):
    """A timm feature extractor, as `features_only=True` makes it, around a reduced model."""


def apply(model: nn.Module, method: Spec, **options: Any) -> nn.Module:
    """Return `model` with fewer tokens from block to block; the given model does not change.

    The new module holds the same children and parameters under the same names, so that training one trains both and
    state dicts fit both. It has all methods and attributes of the model, and its own forward paths, which call the
    parts of a block and not the block, so that hooks of blocks do not run. The state of a pass is handed along as a
    value (`Tokens`), so passes may be nested and run in parallel. If the settings are constant, so are the shapes: the
    model compiles to a full graph and exports. `forward_intermediates` gives dense maps, one value per cell.

    Blocks have the numbers that they have in the whole model, where a feature extractor has left off its last ones too.
    Where a head pools over merged patch tokens, each counts as often as it has cells.

    Example:
        ``fast = reduction.apply(timm.create_model("deit_small_patch16_224"), "tome", r=13)``, or ``"tome:r=13"``.

    Args:
        model: A VisionTransformer of timm, VisionTransformerDistilled included, a `visionmix.backbones.Plain` whose
            mixers the method can take (softmax attention that needs no map; the scans of Vim and PlainMamba for
            "ssm_prune"), for "ssm_prune" a `visionmix.backbones.Hierarchical` with VMamba's scans, or the result of
            ``create_model(..., features_only=True)`` for one. A compiled or wrapped model is reduced before it is
            compiled or wrapped.
        method: One of `list_methods()`; or one with options, as recipes and command lines write it: ``"tome:r=13"`` or
            ``{"method": "tome", "r": 13}``.
        **options: The method's own options, laid over those in `method`.

    Raises:
        TypeError: a class of model, block or attention that cannot be reduced, or an option of a wrong type.
        ValueError: the model is reduced already; `method` or an option is unknown (the message has the nearest one), or
            its value is refused.
    """
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    if isinstance(inner, Reduced):
        raise ValueError(
            f"model is reduced already, by {inner.reduction!r}; reduction.remove(model) returns the model without it"
        )
    name, written = read_spec(method)
    options = written | options
    cls = method_class(name, options)  # unknown names are refused before an unfit model
    if inner is model:
        return _apply(model, cls, options)
    features = reduced(model, ReducedFeatures)
    features.model = _apply(inner, cls, options, extracts=True)
    return features


def _apply(model: nn.Module, cls: type[Method], options: dict[str, Any], extracts: bool = False) -> ReducedBackbone:
    """Return `model` reduced; with `extracts` it may lack its last blocks, which are counted all the same."""
    name, backbone = cls.name, _reduced_backbone_for(model)
    stages = backbone.stages_of(model)
    blocks = [block for stage in stages for block in stage]
    # Stages do not say how many blocks the absent ones had; numbers of those are refused.
    absent = len(model.feature_info) - len(blocks) if extracts and hasattr(model, "blocks") else 0
    if cls.knows_stages:
        options["depths"] = (*map(len, stages[:-1]), len(stages[-1]) + absent)
    elif len(stages) > 1:
        raise TypeError(
            f"method {name!r} reduces models of one resolution; a {type(model).__qualname__} has several: take a plain "
            f"model, a VisionTransformer of timm or, for VMamba, method 'ssm_prune'"
        )
    new = reduced(model, backbone)
    new.whole_depth = len(blocks) + absent
    method = cls([*blocks, *blocks[-1:] * absent], backbone.prefix_of(model), **options)
    new.reduction = method.cut(len(blocks))
    return new


def remove(model: nn.Module) -> nn.Module:
    """Return the model that `apply` was given, in the mode (training or not) that `model` is in.

    Parameters are shared, so training `model` has trained it too. A layer that was replaced in `model` since, such as
    its classifier by `reset_classifier`, was replaced only there.

    Raises:
        TypeError: `model` is not reduced.
    """
    if not isinstance(model, Reduced):
        raise TypeError(f"model, a {type(model).__qualname__}, is not reduced; reduction.apply makes such models")
    model.given.training = model.training
    if isinstance(model, ReducedFeatures):
        remove(model.model)
    return model.given


def _reduced_backbone_for(model: nn.Module) -> type[ReducedBackbone]:
    """Return the forward paths for `model`.

    Raises:
        TypeError: there are none for its class, or the class has forward paths of its own.
    """
    cls = type(model)
    for each in _BACKBONES:
        if isinstance(model, each.skeleton):
            own = [path for path in each.paths if getattr(cls, path) is not getattr(each.skeleton, path)]
            if own:
                raise TypeError(f"a {cls.__qualname__} cannot be reduced: its class has a {own[0]} of its own")
            return each
    names = ", ".join(each.skeleton.__qualname__ for each in _BACKBONES)
    known = refused.reason(cls)
    since = f", since {known}" if known else ""
    raise TypeError(f"a model of class {cls.__qualname__} cannot be reduced{since}; those of the classes {names} can")
