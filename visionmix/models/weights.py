"""Where published weights lie, and how they are fetched and read."""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import Tensor

_logger = logging.getLogger(__name__)

_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "model", "state_dict", "module")
_INERT_MODULES = ("argparse", "builtins", "collections", "numpy", "omegaconf", "pathlib", "types", "typing", "yacs")
# Files that a folder or a hub's repository is searched for, in timm's order.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_FOLDER_FILES = (*_HUB_FILES, "pytorch_model.pth", "model.pth")
_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".bin")


@dataclass(frozen=True)
class Weights:
    """A published file of weights, and the facts of a model with them.

    Attributes:
        url: Direct address.
        hf_hub_id: Repository on the Hugging Face hub.
        file: Name of the file in that repository; empty for the hub's default names.
        sha256: Checksum, where one is published.
        page: Where a person finds the file, if it has no direct address.
        input_size: Side of the images in pixels, or (height, width), if it is not the size that the variant is built
            at.
        crop_pct: Part of the resized test image that is cut out; None for 0.875 at 224 pixels and 1 at other sizes.
        crop_mode: How test images are resized before that: "center" the shorter side, "squash" both, at the cost of the
            aspect ratio, "border" the longer one.
        mean: Of each channel, of pixels in 0..1, which images are normalised by; as for `std`.
        std: Deviation of each channel.
        num_classes: Outputs of the classifier.
        top1: Published ImageNet-1k top-1 accuracy in percent, or None.
        gmacs: Published multiply-adds at `input_size`, in thousands of millions, where the variant's are of another
            size.
        license: Licence, as the hub spells it; None for the family's.
        paper: Where these weights are described; None for the family's.
        paper_name: The title of `paper`.
        options: Options that replace the variant's in a model with these weights.
    """

    url: str = ""
    hf_hub_id: str = ""
    file: str = ""
    sha256: str = ""
    page: str = ""
    input_size: int | tuple[int, int] | None = None
    crop_pct: float | None = None
    crop_mode: str = "center"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    num_classes: int = 1000
    top1: float | None = None
    gmacs: float | None = None
    license: str | None = None
    paper: str | None = None
    paper_name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where the file lies: an address to fetch it from, else a page, else ""."""
        return self.url or (f"https://huggingface.co/{self.hf_hub_id}" if self.hf_hub_id else self.page)

    @property
    def origin(self) -> str:
        """The page that a person finds the weights on: the authors' repository, a page, or ""."""
        if self.page or self.hf_hub_id:
            return self.page or f"https://huggingface.co/{self.hf_hub_id}"
        parts = urlsplit(self.url)
        owner_and_name = parts.path.split("/")[1:3]
        return f"https://github.com/{'/'.join(owner_and_name)}" if parts.netloc == "github.com" else ""


class _Inert(dict):
    """Stands in for any configuration object in a checkpoint; takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by key, unwrapped from {'model': ...}, 'module.' prefixes and the like.

    Reads safetensors, or PyTorch files without running code from them: configuration objects inside (of yacs, argparse,
    omegaconf, numpy) become inert stand-ins. Where a file holds an average of the weights beside them, the average is
    taken. In a folder, the file is read that timm would read.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: the file is damaged, holds objects of other classes, or no tensors.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; give a checkpoint (.pth, .ckpt, .safetensors)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"path={str(path)!r} is not a whole safetensors file ({error}); fetch it again") from error
    try:
        with torch.serialization.safe_globals(_stand_ins(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        # PyTorch's message goes on for paragraphs, which advise to run the file's code.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if foreign:
            reason = f"it holds objects of {foreign[1]}"
        elif path.stat().st_size == 0:
            reason = "it is empty"
        raise ValueError(
            f"path={str(path)!r} cannot be read without running code of its own, or is damaged ({reason}); fetch it "
            "again, or save its tensors alone, e.g. as safetensors"
        ) from error
    return unwrap(content, str(path))


def _stand_ins(path: Path) -> list:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old or damaged file: torch.load says what is wrong with it
        return []
    return [(_Inert, name) for name in names if name.split(".")[0] in _INERT_MODULES]


def _file_in(folder: Path) -> Path:
    """Return the checkpoint in `folder` that timm would read."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    for ending in _ENDINGS:
        files = sorted(folder.glob(f"*{ending}"))
        if files[1:]:
            _logger.warning("%s has %d files that end in %s; %s is read", folder, len(files), ending, files[0].name)
        if files:
            return files[0]
    raise FileNotFoundError(f"path={str(folder)!r} has no checkpoint; give a folder with {_FOLDER_FILES[0]}, or a file")


def unwrap(content: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors of a loaded checkpoint by key; see `read_checkpoint`.

    Raises:
        ValueError: there are no tensors in it.
    """
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and _holds_tensors(content.get(wrapper)):
            content = content[wrapper]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{name} holds no tensors by key; give a state dict, alone or under one of {_WRAPPERS}")
    while all(key.startswith(("module.", "_orig_mod.")) for key in tensors):
        tensors = {key.split(".", 1)[1]: value for key, value in tensors.items()}
    return tensors


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(
        isinstance(value, Tensor) or (key in _WRAPPERS and _holds_tensors(value)) for key, value in content.items()
    )


def fetch(cfg: PretrainedCfg, name: str, weights: Weights, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Return the tensors that `cfg` names, whose source is chosen as timm chooses it.

    A cfg of timm's sources "hf-hub" and "local-dir" is read from there. Any other is read from the first that it names:
    a state dict, a file or folder, a repository on the hub, an address.

    Args:
        cfg: Where the weights lie.
        name: The model's name, for messages.
        weights: The published weights that are named to a user where `cfg` names none; a file fetched from their
            address must have their checksum.
        cache_dir: Where fetched files are kept; None for the hub's and torch's own folders.

    Raises:
        ValueError: `cfg` names no weights, or they cannot be fetched or read.
        FileNotFoundError: there is no such file.
    """
    if cfg.source == "local-dir":
        return read_checkpoint(cfg.file)
    if cfg.source != "hf-hub":
        if cfg.state_dict:
            return unwrap(cfg.state_dict, "pretrained_cfg.state_dict")
        if cfg.file:
            return read_checkpoint(cfg.file)
    if not (cfg.hf_hub_id or cfg.url):
        where = f"its authors keep weights at {weights.page}" if weights.page else "its authors published none"
        raise ValueError(
            f"pretrained=True: {name} has no weights that can be fetched; {where}. {_how_to_give_a_file(name)}"
        )
    try:
        path = _from_hub(cfg, cache_dir) if cfg.hf_hub_id else _from_address(cfg.url, name, cache_dir)
    except Exception as error:
        file = " or ".join(_hub_names(cfg.hf_hub_filename))
        source = f"{cfg.hf_hub_id}/{file}" if cfg.hf_hub_id else cfg.url
        raise ValueError(
            f"pretrained=True: {source} cannot be fetched ({error}). {_how_to_give_a_file(name)}"
        ) from error
    published = (cfg.hf_hub_id, cfg.hf_hub_filename) if cfg.hf_hub_id else cfg.url
    if weights.sha256 and published in ((weights.hf_hub_id, weights.file), weights.url):
        _check_sum(path, weights.sha256)
    return read_checkpoint(path)


def _how_to_give_a_file(name: str) -> str:
    return (
        f"With a file at hand: timm.create_model({name!r}, pretrained=True, "
        "pretrained_cfg_overlay=dict(file='/path/to/file')), or in commands --checkpoint /path/to/file"
    )


def file_name(url: str) -> str:
    """Return the file's name in an address, or "" where it has none."""
    file = Path(urlsplit(url).path).name
    return file if Path(file).suffix else ""


def _from_hub(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError

    repository, _, revision = cfg.hf_hub_id.partition("@")
    *others, last = _hub_names(cfg.hf_hub_filename)

    def download(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir))

    for name in others:
        try:
            return download(name)
        except (EntryNotFoundError, FileNotFoundError):
            _logger.info("%s has no %s", repository, name)
    return download(last)


def _hub_names(file: str | None) -> list[str]:
    """Return the names under which to look for `file` on the hub: a .bin file is looked for as safetensors first."""
    if not file or file == _HUB_FILES[1]:
        return list(_HUB_FILES)
    return [f"{file[:-4]}.safetensors", file] if file.endswith(".bin") else [file]


def _from_address(url: str | tuple[str, str], name: str, cache_dir: str | Path | None) -> Path:
    from torch.hub import download_url_to_file, get_dir

    if isinstance(url, str):
        # Addresses without a file's name differ by what else is in them.
        file = file_name(url) or f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.pth"
    else:
        url, file = url
    folder = Path(cache_dir) if cache_dir else Path(get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    if not path.exists():
        download_url_to_file(url, str(path))  # writes aside, then renames
    return path


def _check_sum(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256.lower():
        raise ValueError(
            f"{path} has the SHA-256 sum {digest.hexdigest()}, not the published {sha256}; delete it and fetch it again"
        )
