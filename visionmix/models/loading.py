"""Loading weights whole or not at all: the one path of `timm.create_model(..., pretrained=True)` and of the tools."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from visionmix.models.family import is_family_model, variant_of
from visionmix.models.keys import KeyMap, matches, regrouped
from visionmix.models.weights import read_checkpoint, unwrap

_logger = logging.getLogger(__name__)

_SHOWN_KEYS = 6


def load_checkpoint(
    model: nn.Module, source: str | Path | Mapping[str, Tensor], *, name: str | None = None
) -> list[str]:
    """Load a checkpoint, under its authors' keys or the model's own, into `model`: all of it or nothing.

    The classifier keeps its fresh weights, with a warning, where the model was built with another number of classes
    than its pretrained cfg says, or where the file has no head. Every other difference is an error, but for the first
    convolution of other channels and size-tied tensors of another image size, which are adapted.

    Example:
        ``load_checkpoint(timm.create_model("vmamba_tiny"), "vssm1_tiny_0230s_ckpt_epoch_264.pth")``

    Args:
        model: A model of this library, or any other of timm's, for which only its own keys are known.
        source: A file (.pth, .ckpt, .safetensors), a folder that `timm.models.save_for_hf` wrote, or a state dict,
            wrapped or not.
        name: The model's name, for one that `timm.create_model` did not make.

    Returns:
        Keys of the model that keep their fresh values, since the checkpoint has none for them.

    Raises:
        TypeError: `source` is none of these, `model` no classifier, or `name` no str.
        ValueError: `name` is unknown or needed, the model has no storage, the file is damaged, or its keys or shapes
            differ; nothing was loaded.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(source, str | Path | Mapping):
        raise TypeError(f"source is a {type(source).__name__}; give a path, a folder or a state dict")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name={name!r} is no name of a model; give a str, or leave it out")
    model = getattr(model, "_orig_mod", model)  # that torch.compile wraps
    if not hasattr(model, "num_classes"):
        raise TypeError(
            f"model is a {type(model).__name__} and no classifier; for maps of a checkpoint call "
            "timm.create_model(NAME, features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=PATH))"
        )
    cfg = PretrainedCfg(**(getattr(model, "pretrained_cfg", None) or {}))
    given, name = name, name or cfg.architecture
    if not name:
        raise ValueError("the model has no pretrained_cfg that says its architecture; give name='vmamba_tiny' or such")
    keys = KeyMap()
    if is_family_model(name) or given not in (None, cfg.architecture):
        layout = variant_of(name).layout
        keys = layout.keys
        cfg = replace(cfg, first_conv=layout.first_conv, classifier=layout.classifier)
    tensors = unwrap(source, "source") if isinstance(source, Mapping) else read_checkpoint(source)
    return load_tensors(model, tensors, keys, cfg, name=name)


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], keys: KeyMap, cfg: PretrainedCfg, *, name: str
) -> list[str]:
    """Load `tensors`, under a published file's keys or the model's own, into `model`: all of them or none.

    Only these may differ: the classifier, where `model` has another number of classes than `cfg` says, or where the
    file has no head at all; the first convolution, whose input channels are summed or repeated to fit; size-tied
    tensors, which the modules that own them resample by their method ``fit_tensor(name, tensor)``; and tensors that
    files lack according to `keys`.

    Args:
        model: Receives the tensors.
        tensors: The file's tensors, by key.
        keys: How a published file's keys become the model's.
        cfg: Names the first convolution and the classifier, and says how many classes the file should have.
        name: The model's name, for messages.

    Returns:
        Keys of the model that keep their fresh values, since the file has none for them.

    Raises:
        ValueError: keys or shapes differ otherwise, or a tensor is not dense, not of floating-point numbers where the
            model's is, or not finite; the message lists them, and nothing is loaded.
    """
    own = model.state_dict()
    mapped = _under_own_names(tensors, keys, own, name)
    check_numbers(mapped, own, name)
    for key in mapped.keys() & own.keys():
        mapped[key] = _fitted(model, key, mapped[key], own[key], keys.reshape, name)
    for layer in _names(cfg.first_conv):
        _adapt_channels(f"{layer}.weight", mapped, own, name)

    fresh = [key for key in own if key not in mapped and matches(keys.lacks, key)]
    fresh_head, reason = _settle_classifier(model, mapped, own, cfg)
    fresh += fresh_head
    differences = {
        "missing": [key for key in own if key not in mapped and key not in fresh],
        "unknown": [key for key in mapped if key not in own],
        "of another shape": [
            f"{key} is {tuple(mapped[key].shape)}, the model's {tuple(value.shape)}"
            for key, value in own.items()
            if key in mapped and mapped[key].shape != value.shape
        ],
    }
    if any(differences.values()):
        shown = "; ".join(f"{kind}: {_shorten(keys)}" for kind, keys in differences.items() if keys)
        remedy = _classifier_remedy(model, mapped, own, cfg, name) or (
            "build the model that the file is of, with its num_classes, in_chans and img_size free to differ"
        )
        raise ValueError(f"these weights are not {name}'s ({shown}). Nothing was loaded; {remedy}")
    if any(value.is_meta for value in own.values()):
        raise ValueError(
            f"{name} lies on the device meta, which holds no numbers; create it with device='cpu', or call "
            "model.to_empty(device='cpu') first"
        )
    if reason:
        _logger.warning("%s: %s; the model's keeps its fresh weights", name, reason)
    # Not strict: a parameter that stays fresh may share storage with a loaded one.
    model.load_state_dict(mapped, strict=False)
    return fresh


def check_numbers(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    """Check that tensors are dense, and finite floating-point numbers where the model's tensors `own` are such.

    Raises:
        ValueError: there are others; the message lists them.
    """
    problems = []
    for key in tensors.keys() & own.keys():
        tensor, mine = tensors[key], own[key]
        if tensor.is_meta:
            problems.append(f"{key} lies on the device meta, without numbers")
        elif tensor.layout is not torch.strided or tensor.is_quantized:
            problems.append(f"{key} is {tensor.layout}, the model's dense")
        elif mine.is_floating_point() and not tensor.is_floating_point():
            problems.append(f"{key} is {tensor.dtype} in the file, {mine.dtype} in the model")
        elif mine.is_floating_point() and not tensor.isfinite().all() and mine.isfinite().all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        raise ValueError(
            f"these weights are no weights of {name}: {_shorten(sorted(problems))}. Nothing was loaded; save the "
            "tensors anew as they were trained, or take an earlier checkpoint"
        )


def _under_own_names(
    tensors: Mapping[str, Tensor], keys: KeyMap, own: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Return `tensors` under the model's names: unchanged or renamed by `keys`, whichever fits better."""

    def fit(candidate: Mapping[str, Tensor]) -> tuple[int, int]:
        known = candidate.keys() & own.keys()
        return sum(candidate[key].shape == own[key].shape for key in known), len(known)

    try:
        mapped = keys(tensors)
    except Exception as error:  # a transform met a tensor of another layout
        if 2 * fit(tensors)[1] > len(own):
            return dict(tensors)
        raise ValueError(f"these weights are not {name}'s: {error}. Nothing was loaded") from error
    return dict(tensors) if fit(tensors) >= fit(mapped) else mapped


def _fitted(model: nn.Module, key: str, tensor: Tensor, own: Tensor, reshape: bool, name: str) -> Tensor:
    """Return `tensor` regrouped or resampled to the shape of `own` where that is allowed, and unchanged otherwise."""
    if tensor.is_floating_point():
        tensor = tensor.to(own.dtype)
    if reshape:
        tensor = regrouped(tensor, own.shape)
    owner, _, leaf = key.rpartition(".")
    fit = getattr(model.get_submodule(owner), "fit_tensor", None)
    if tensor.shape == own.shape or fit is None:
        return tensor
    fitted = fit(leaf, tensor)
    if fitted.numel() != tensor.numel():
        _logger.info("%s: %s is resampled from %s to %s", name, key, tuple(tensor.shape), tuple(fitted.shape))
    return fitted


def _adapt_channels(key: str, mapped: dict[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    """Give the first convolution `key` in `mapped` the model's input channels, where nothing else differs."""
    if key not in mapped or key not in own or mapped[key].ndim < 3 or mapped[key].ndim != own[key].ndim:
        return
    tensor, (filters, channels, *kernel) = mapped[key], own[key].shape
    given = tensor.shape[1]
    if given == channels or (tensor.shape[0], *tensor.shape[2:]) != (filters, *kernel):
        return
    _logger.info("%s: %s is adapted from %d channels to in_chans=%d", name, key, given, channels)
    if channels == 1:
        mapped[key] = tensor.sum(dim=1, keepdim=True)
    else:  # as timm does: repeated in turn, and scaled so that the sum over channels stays
        mapped[key] = torch.cat([tensor] * -(-channels // given), dim=1)[:, :channels] * (given / channels)


def _names(names: str | tuple[str, ...] | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _classifier_keys(cfg: PretrainedCfg) -> list[str]:
    return [f"{layer}.{leaf}" for layer in _names(cfg.classifier) for leaf in ("weight", "bias")]


def _settle_classifier(
    model: nn.Module, mapped: dict[str, Tensor], own: Mapping[str, Tensor], cfg: PretrainedCfg
) -> tuple[list[str], str]:
    """Remove from `mapped` a classifier that the model replaces on purpose.

    Returns:
        Keys of the head that stay fresh, and why, or "".
    """
    classifier = _classifier_keys(cfg)
    in_file = [key for key in classifier if key in mapped]
    if not in_file:
        # The head's other layers, such as a projection, are all there or missing with it.
        heads = tuple({f"{layer.partition('.')[0]}." for layer in _names(cfg.classifier)})
        around = [key for key in own if key.startswith(heads) and key not in classifier] if heads else []
        fresh = [] if any(key in mapped for key in around) else around
        fresh += [key for key in classifier if key in own]
        return fresh, "the file has no classifier" if fresh else ""
    if model.num_classes == 0:
        for key in in_file:
            if key not in own:
                del mapped[key]
        return [], ""
    counts = {mapped[key].shape[:1] for key in in_file}
    if model.num_classes != cfg.num_classes and counts.isdisjoint(own[key].shape[:1] for key in in_file if key in own):
        reason = f"the file's classifier has {mapped[in_file[0]].shape[0]} classes, num_classes={model.num_classes}"
        for key in in_file:
            del mapped[key]
        return [key for key in classifier if key in own], reason
    return [], ""


def _classifier_remedy(
    model: nn.Module, mapped: Mapping[str, Tensor], own: Mapping[str, Tensor], cfg: PretrainedCfg, name: str
) -> str:
    """Return the call that loads a file that differs only in its classifier, or "" where more differs."""
    classifier = [key for key in _classifier_keys(cfg) if key in own]
    differing = [key for key, value in own.items() if key not in mapped or mapped[key].shape != value.shape]
    if not differing or not set(differing) <= set(classifier) or not mapped.keys() <= own.keys():
        return ""
    if any(key not in mapped or mapped[key].ndim == 0 for key in classifier):
        return ""
    given = mapped[classifier[0]].shape[0]
    call = f"timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file=..., num_classes={given}))"
    return (
        f"the file's classifier has {given} classes, the model's {model.num_classes}: {call} loads all of it, and "
        f"num_classes={model.num_classes} beside the overlay keeps a fresh classifier"
    )


def _shorten(keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN_KEYS} more" if keys[_SHOWN_KEYS:] else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more
