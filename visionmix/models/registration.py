"""From a family's table to timm's registry."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from visionmix.backbones.contract import image_sides
from visionmix.models.family import Family, Layout, Variant, add_family
from visionmix.models.loading import load_tensors
from visionmix.models.options import check_feature_class, check_options
from visionmix.models.weights import Weights, fetch
from visionmix.reduction import apply
from visionmix.reduction.specs import Spec


def register_family(
    module: str, variants: Mapping[str, Variant], *, paper: str, paper_name: str = "", license: str = "unknown"
) -> None:
    """Register `variants` with timm as models of module `module`, each with an entry point and a cfg for every tag.

    Example:
        ``register_family(__name__, VARIANTS, paper="arXiv 2405.18425", license="mit")``

    Args:
        module: The family's ``__name__``; the entry points become its attributes.
        variants: The family's table, by model name.
        paper: Where the family is described.
        paper_name: The paper's title.
        license: Licence of the published weights, as the hub spells it, if they name no other.
    """
    target = sys.modules[module]
    family = Family(module, paper, license, variants, paper_name)
    cfgs = {}
    for name, variant in variants.items():
        cfgs[name] = _cfg(variant, Weights(), family)
        if variant.weights:
            del cfgs[name]
            cfgs |= {f"{name}.{tag}": _cfg(variant, weights, family) for tag, weights in variant.weights.items()}
    target.default_cfgs = generate_default_cfgs(cfgs)
    for name, variant in variants.items():
        entry = _entry_point(module, name, variant, paper)
        setattr(target, name, entry)
        register_model(entry)
    add_family(family)


def _options(variant: Variant, weights: Weights) -> dict[str, Any]:
    """Return the options that a model with `weights` is built with."""
    size = {} if weights.input_size is None else {"img_size": weights.input_size}
    return {**variant.layout.options, **size, **weights.options}


def _sizes(layout: Layout, options: Mapping[str, Any], in_chans: int) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the images and of the last map in a model built with `options`, as a cfg says them."""
    size = image_sides(options.get("img_size", 224))
    return {"input_size": (in_chans, *size), "pool_size": layout.skeleton.last_grid(options, size)}


def _cfg(variant: Variant, weights: Weights, family: Family) -> dict[str, Any]:
    layout, options = variant.layout, _options(variant, weights)
    sizes = _sizes(layout, options, in_chans=3)
    paper = weights.paper or family.paper
    return {
        "num_classes": options.get("num_classes", weights.num_classes),
        **sizes,
        "crop_pct": weights.crop_pct or (0.875 if sizes["input_size"] == (3, 224, 224) else 1.0),
        "crop_mode": weights.crop_mode,
        "interpolation": "bicubic",
        "mean": weights.mean,
        "std": weights.std,
        "first_conv": layout.first_conv,
        "classifier": layout.classifier,
        "license": weights.license or family.license,
        "paper_ids": paper.replace("arXiv ", "arXiv:") if paper.startswith("arXiv") else None,
        "paper_name": (weights.paper_name if weights.paper else family.paper_name) or None,
        "url": weights.url or None,
        "hf_hub_id": weights.hf_hub_id or None,
        "hf_hub_filename": weights.file or None,
        "origin_url": weights.origin or None,
    }


def _resolved_cfg(name: str, pretrained_cfg: Any, pretrained_cfg_overlay: Mapping[str, Any] | None) -> PretrainedCfg:
    """Return timm's cfg; a repository or address in the overlay replaces the registered file or repository."""
    overlay = dict(pretrained_cfg_overlay or {})
    if overlay.get("hf_hub_id"):
        overlay.setdefault("hf_hub_filename", None)
    elif overlay.get("url"):
        overlay |= {"hf_hub_id": None, "hf_hub_filename": None}
    return resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)


def _entry_point(module: str, name: str, variant: Variant, paper: str) -> Callable[..., nn.Module]:
    layout = variant.layout
    default = next(iter(variant.weights.values()), Weights())

    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        reduction: Spec | None = None,
        **options: Any,
    ) -> nn.Module:
        check_feature_class(name, options)
        if options.get("img_size") is not None:  # before timm, which takes for a pair what is no int
            height, _ = image_sides(options["img_size"])
            if not isinstance(options["img_size"], Sequence):
                options["img_size"] = height
        cfg = _resolved_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        weights = variant.weights.get(cfg.tag, default)

        def build(**merged: Any) -> nn.Module:
            check_options(name, layout.skeleton, merged)
            model = layout.skeleton(**merged)
            if pretrained:
                # Loaded here and not by timm, whose loader turns strictness off as soon as num_classes differs, refuses
                # files with configuration objects inside, and never sees a wrapped checkpoint's page.
                tensors = fetch(cfg, name, weights, cache_dir)
                load_tensors(model, tensors, layout.keys, cfg, name=name)
            return model

        stored = (options.get("pretrained_model_args") or {}).get("img_size")
        resized = options.get("img_size") not in (None, stored)
        options = {**_options(variant, weights), **options}
        if resized:  # a saved folder's own cfg says which images its author wants
            cfg = replace(cfg, **_sizes(layout, options, cfg.input_size[0]))
        # timm's default wrapper, a list of modules, never calls forward_features and would return NHWC maps.
        feature_cfg = {"feature_cls": "getter", "out_indices": layout.skeleton.feature_indices(options)}
        model = build_model_with_cfg(build, name, False, pretrained_cfg=cfg, feature_cfg=feature_cfg, **options)
        return model if reduction is None else apply(model, reduction)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    entry.__doc__ = f"Return `{name}` ({paper})."
    return entry
