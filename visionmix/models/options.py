"""Options of models: which a skeleton knows, and what to give instead of those that only timm's own models have."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from visionmix.registry import constructor_options, nearest

_ANY_SIZE = "every model takes images of any size: leave it out; img_size= sets the size that tensors are stored at"
_OF_MIXER = "it is an option of mixers that have it: mixer=dict(name=..., {option}=...)"
_PREFIX = 'class tokens and registers of plain models are prefix_tokens="first" or prefix_tokens=dict(count=...)'
_INSTEAD = {
    "attn_layer": "give mixer=, a name of visionmix.list_mixers()",
    "block_fn": "give block_layer=, made as visionmix.backbones.Block is",
    "class_token": _PREFIX,
    "conv_mlp": 'give mlp_layer="conv_mlp"',
    "dims": "give embed_dims=",
    "dynamic_img_pad": _ANY_SIZE,
    "dynamic_img_size": _ANY_SIZE,
    "embed_layer": "give stem_layer=",
    "fc_norm": 'the norm is before the pooling; final_norm_layer="none" leaves it out',
    "head_init_scale": "scale model.get_classifier().weight yourself",
    "init_values": "give layer_scale=",
    "kernel_size": _OF_MIXER,
    "kernel_sizes": _OF_MIXER,
    "ls_init_value": "give layer_scale=",
    "no_embed_class": _PREFIX,
    "output_stride": "stages halve the map, always; choose finer maps by features_only=True, out_indices=...",
    "patch_drop_rate": "visionmix.reduction drops tokens, in training too",
    "pos_drop_rate": "position embeddings have no dropout",
    "qk_norm": _OF_MIXER,
    "qkv_bias": _OF_MIXER,
    "reg_tokens": _PREFIX,
    "stem_type": "give stem_layer=",
    "strict_img_size": _ANY_SIZE,
    "weight_init": "parameters are drawn as the papers say; call your own initialisation afterwards",
    "window_size": _OF_MIXER,
}


def check_options(name: str, skeleton: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Raise TypeError where `skeleton`, the class of the model called `name`, does not take one of `options`."""
    known = constructor_options(skeleton)
    for option, value in options.items():
        if option not in known:
            remedy = _INSTEAD.get(option, "").format(option=option)
            remedy = f": {remedy}" if remedy else f"{nearest(option, known)}; its options are {sorted(known)}"
            raise TypeError(f"{name} has no option {option}={value!r}{remedy}")


def check_feature_class(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where `options` ask for a wrapper of timm's that calls a model's children one by one."""
    wrapper = options.get("feature_cls")
    if isinstance(wrapper, str) and wrapper.lower() in ("list", "dict"):
        raise ValueError(
            f"feature_cls={wrapper!r} calls the children of {name} one after another, which its stages do not allow; "
            'leave it out (it is "getter"), or give "hook" or "fx", which return maps as the model has them, NHWC'
        )
