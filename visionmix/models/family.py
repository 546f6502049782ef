"""From a table of variants to timm's registry."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from visionmix.models.weights import KeyMap, load_pretrained
from visionmix.names import nearest


@dataclass(frozen=True)
class Published:
    """What a paper says of a variant.

    Attributes:
        params: Parameters, as its authors round them, in millions.
        gmacs: Multiply-adds at the built size, in thousands of millions ("FLOPs" in most papers), or None.
        top1: ImageNet-1k top-1 accuracy in percent, or None.
    """

    params: float | None = None
    gmacs: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Variant:
    """A row of a family's table.

    Attributes:
        skeleton: The class that is built.
        options: Its arguments; what a user gives to `timm.create_model` goes before.
        weights: Where its published weights lie, as timm's cfg fields (hf_hub_id and hf_hub_filename, or url); empty
            where there are none.
        published: What its paper says of it.
        page: Where a person finds the weights, for those without a direct link.
    """

    skeleton: type[nn.Module]
    options: Mapping[str, Any]
    weights: Mapping[str, Any] = field(default_factory=dict)
    published: Published = Published()
    page: str = ""


@dataclass(frozen=True)
class Family:
    """What the variants of a family share: see `register_family`."""

    paper: str
    license: str
    variants: Mapping[str, Variant]


_FAMILIES: dict[str, Family] = {}


def register_family(
    module: str,
    variants: Mapping[str, Variant],
    *,
    key_map: Callable[[nn.Module], KeyMap],
    paper: str,
    license: str,
) -> None:
    """Register `variants` with timm as models of the module named `module`, with an entry point and a cfg each.

    Example:
        ``register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2405.18425", license="mit")``

    Args:
        module: The family's ``__name__``; the entry points become its attributes.
        variants: The family's table, by model name.
        key_map: Makes, for a built model, the map from the published files' keys to the model's.
        paper: Where the family is described.
        license: Licence of the published weights, as the hub spells it.
    """
    target = sys.modules[module]
    target.default_cfgs = generate_default_cfgs({name: _cfg(variant, license) for name, variant in variants.items()})
    for name, variant in variants.items():
        entry = _entry_point(module, name, variant, key_map, paper)
        setattr(target, name, entry)
        register_model(entry)
    _FAMILIES.update(dict.fromkeys(variants, Family(paper, license, variants)))


def list_family_models() -> list[str]:
    """Return the names of this library's models, in the order of their registration."""
    return list(_FAMILIES)


def family_of(name: str) -> Family:
    """Return the family of the model called `name`.

    Raises:
        ValueError: no model of this library has this name.
    """
    if name not in _FAMILIES:
        hint = nearest(name, _FAMILIES)
        raise ValueError(f"name={name!r} is no model of visionmix{hint}; its models are {sorted(_FAMILIES)}")
    return _FAMILIES[name]


def published(name: str) -> Published:
    """Return what its paper says of the model called `name`.

    Raises:
        ValueError: no model of this library has this name.
    """
    return family_of(name).variants[name].published


def _cfg(variant: Variant, license: str) -> dict[str, Any]:
    height = variant.options.get("img_size", 224)
    size = (height, height) if isinstance(height, int) else tuple(height)
    return {
        "num_classes": 1000,
        "input_size": (3, *size),
        "pool_size": variant.skeleton.last_grid(variant.options, size),
        "crop_pct": 0.875 if size == (224, 224) else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": license,
        **variant.weights,
    }


def _entry_point(
    module: str, name: str, variant: Variant, key_map: Callable[[nn.Module], KeyMap], paper: str
) -> Callable[..., nn.Module]:
    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **options: Any,
    ) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)

        def build(**merged: Any) -> nn.Module:
            model = variant.skeleton(**merged)
            if pretrained:
                # Loaded here and not by timm, whose loader turns strictness off as soon as num_classes differs, refuses
                # files with configuration objects inside, and never sees a wrapped checkpoint's page.
                load_pretrained(model, cfg, key_map(model), name=name, page=variant.page, cache_dir=cache_dir)
            return model

        # timm's default wrapper, a list of modules, never calls forward_features and would return NHWC maps.
        feature_cfg = {"feature_cls": "getter", "out_indices": variant.skeleton.feature_indices(variant.options)}
        return build_model_with_cfg(
            build, name, False, pretrained_cfg=cfg, feature_cfg=feature_cfg, **{**variant.options, **options}
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    entry.__doc__ = f"Return `{name}` ({paper})."
    return entry
