"""Layers by name, for recipes in YAML: ``mlp_layer: swiglu`` or ``{name: swiglu, multiple_of: 32}``."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, get_act_layer, get_norm_layer
from torch import nn

from visionmix.layers.bottleneck import BottleneckStem
from visionmix.layers.downsample import ConvDownsample, NormConvDownsample, PatchMerging
from visionmix.layers.feed_forward import ChannelMix, ConvGlu, ConvMlp, mlp, swiglu
from visionmix.layers.head import CornerHead, ProjectionHead, TokenHead
from visionmix.layers.monarch import MonarchMlp
from visionmix.layers.norm import BatchNorm
from visionmix.layers.position import ConvPosition, PositionEmbedding
from visionmix.layers.rep_norm import LinearNorm, RepBN
from visionmix.layers.stem import conv_stem, deep_conv_stem, deep_patch_stem, patch_stem
from visionmix.registry import check_kind, is_maker, nearest, out_of_range

Layer = Callable[..., nn.Module]
LayerSpec = str | Mapping[str, Any] | Layer | None
NONE = "none"  # of an option that may be None

# Norms over the last axis, as timm calls them; its batch norm wants channels first, so ours replaces it.
_NORMS = ("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32", "simplenorm", "simplenormfp32")
_ACTIVATIONS = (
    "elu", "gelu", "gelu_tanh", "hard_sigmoid", "hard_swish", "identity", "leaky_relu", "mish", "relu", "relu6",
    "sigmoid", "silu", "tanh",
)  # fmt: skip
_LAYERS: dict[str, dict[str, Layer]] = {
    "stem_layer": {
        "conv": conv_stem,
        "patch": patch_stem,
        "deep_conv": deep_conv_stem,
        "deep_patch": deep_patch_stem,
        "bottleneck": BottleneckStem,
    },
    "downsample_layer": {
        "conv": ConvDownsample,
        "norm_conv": NormConvDownsample,
        "patch_merging": PatchMerging,
    },
    "mlp_layer": {
        "mlp": mlp,
        "swiglu": swiglu,
        "conv_mlp": ConvMlp,
        "conv_glu": ConvGlu,
        "channel_mix": ChannelMix,
        "monarch_mlp": MonarchMlp,
    },
    "norm_layer": {
        "batchnorm": BatchNorm,
        "linearnorm": LinearNorm,
        "repbn": RepBN,
        **{name: get_norm_layer(name) for name in _NORMS},
    },
    "act_layer": {name: get_act_layer(name) for name in _ACTIVATIONS},
    "pos_embed": {"learned": PositionEmbedding},
    "pos_layer": {"conv": ConvPosition},
    "head_layer": {
        "pool": partial(ClassifierHead, input_fmt="NHWC"),
        "token": TokenHead,
        "projection": ProjectionHead,
        "corner": CornerHead,
    },
}


def layer_names(kind: str) -> list[str]:
    """Return the names of layers of a kind: "stem_layer", "mlp_layer", "norm_layer" and the other options' names."""
    return sorted(_LAYERS[kind])


def layer_maker(kind: str, spec: LayerSpec, option: str | None = None) -> Layer | None:
    """Return what makes the layer that `spec` describes: a name, a dict of name and options, a callable, or none.

    Args:
        kind: One of "stem_layer", "downsample_layer", "mlp_layer", "norm_layer", "act_layer", "pos_embed", "pos_layer"
            and "head_layer".
        spec: The layer; a callable and None are returned as they are, and "none" is None, which
            `timm.create_model` takes for an option that was not given.
        option: Name of the option, for messages; None for `kind`.

    Raises:
        TypeError: `spec` is none of these.
        ValueError: the name or one of the options is unknown (the message has the nearest one).
    """
    if isinstance(spec, str) and spec == NONE:
        spec = None
    if spec is None and kind == "stem_layer":
        raise ValueError(f"{option or kind}={spec!r}: a model needs one; give one of {sorted(_LAYERS[kind])}")
    if spec is None or is_maker(spec):
        return spec
    option, known = option or kind, _LAYERS[kind]
    if isinstance(spec, nn.Module):
        raise TypeError(f"{option}={spec!r} is a module; every block makes its own, so give its class or name")
    if not isinstance(spec, str | Mapping):
        raise TypeError(f"{option}={spec!r} is not a layer; give a name, dict(name=..., options) or a callable")
    options = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else options.pop("name", None)
    if name is None:
        raise ValueError(f"{option}={spec!r} has no 'name'; give a name or dict(name=..., options)")
    key = str(name).replace("_", "") if kind == "norm_layer" else name
    if key not in known:
        raise ValueError(f"{option}={name!r} is unknown{nearest(str(name), known)}; give one of {sorted(known)}")
    layer = known[key]
    signature = inspect.signature(layer).parameters
    parameters = signature.keys() - {"device", "dtype", "dd"}
    for each, value in options.items():
        if each not in parameters:
            raise ValueError(
                f"{option}={name!r} has no option {each}={value!r}{nearest(str(each), parameters)}; its options are "
                f"{sorted(parameters)}"
            )
        if each in _LAYERS:
            options[each] = layer_maker(each, value, f"{option}.{each}")
        else:
            check_kind(f"{option}={name!r}", each, value, signature[each].annotation)
    if found := out_of_range(options):
        raise ValueError(f"{option}={name!r}: {found[1]}")
    return partial(layer, **options) if options else layer
