"""Families as tables: their variants, and the published facts of every model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import timm

from visionmix.models.layout import Layout
from visionmix.models.weights import Weights
from visionmix.registry import nearest


@dataclass(frozen=True)
class Variant:
    """A row of a family's table.

    Attributes:
        layout: How it is built, and how its published files are read.
        weights: Its published weights by tag, the default first: ``{"in1k": Weights(...), "in1k_384": Weights(...)}``;
            empty where there are none.
        params: Parameters in millions, as its authors round them, or None.
        gmacs: Multiply-adds at the built size, in thousands of millions ("FLOPs" in most papers), or None.
    """

    layout: Layout
    weights: Mapping[str, Weights] = field(default_factory=dict)
    params: float | None = None
    gmacs: float | None = None


@dataclass(frozen=True)
class Published:
    """The published facts of a model with certain weights.

    Attributes:
        params: Parameters, as its authors round them, in millions.
        gmacs: Multiply-adds at the input size of the weights, in thousands of millions, or None.
        top1: ImageNet-1k top-1 accuracy in percent, or None.
        license: Licence of the weights, as the hub spells it; "unknown" where their authors state none.
        paper: Where they are described.
    """

    params: float | None = None
    gmacs: float | None = None
    top1: float | None = None
    license: str = "unknown"
    paper: str = ""


@dataclass(frozen=True)
class Family:
    """The facts that the variants of a family share; see `visionmix.models.register_family`.

    Attributes:
        module: Name of the family's module, whose docstring describes the family.
        paper: Where the family is described.
        license: Licence of weights that do not name another.
        variants: The family's table, by model name.
        paper_name: The paper's title, or "".
    """

    module: str
    paper: str
    license: str
    variants: Mapping[str, Variant]
    paper_name: str = ""


_FAMILIES: dict[str, Family] = {}  # by the name of each of their models


def add_family(family: Family) -> None:
    """Add the models of `family` to those known by name."""
    _FAMILIES.update(dict.fromkeys(family.variants, family))


def list_family_models() -> list[str]:
    """Return the names of this library's models, in the order of their registration."""
    return list(_FAMILIES)


def list_models(
    filter: str | Sequence[str] = "",
    *,
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    include_tags: bool | None = None,
) -> list[str]:
    """Return the names of this library's models, sorted, as `timm.list_models` returns those of all.

    Example:
        ``list_models("vmamba*", pretrained=True)``

    Args:
        filter: Wildcards such as "vig_*", of which a name matches one; "" for all models.
        pretrained: Whether to list only weights that can be fetched, as "model.tag".
        exclude_filters: Wildcards of names that are left out.
        include_tags: Whether names have tags; None for those of `pretrained`.

    Raises:
        TypeError: a filter is no str and no list of those.
    """
    for option, value in (("filter", filter), ("exclude_filters", exclude_filters)):
        several = isinstance(value, Collection) and not isinstance(value, str | bytes)
        if value is not None and not all(isinstance(each, str) for each in (value if several else (value,))):
            raise TypeError(f"{option}={value!r} is no wildcard; give a str such as 'vig_*', or a list of those")
    names = timm.list_models(filter, pretrained=pretrained, exclude_filters=exclude_filters, include_tags=include_tags)
    return [name for name in names if is_family_model(name)]


def is_family_model(name: str) -> bool:
    """Return whether `name`, with or without a tag, is a model of this library."""
    return name.partition(".")[0] in _FAMILIES


def family_of(name: str) -> Family:
    """Return the family of the model called `name`, with or without a tag.

    Raises:
        TypeError: `name` is no str.
        ValueError: no model of this library has this name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} is no name of a model; give a str, one of visionmix.list_models()")
    model = name.partition(".")[0]
    if model not in _FAMILIES:
        hint = nearest(model, _FAMILIES)
        raise ValueError(f"name={name!r} is not a model of visionmix{hint}; give one of visionmix.list_models()")
    return _FAMILIES[model]


def variant_of(name: str) -> Variant:
    """Return the variant called `name`, with or without a tag.

    Raises:
        ValueError: no model of this library has this name.
    """
    return family_of(name).variants[name.partition(".")[0]]


def weights_of(name: str) -> Weights:
    """Return the weights of the model called `name`: those of its tag, else the default ones.

    Raises:
        ValueError: no model of this library has this name, or it has no weights of this tag.
    """
    weights = variant_of(name).weights
    tag = name.partition(".")[2]
    if tag and tag not in weights:
        remedy = (
            f"the model's tags are {list(weights)}" if weights else "its weights have no tags, so give the name alone"
        )
        raise ValueError(f"name={name!r} has an unknown tag{nearest(tag, weights)}; {remedy}")
    return weights[tag] if tag else next(iter(weights.values()), Weights())


def published(name: str) -> Published:
    """Return the published facts of the model called `name`, with the weights of its tag or the default ones.

    Example:
        ``published("agent_swin_base.in1k_384").top1``

    Raises:
        ValueError: no model of this library has this name, or it has no weights of this tag.
    """
    family, variant, weights = family_of(name), variant_of(name), weights_of(name)
    return Published(
        variant.params,
        variant.gmacs if weights.input_size is None else weights.gmacs,
        weights.top1,
        weights.license or family.license,
        weights.paper or family.paper,
    )
