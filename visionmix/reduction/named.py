"""Reduced models under names of timm, for libraries whose only way in is `timm.create_model`."""

import sys
from typing import Any

import timm
from timm.models import generate_default_cfgs
from timm.models import register_model as register_entry
from torch import nn

from visionmix.reduction.methods import method_class
from visionmix.reduction.specs import Spec, read_spec
from visionmix.reduction.wrapping import apply

__all__ = ["register_model"]

_REGISTERED: dict[str, tuple[str, Spec]] = {}


def register_model(name: str, of: str, reduction: Spec) -> None:
    """Register the model `of`, reduced, with timm as `name`, with the weights and tags of `of`.

    ``timm.create_model(name, ...)`` is then ``apply(timm.create_model(of, ...), reduction)``, and so is all that calls
    it: ``smp.DPT("tu-" + name)``, ``transformers.TimmBackbone(TimmBackboneConfig(name))``, mmseg's TIMMBackbone. Every
    process that builds or loads the model has to register it. The same call again changes nothing.

    Example:
        ``reduction.register_model("deit_small_tome", "deit_small_patch16_224", "tome:r=8")``

    Args:
        name: The new name, without a tag.
        of: Name of a model that `apply` takes; with a tag, that is the default one.
        reduction: As `apply` takes it.

    Raises:
        TypeError: `reduction` is neither a text nor a mapping.
        ValueError: `name` is taken or has a dot, `of` is unknown, or `reduction` cannot be read or names no method.
    """
    method_class(*read_spec(reduction))
    if _REGISTERED.get(name) == (of, reduction):
        return
    if timm.is_model(name) or "." in name:
        raise ValueError(f"name={name!r} is taken or has a tag; give a new name without a dot")
    arch, _, tag = of.partition(".")
    if not timm.is_model(arch):
        raise ValueError(f"of={of!r} is not a model that timm knows; timm.list_models() lists those")

    def entry(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> nn.Module:
        model = timm.create_model(arch, pretrained, pretrained_cfg=pretrained_cfg or tag or None, **options)
        model = apply(model, reduction)
        if hasattr(model, "pretrained_cfg"):  # by which a folder of timm.models.save_for_hf says what it holds
            model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": name}
        return model

    module = sys.modules[__name__]
    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = f"Return `{of}` reduced by {reduction!r}."
    setattr(module, name, entry)
    tagged = timm.list_models(f"{arch}.*", include_tags=True)
    first = tag or timm.get_pretrained_cfg(arch).tag
    tagged.sort(key=lambda each: each != f"{arch}.{first}")  # timm takes the first for the default
    cfgs = {f"{name}{each.removeprefix(arch)}": timm.get_pretrained_cfg(each) for each in tagged}
    module.default_cfgs = generate_default_cfgs(cfgs)
    register_entry(entry)
    _REGISTERED[name] = (of, reduction)
