"""Blocks made from names: each with its mixer and its feed-forward."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from visionmix.backbones.contract import MixerSpec, per_block
from visionmix.layers.by_name import LayerSpec, layer_maker
from visionmix.mixers.registry import create_mixer, list_mixers, mixer_options
from visionmix.registry import check_finite, check_positive, is_maker

_DROPS = {"attn_drop": "attention weights", "proj_drop": "its result"}


def build_mixer(
    spec: MixerSpec,
    dim: int,
    *,
    num_heads: int,
    grid_size: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    drops: Mapping[str, float],
    **overrides: Any,
) -> nn.Module:
    """Return the mixer that `spec`, a name or a dict of name and options, describes, with `overrides` of its options.

    A mixer that takes `num_heads`, or `grid_size` (rows and columns of the map at the built image size), is given them.

    Raises:
        ValueError: the mixer does not know one of `drops`, dropout rates that are not 0.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    options |= overrides
    known = mixer_options(name)
    for option, value in (("num_heads", num_heads), ("grid_size", grid_size)):
        if option in known:
            options.setdefault(option, value)
    for option, rate in drops.items():
        if option not in known:
            having = [each for each in list_mixers() if option in mixer_options(each)]
            raise ValueError(
                f"{option}_rate={rate}: mixer {name!r} has no dropout of {_DROPS[option]}; those that have it are "
                f"{having}. Give it to single mixers: mixer=[..., dict(name='softmax', {option}={rate})]"
            )
        options.setdefault(option, rate)
    return create_mixer(name, dim, device=device, dtype=dtype, **options)


def build_blocks(
    dim: int,
    block_layer: Any,
    mixer: Any,
    rates: Sequence[float],
    *,
    where: str = "",
    num_heads: int,
    grid_size: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    **options: Any,
) -> list[nn.Module]:
    """Return a block of `dim` channels for each of the drop path rates.

    Args:
        dim: Channels.
        block_layer: Makes a block; one for all, or as `per_block` takes several.
        mixer: The mixer of all, or as `per_block` takes several.
        rates: Rates of stochastic depth.
        where: Which blocks these are, for messages.
        num_heads: Heads of mixers that have heads.
        grid_size: Rows and columns of the map at the built image size.
        attn_drop: Dropout rate of the mixers' attention weights.
        proj_drop: Dropout rate of the mixers' results.
        **options: More options of the blocks.

    Raises:
        TypeError: what makes a block is no class or function.
        ValueError: a mixer has no such dropout, or a block makes its own.
    """
    dd = {"device": device, "dtype": dtype}
    layers = per_block(block_layer, len(rates), "block_layer", where=where)
    for layer in layers:
        if not is_maker(layer):
            raise TypeError(f"block_layer={layer!r} makes no block; give a class or function, as Block is made")
    specs = per_block(mixer, len(rates), "mixer", where=where)
    drops = {name: rate for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)) if rate}
    made: list[nn.Module] = []

    def make(spec: MixerSpec, **overrides: Any) -> nn.Module:
        places = {"num_heads": num_heads, "grid_size": grid_size}
        made.append(build_mixer(spec, dim, drops=drops, **places, **dd, **overrides))
        return made[-1]

    blocks = []
    for layer, spec, rate in zip(layers, specs, rates, strict=True):
        before = len(made)
        blocks.append(layer(dim, mixer=partial(make, spec), drop_path=rate, **options, **dd))
        if drops and len(made) == before:
            raise ValueError(
                f"{next(iter(drops))}_rate={next(iter(drops.values()))}: block {len(blocks) - 1}{where}, a "
                f"{type(blocks[-1]).__qualname__}, has no mixer with such a dropout; leave the rate out"
            )
    return blocks


def mlp_maker(
    mlp_layer: LayerSpec, mlp_ratio: float | None, act_layer: LayerSpec = None, proj_drop_rate: float = 0.0
) -> Callable[..., nn.Module] | None:
    """Return what makes the feed-forward `mlp_layer`, with those of its options that are given.

    Raises:
        TypeError: `mlp_ratio` is no number.
        ValueError: it is not above 0 or not finite, or there is no feed-forward with such an activation or dropout.
    """
    if mlp_ratio is not None:
        check_finite(mlp_ratio=mlp_ratio)
        check_positive(mlp_ratio=mlp_ratio)
    layer = layer_maker("mlp_layer", mlp_layer)
    if layer is not None and mlp_ratio is not None:
        layer = partial(layer, mlp_ratio=mlp_ratio)
    options = {} if act_layer is None else {"act_layer": layer_maker("act_layer", act_layer)}
    if proj_drop_rate and layer is not None:
        options["drop"] = proj_drop_rate
    known = inspect.signature(layer).parameters if options and layer is not None else {}
    for option in options:
        if option not in known:
            given = f"act_layer={act_layer!r}" if option == "act_layer" else f"proj_drop_rate={proj_drop_rate}"
            raise ValueError(
                f"{given} is no option of the feed-forward {_name(layer)}; leave it out, or give another mlp_layer, "
                "such as 'mlp'"
            )
    return partial(layer, **options) if layer is not None and options else layer


def _name(layer: Any) -> str:
    while isinstance(layer, partial):
        layer = layer.func
    return repr(getattr(layer, "__name__", layer))
