"""Layer-wise decay of the learning rate in OpenMMLab's training, by timm's rules and the models' own groups."""

import re
from collections.abc import Iterator
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT
from mmengine.registry import Registry
from timm.optim import param_groups_layer_decay
from torch import nn

# A registry of this library's own below the root one: mmengine reads the dot of "visionmix.LayerDecay" as a scope.
CONSTRUCTORS = Registry("optimizer wrapper constructor", parent=ROOT, scope="visionmix")

_HEAD = "head."  # what the names of parameters outside of the backbone begin with


@CONSTRUCTORS.register_module(name="LayerDecay")
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimiser of a detector or segmentation model whose backbone learns the slower, the lower the layer.

    Layers are those of the backbone's `group_matcher`, and `timm.optim.param_groups_layer_decay` forms the groups: the
    n-th layer from the top has ``lr * layer_decay ** n``, where the necks and heads are the top, as a classifier is of
    the whole model. Biases, other parameters of one axis, and those that the backbone's `no_weight_decay` names are not
    decayed. A config says::

        optim_wrapper = dict(
            constructor="visionmix.LayerDecay",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay=0.9),
        )

    `layers` gives the layers as regular expressions instead, the lowest first, as in ``layers=["^stem", "^stages[.]0",
    None, "^stages"]``: a parameter of the backbone is in the first that is found in its name, and None stands for an
    empty layer.

    Source: BEiT (Bao et al. 2021, arXiv 2106.08254).

    Args:
        optim_wrapper_cfg: The config's `optim_wrapper`; its optimizer has `lr` and `weight_decay`.
        paramwise_cfg: ``dict(layer_decay=...)``, above 0 and at most 1, and `layers` where they are not the backbone's
            own.

    Raises:
        ValueError: `paramwise_cfg` has no such `layer_decay` or `layers`, or more than that; the optimizer has no `lr`
            or `weight_decay`; or, once built for a model, its backbone is no `visionmix.Backbone` or has a parameter
            that is in none of `layers`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        decay = dict(paramwise_cfg or {}).get("layer_decay")
        known = set(paramwise_cfg or ()) - {"layers"} == {"layer_decay"}
        if not known or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ValueError(
                f"paramwise_cfg={paramwise_cfg!r}: visionmix.LayerDecay takes dict(layer_decay=...), above 0 and at "
                "most 1, and layers; where a base has other keys, add _delete_=True"
            )
        self.layers = _compiled(paramwise_cfg["layers"]) if "layers" in paramwise_cfg else None
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(f"optimizer={self.optimizer_cfg!r} must have lr and weight_decay for visionmix.LayerDecay")

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Append the groups of the model's parameters to `params`."""
        backbone = getattr(getattr(getattr(module, "backbone", None), "features", None), "model", None)
        if backbone is None or not hasattr(backbone, "group_matcher"):
            raise ValueError(
                f"{type(module).__name__} has no visionmix.Backbone as its backbone, whose layers visionmix.LayerDecay "
                "goes by; take another constructor"
            )
        model, rate = _Layers(module, backbone), self.paramwise_cfg["layer_decay"]
        if self.layers is not None:
            params.extend(self._groups(model, rate, self.layers))
            return
        groups = param_groups_layer_decay(
            model, weight_decay=self.base_wd, no_weight_decay_list=backbone.no_weight_decay(), layer_decay=rate
        )
        for group in groups:
            group["lr"] = self.base_lr * group.pop("lr_scale")
        params.extend(groups)

    def _groups(self, model: "_Layers", rate: float, layers: list[re.Pattern | None]) -> list[dict]:
        fixed, groups = model.backbone.no_weight_decay(), {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            height = 0 if name.startswith(_HEAD) else len(layers) - _layer_of(name, layers)
            decayed = parameter.ndim > 1 and name not in fixed
            group = {"lr": self.base_lr * rate**height, "weight_decay": self.base_wd if decayed else 0.0, "params": []}
            groups.setdefault((height, decayed), group)["params"].append(parameter)
        return list(groups.values())


def _compiled(layers: Any) -> list[re.Pattern | None]:
    """Return the regular expressions `layers`, compiled.

    Raises:
        ValueError: `layers` is no list of them.
    """
    try:
        compiled = [each if each is None else re.compile(each) for each in layers]
    except (TypeError, re.error):
        compiled = []
    if isinstance(layers, str) or not compiled:
        raise ValueError(f"layers={layers!r} must be regular expressions, one a layer, or None for an empty layer")
    return compiled


def _layer_of(name: str, layers: list[re.Pattern | None]) -> int:
    """Return the number of the layer that the backbone's parameter `name` is in.

    Raises:
        ValueError: it is in none.
    """
    for number, pattern in enumerate(layers):
        if pattern is not None and pattern.search(name):
            return number
    raise ValueError(f"{name!r} is in none of layers={[each and each.pattern for each in layers]}; add an expression")


class _Layers:
    """A detector as timm sees a classifier: the backbone under its own names, all else under those of a head."""

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        self.model, self.backbone, self.group_matcher = model, backbone, backbone.group_matcher

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.backbone.named_parameters()}
        for name, parameter in self.model.named_parameters():
            yield names.get(parameter, _HEAD + name), parameter
