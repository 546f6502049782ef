"""Reading published checkpoints and loading them whole or not at all."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

_WRAPPERS = ("state_dict_ema", "model_ema", "model", "state_dict", "module")
_INERT_MODULES = ("argparse", "builtins", "collections", "numpy", "omegaconf", "pathlib", "types", "typing", "yacs")
_SHOWN_KEYS = 6


@dataclass(frozen=True)
class KeyMap:
    """How the keys of a family's published files become the model's.

    Every key of the file is either renamed (or kept) to a key of the model, or dropped by a rule that says why.

    Attributes:
        rename: (pattern, replacement) pairs for `re.sub`, applied in turn to every key.
        drop: Reason by pattern; a key of the file that a pattern matches is left out.
        transform: Makes of a model's key and the file's tensor the tensor to load, where more than a name differs; or
            several tensors by key, where the file has in one what are several here.
        join: Names of the file's modules by the name of the model's one that they make, their tensors one behind the
            other along the first axis: ``{"qkv": ("q", "kv")}``.
    """

    rename: Sequence[tuple[str, str | Callable[[re.Match], str]]] = ()
    drop: Mapping[str, str] = field(default_factory=dict)
    transform: Callable[[str, Tensor], Tensor | Mapping[str, Tensor]] | None = None
    join: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `tensors`, as the file has them, under the model's names."""
        mapped = {}
        for source, tensor in tensors.items():
            if any(re.search(pattern, source) for pattern in self.drop):
                continue
            key = source
            for pattern, replacement in self.rename:
                key = re.sub(pattern, replacement, key)
            made = self.transform(key, tensor) if self.transform else tensor
            for each, value in made.items() if isinstance(made, Mapping) else ((key, made),):
                if each in mapped:
                    raise ValueError(
                        f"two keys of the file become {each!r}, one of them {source!r}; this is another model's"
                    )
                mapped[each] = value
        for whole, parts in self.join.items():
            for key in [key for key in mapped if f".{parts[0]}." in key]:
                keys = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
                if all(each in mapped for each in keys):
                    mapped[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([mapped.pop(each) for each in keys])
        return mapped


def reshape_to(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """Return a transform for `KeyMap` that gives a tensor the shape of `model`'s, where only the grouping differs.

    Neighbouring axes may be joined, one axis split, axes of length 1 added or dropped: a linear layer saved as a 1x1
    convolution, or directions stacked along the channels. Any other tensor stays as it is.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items()}

    def transform(key: str, tensor: Tensor) -> Tensor:
        shape = shapes.get(key, tensor.shape)
        ends, own_ends = ({math.prod(each[: axis + 1]) for axis in range(len(each))} for each in (tensor.shape, shape))
        regrouped = tensor.numel() == math.prod(shape) and (ends <= own_ends or own_ends <= ends)
        return tensor.reshape(shape) if regrouped else tensor

    return transform


def split_class_position(key: str, tensor: Tensor, place: str = "first") -> Tensor | dict[str, Tensor]:
    """Return the cells' and the class token's positions that a file has in one, (1, 1 + cells, channels), by key.

    Part of a `KeyMap.transform`; tensors of other keys than the skeleton's ``pos_embed.weight`` stay as they are.
    """
    if key != "pos_embed.weight" or tensor.ndim != 3:
        return tensor
    at = (tensor.shape[1] - 1) // 2 if place == "middle" else 0
    cells = torch.cat([tensor[:, :at], tensor[:, at + 1 :]], dim=1)
    return {key: cells, "class_token.pos_embed": tensor[:, at : at + 1]}


class _Inert(dict):
    """Stands in for whatever configuration object lies in a checkpoint; takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by key, unwrapped from {'model': ...}, 'module.' prefixes and the like.

    Reads safetensors, or PyTorch files without running code of theirs: configuration objects inside (of yacs,
    argparse, omegaconf, numpy) become inert stand-ins. Where a file holds an average of the weights beside them, the
    average is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds objects of other classes, or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is no file; give a checkpoint (.pth, .ckpt, .safetensors)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"path={str(path)!r} is no whole safetensors file ({error}); fetch it again") from error
    try:
        with torch.serialization.safe_globals(_stand_ins(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r} cannot be read without running code of its own, or is damaged ({error}); fetch it "
            "again, or save its tensors alone, e.g. as safetensors"
        ) from error
    return unwrap(content, str(path))


def _stand_ins(path: Path) -> list:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old or damaged file: torch.load says what is wrong with it
        return []
    return [(_Inert, name) for name in names if name.split(".")[0] in _INERT_MODULES]


def unwrap(content: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors of a loaded checkpoint by key; see `read_checkpoint`.

    Raises:
        ValueError: there are no tensors in it.
    """
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping) and content[wrapper]:
            content = content[wrapper]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{name} holds no tensors by key; give a state dict, alone or under one of {_WRAPPERS}")
    while all(key.startswith(("module.", "_orig_mod.")) for key in tensors):
        tensors = {key.split(".", 1)[1]: value for key, value in tensors.items()}
    return tensors


def load_pretrained(
    model: nn.Module,
    cfg: PretrainedCfg,
    key_map: KeyMap,
    *,
    name: str,
    page: str = "",
    cache_dir: str | Path | None = None,
) -> None:
    """Load the weights that `cfg` names into `model`, from a state dict, a file, a hub or an address.

    Raises:
        ValueError: `cfg` names no weights (the message says where they lie and how to give a file), or what it names is
            not `model`'s.
        FileNotFoundError: there is no such file.
    """
    if cfg.state_dict:
        tensors = unwrap(cfg.state_dict, "pretrained_cfg.state_dict")
    elif cfg.file:
        tensors = read_checkpoint(cfg.file)
    elif cfg.hf_hub_id or cfg.url:
        tensors = read_checkpoint(_download(cfg, name, cache_dir))
    else:
        where = f"; its authors keep weights at {page}" if page else "; its authors published none"
        raise ValueError(f"pretrained=True: {name} has no weights that can be fetched{where}. {_how_to_give(name)}")
    load_weights(model, tensors, key_map, published_classes=cfg.num_classes, name=name)


def _how_to_give(name: str) -> str:
    return (
        f"With a file at hand: timm.create_model({name!r}, pretrained=True, "
        "pretrained_cfg_overlay=dict(file='/path/to/file'))"
    )


def weights_file(url: str, name: str) -> str:
    """Return the file's name in an address, or one after the model's `name` where the address has none."""
    file = Path(urlsplit(url).path).name
    return file if Path(file).suffix else f"{name}.pth"


def _download(cfg: PretrainedCfg, name: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from torch.hub import download_url_to_file, get_dir

    try:
        if cfg.hf_hub_id:
            repository, _, revision = cfg.hf_hub_id.partition("@")
            return Path(
                hf_hub_download(repository, cfg.hf_hub_filename, revision=revision or None, cache_dir=cache_dir)
            )
        folder = Path(cache_dir) if cache_dir else Path(get_dir()) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / weights_file(cfg.url, name)
        if not path.exists():
            download_url_to_file(cfg.url, str(path))  # writes aside, then renames
        return path
    except Exception as error:
        source = f"{cfg.hf_hub_id}/{cfg.hf_hub_filename}" if cfg.hf_hub_id else cfg.url
        raise ValueError(f"pretrained=True: {source} cannot be fetched ({error}). {_how_to_give(name)}") from error


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    key_map: KeyMap,
    *,
    published_classes: int = 1000,
    name: str = "model",
) -> None:
    """Load `tensors`, under a published file's names or the model's own, into `model`: all of them or none.

    Only these may differ: the classifier, where `model` has another number of classes than `published_classes`; the
    first convolution, whose input channels are summed or repeated to fit; size-tied tensors, which the modules that own
    them resample by their method ``fit_tensor(name, tensor)``.

    Raises:
        ValueError: keys or shapes differ otherwise; the message lists them.
    """
    own = model.state_dict()
    mapped = dict(tensors) if own.keys() >= tensors.keys() else key_map(tensors)
    classifier = {f"head.fc.{leaf}" for leaf in ("weight", "bias")}
    if model.num_classes != published_classes:
        differing = [key for key in classifier & mapped.keys() if key not in own or mapped[key].shape != own[key].shape]
        if differing:
            _logger.info("%s: the classifier keeps its fresh weights for num_classes=%d", name, model.num_classes)
            for key in classifier:
                mapped.pop(key, None)
                if key in own:
                    mapped[key] = own[key]
    for key in [key for key in mapped.keys() & own.keys() if mapped[key].shape != own[key].shape]:
        owner, _, leaf = key.rpartition(".")
        fit = getattr(model.get_submodule(owner), "fit_tensor", None)
        if fit is not None:
            given, mapped[key] = mapped[key], fit(leaf, mapped[key])
            if given.numel() != mapped[key].numel():
                sizes = tuple(given.shape), tuple(mapped[key].shape)
                _logger.info("%s: %s is resampled from %s to %s", name, key, *sizes)
    first = "stem.conv1.weight"
    if first in mapped and first in own and _differ_in_chans(mapped[first], own[first]):
        _logger.info("%s: %s is adapted to in_chans=%d", name, first, own[first].shape[1])
        mapped[first] = adapt_input_conv(own[first].shape[1], mapped[first])

    differences = {
        "missing": [key for key in own if key not in mapped],
        "unknown": [key for key in mapped if key not in own],
        "of another shape": [
            f"{key} is {tuple(mapped[key].shape)}, the model's {tuple(value.shape)}"
            for key, value in own.items()
            if key in mapped and mapped[key].shape != value.shape
        ],
    }
    if any(differences.values()):
        shown = "; ".join(f"{kind}: {_shorten(keys)}" for kind, keys in differences.items() if keys)
        raise ValueError(
            f"these weights are not {name}'s ({shown}). Nothing was loaded; build the model that the file is of, with "
            "its num_classes, in_chans and img_size free to differ"
        )
    model.load_state_dict(mapped, strict=True)


def _shorten(keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN_KEYS} more" if keys[_SHOWN_KEYS:] else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more


def _differ_in_chans(tensor: Tensor, own: Tensor) -> bool:
    return (
        tensor.ndim == own.ndim == 4
        and tensor.shape[1] == 3 != own.shape[1]
        and tensor.shape[0] == own.shape[0]
        and tensor.shape[2:] == own.shape[2:]
    )
