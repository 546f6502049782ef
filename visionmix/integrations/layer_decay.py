"""Layer-wise decay of the learning rate in OpenMMLab's training, by timm's rules and the models' own groups."""

from collections.abc import Iterator
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT
from mmengine.registry import Registry
from timm.optim import param_groups_layer_decay
from torch import nn

# A registry of this library's own below the root one: mmengine reads the dot of "visionmix.LayerDecay" as a scope.
CONSTRUCTORS = Registry("optimizer wrapper constructor", parent=ROOT, scope="visionmix")


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

    Source: BEiT (Bao et al. 2021, arXiv 2106.08254).

    Args:
        optim_wrapper_cfg: The config's `optim_wrapper`; its optimizer has `lr` and `weight_decay`.
        paramwise_cfg: ``dict(layer_decay=...)``, above 0 and at most 1.

    Raises:
        ValueError: `paramwise_cfg` has no such `layer_decay`, or more than that; the optimizer has no `lr` or
            `weight_decay`; or, once built for a model, its backbone is no `visionmix.Backbone`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        decay = dict(paramwise_cfg or {}).get("layer_decay")
        if set(paramwise_cfg or ()) != {"layer_decay"} or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ValueError(
                f"paramwise_cfg={paramwise_cfg!r}: visionmix.LayerDecay takes dict(layer_decay=...) alone, above 0 and "
                "at most 1; where a base has other keys, add _delete_=True"
            )
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
        groups = param_groups_layer_decay(
            _Layers(module, backbone),
            weight_decay=self.base_wd,
            no_weight_decay_list=backbone.no_weight_decay(),
            layer_decay=self.paramwise_cfg["layer_decay"],
        )
        for group in groups:
            group["lr"] = self.base_lr * group.pop("lr_scale")
        params.extend(groups)


class _Layers:
    """A detector as timm sees a classifier: the backbone under its own names, all else under those of a head."""

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        self.model, self.backbone, self.group_matcher = model, backbone, backbone.group_matcher

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.backbone.named_parameters()}
        for name, parameter in self.model.named_parameters():
            yield names.get(parameter, f"head.{name}"), parameter
