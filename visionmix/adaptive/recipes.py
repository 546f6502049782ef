"""Converted models by name, for recipes. Importing this file, which `visionmix` alone does not do, registers "acm"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict, register_model
from torch import nn

from visionmix.adaptive.conversion import convert
from visionmix.adaptive.training import PHASES, in_phase

_LOSSES = ("ratio", "budget", "budget_weight", "entropy_weight", "diversity_weight")


@register_model
def acm(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    *,
    base: str = "deit_small_patch16_224",
    phase: str = "finetune",
    start: str | None = None,
    num_classes: int = 1000,
    base_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the model called `base` with adaptive computation modules, in a phase of its training (arXiv 2312.10193).

    ``visionmix train finetune/acm_deit_small_distill.yaml`` and the two recipes that follow it train one.

    Args:
        pretrained: Whether to read weights: those of `base`, published or of `pretrained_cfg_overlay`, and `start`.
        pretrained_cfg: Unused; the base has its own.
        pretrained_cfg_overlay: For the base, e.g. ``dict(file=...)`` for weights that you trained.
        cache_dir: Where the base's weights are kept.
        base: timm name of the model to convert.
        phase: "distill", "route" or "finetune"; see `visionmix.adaptive.in_phase`.
        start: The weights that the phase before left, a file that `visionmix train` wrote: ``best.safetensors``.
        num_classes: Outputs of the classifier.
        base_options: More options of the base.
        **options: Those of the phase's losses, `budget` among them, and of `visionmix.adaptive.convert`.

    Raises:
        FileNotFoundError: there is no file `start`.
        TypeError: an option is unknown or of a wrong type.
        ValueError: `phase` is unknown, it needs a `start` that is not given, the file holds another model, or an
            option's value is refused.
    """
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: give one of {', '.join(map(repr, PHASES))}")
    if pretrained and (start is None) != (phase == "distill"):
        need = "takes no start, but the weights of the base" if phase == "distill" else "goes on from a file; name it"
        raise ValueError(f"start={start!r}: phase {phase!r} {need}")
    if pretrained and start is not None and not Path(start).is_file():
        raise FileNotFoundError(f"start={start!r} is no file; give best.safetensors of the phase before")
    shared = {"pretrained_cfg_overlay": pretrained_cfg_overlay, "cache_dir": cache_dir, "num_classes": num_classes}
    teacher = timm.create_model(base, pretrained=pretrained, **shared, **(base_options or {}))
    losses = {name: options.pop(name) for name in _LOSSES if name in options}
    model = convert(teacher, **options)
    if pretrained and start is not None:
        try:
            model.load_state_dict(load_state_dict(start))
        except RuntimeError as error:
            raise ValueError(f"start={start!r} holds another model than this one: {error}") from error
    if phase == "finetune":
        return in_phase(model, phase, **losses)
    return in_phase(model, phase, teacher, **losses)
