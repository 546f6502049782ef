"""Recipes: YAML files read into typed dataclasses, every key and type checked.

    base: defaults.yaml        # optional: a recipe beside this one, whose values this one overrides
    model: {name: vig_s, kwargs: {drop_path_rate: 0.2}}
    optimizer: {lr: 5.0e-4, weight_decay: 0.1}
    schedule: {epochs: 300}

A recipe is named by its path, or by its name inside the package: `imagenet/vig_s.yaml`.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from visionmix.registry import close_matches


@dataclass
class ModelRecipe:
    """The model: `timm.create_model(name, num_classes=..., **kwargs)`."""

    name: str = "vig_s"
    kwargs: dict = field(default_factory=dict)
    pretrained: bool = False


@dataclass
class DataRecipe:
    """The images, and how they reach the model.

    Attributes:
        path: folder with train/CLASS/* and val/CLASS/*.
        image_size: side of the model's input in pixels.
        batch_size: images a process takes at each step.
        workers: data-loading processes of each training process.
        interpolation: of resizing: "bicubic", "bilinear" or "random" (training only).
        crop_pct: at test the shorter side is resized to image_size / crop_pct, then the centre is cut out.
        mean: of each channel, of pixels in 0..1; None takes the model's own.
        std: of each channel, of pixels in 0..1; None takes the model's own.
    """

    path: str | None = None
    image_size: int = 224
    batch_size: int = 128
    workers: int = 8
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class AugmentRecipe:
    """Augmentation of training images, as `timm.data.create_transform` and `timm.data.Mixup` understand it.

    Attributes:
        scale: least and greatest area of the random crop, as a fraction of the image.
        ratio: least and greatest aspect ratio of the random crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; unused beside auto_augment.
        auto_augment: policy, e.g. "rand-m9-mstd0.5-inc1"; None for none.
        erase_prob: probability of random erasing.
        erase_mode: what fills an erased box: "const", "rand" (one colour) or "pixel" (noise).
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        mix_prob: probability that a batch is mixed at all.
        mix_switch_prob: probability of CutMix where both are on.
        mix_mode: one mixing strength a "batch", "pair" or "elem".
    """

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    erase_prob: float = 0.0
    erase_mode: str = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: str = "batch"


@dataclass
class OptimizerRecipe:
    """The optimiser, by its timm name, and what goes with its step.

    Biases, one-dimensional parameters and those of the model's `no_weight_decay()` are not decayed.

    Attributes:
        name: as `timm.optim.list_optimizers()` lists it.
        lr: peak learning rate, for a total batch of `lr_batch`.
        lr_batch: lr, warmup_lr and min_lr are multiplied by (total batch / lr_batch); None takes them as they are.
        weight_decay: decoupled, as AdamW has it.
        kwargs: further arguments of the optimiser, e.g. {betas: [0.9, 0.999], eps: 1.0e-8}.
        clip_grad: greatest norm of the gradient; None for no clipping.
    """

    name: str = "adamw"
    lr: float = 5e-4
    lr_batch: int | None = 512
    weight_decay: float = 0.05
    kwargs: dict = field(default_factory=dict)
    clip_grad: float | None = None


@dataclass
class ScheduleRecipe:
    """The learning rate over time: linear warm-up from warmup_lr to lr, then `name` down to min_lr, step by step."""

    name: str = "cosine"
    epochs: int = 300
    warmup_epochs: int = 20
    warmup_lr: float = 5e-7
    min_lr: float = 5e-6


@dataclass
class TrainRecipe:
    """What remains of a run.

    Attributes:
        seed: data order, augmentation and weights are functions of it.
        label_smoothing: of the cross entropy.
        ema_decay: of the moving average of the weights, which is then what is tested and saved; None for none.
        ema_warmup: let the decay grow from 0 during the first steps, as short runs need.
        amp: "none", "float16" (with a loss scaler) or "bfloat16".
    """

    seed: int = 0
    label_smoothing: float = 0.1
    ema_decay: float | None = None
    ema_warmup: bool = False
    amp: str = "none"


@dataclass
class Recipe:
    """All that a training run depends on, besides the images themselves."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2; PyYAML's 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _known_keys() -> list[str]:
    return [
        f"{section.name}.{option.name}"
        for section in dataclasses.fields(Recipe)
        for option in dataclasses.fields(section.default_factory)
    ]


def _unknown(key: str, value: object, source: str) -> ValueError:
    known = _known_keys() if "." in key else [section.name for section in dataclasses.fields(Recipe)] + ["base"]
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in _known_keys() if name.rsplit(".", 1)[-1] == leaf]
    nearest = elsewhere or close_matches(key, known, cutoff=0.0)
    section = f"{key.split('.')[0]}."
    others = ", ".join(name.removeprefix(section) for name in known if "." not in key or name.startswith(section))
    return ValueError(
        f"{source}: {key}={value!r} is no key of a recipe; did you mean {nearest[0]}? "
        f"({section.rstrip('.') if '.' in key else 'a recipe'} has {others})"
    )


def _convert(value: Any, kind: Any, key: str, source: str) -> Any:
    """Return `value` as `kind`, or raise TypeError; a whole number is a float too, and the other way round."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not types.NoneType), key, source)
    if typing.get_origin(kind) is list:
        if isinstance(value, list | tuple):
            return [_convert(item, arguments[0], f"{key}[{i}]", source) for i, item in enumerate(value)]
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = kind.__name__ if isinstance(kind, type) and not arguments else str(kind)
    raise TypeError(f"{source}: {key}={value!r} is {type(value).__name__}; it must be {wanted}")


def _build(tree: dict, source: str) -> Recipe:
    """Return the recipe of a nested dictionary, keys and types checked, ranges not."""
    sections = {section.name: section.default_factory for section in dataclasses.fields(Recipe)}
    made = {}
    for name, options in tree.items():
        if name not in sections:
            raise _unknown(str(name), options, source)
        if not isinstance(options, dict):
            raise TypeError(
                f"{source}: {name}={options!r} is {type(options).__name__}; it must be a section of options"
            )
        hints = typing.get_type_hints(sections[name])
        for key, value in options.items():
            if key not in hints:
                raise _unknown(f"{name}.{key}", value, source)
        made[name] = sections[name](
            **{key: _convert(value, hints[key], f"{name}.{key}", source) for key, value in options.items()}
        )
    return Recipe(**made)


def from_dict(tree: dict, source: str) -> Recipe:
    """Return the recipe that a nested dictionary holds.

    Args:
        tree: sections, each a dictionary of options; what it lacks takes the dataclass's default.
        source: where it comes from, named in messages.

    Raises:
        ValueError: at an unknown key or a value out of range, with the nearest right key.
        TypeError: at a value of the wrong type.
    """
    recipe = _build(tree, source)
    _check(recipe, source)
    return recipe


def _check(recipe: Recipe, source: str) -> None:
    """Raise ValueError at a value out of range."""
    least = {
        "data.image_size": 1,
        "data.batch_size": 1,
        "data.workers": 0,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        "optimizer.lr": 0,
    }
    choices = {
        "train.amp": ("none", "float16", "bfloat16"),
        "augment.mix_mode": ("batch", "pair", "elem"),
        "augment.erase_mode": ("const", "rand", "pixel"),
        "data.interpolation": ("bicubic", "bilinear", "random"),
        "schedule.name": ("cosine", "tanh", "step", "poly"),
    }

    def value(key: str) -> Any:
        section, option = key.split(".")
        return getattr(getattr(recipe, section), option)

    for key, bound in least.items():
        if value(key) < bound:
            raise ValueError(f"{source}: {key}={value(key)} is out of range; it must be at least {bound}")
    for key, allowed in choices.items():
        if value(key) not in allowed:
            raise ValueError(f"{source}: {key}={value(key)!r} is not one of {', '.join(allowed)}")
    for key in ("augment.mixup", "augment.cutmix", "train.label_smoothing", "augment.erase_prob"):
        if not 0 <= value(key) <= (1 if key in ("train.label_smoothing", "augment.erase_prob") else float("inf")):
            raise ValueError(f"{source}: {key}={value(key)} is out of range")
    if recipe.train.ema_decay is not None and not 0 <= recipe.train.ema_decay < 1:
        raise ValueError(f"{source}: train.ema_decay={recipe.train.ema_decay} must be in [0, 1), or null for no EMA")
    if not 0 < recipe.data.crop_pct <= 1:
        raise ValueError(f"{source}: data.crop_pct={recipe.data.crop_pct} must be in (0, 1]")
    if recipe.schedule.warmup_epochs >= recipe.schedule.epochs and recipe.schedule.warmup_epochs:
        raise ValueError(
            f"{source}: schedule.warmup_epochs={recipe.schedule.warmup_epochs} leaves nothing of "
            f"schedule.epochs={recipe.schedule.epochs}; lower it"
        )
    if (recipe.augment.mixup or recipe.augment.cutmix) and recipe.data.batch_size % 2:
        raise ValueError(f"{source}: data.batch_size={recipe.data.batch_size} must be even for mixup and CutMix")


def _merge(under: dict, over: dict) -> dict:
    """Return `under` overridden by `over`, option by option; a dictionary inside a section is merged too."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def find(name: str, ending: str = "yaml") -> Path:
    """Return the file of a recipe given as a path or as its name inside the package (`imagenet/vig_s.yaml`).

    Raises:
        FileNotFoundError: when there is no such recipe, with the packaged ones of this `ending`.
    """
    packaged = Path(str(resources.files("visionmix.configs")))
    for path in (Path(name), packaged / name, packaged / f"{name}.{ending}", packaged / name.removeprefix("configs/")):
        if path.is_file():
            return path
    have = sorted(str(path.relative_to(packaged)) for path in packaged.glob(f"*/*.{ending}"))
    close = close_matches(name, have, 3, 0.3) or have
    raise FileNotFoundError(f"there is no recipe {name!r}, neither as a file nor in the package: {', '.join(close)}")


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path}: base names a recipe that is based on this one")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a recipe: it holds {type(tree).__name__}, not sections of options")
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise TypeError(f"{path}: base={base!r} is {type(base).__name__}; it must be the name of a recipe beside it")
    _build(tree, str(path))  # here, so that a message names the file that holds the mistake
    if base is None:
        return tree
    if not (path.parent / base).is_file():
        raise FileNotFoundError(f"{path}: base={base!r} is not a file in {path.parent}")
    return _merge(_read_tree(path.parent / base, (*seen, path)), tree)


def parse_override(text: str) -> dict:
    """Return `section.option=value` as a nested dictionary; the value is YAML.

    Raises:
        ValueError: when the text has another form.
    """
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ValueError(f"--set {text!r} has another form than section.option=value, e.g. optimizer.lr=1e-3")
    try:
        tree: Any = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {error}") from error
    for name in reversed(names):
        tree = {name: tree}
    return tree


def read(name: str, overrides: dict | None = None, settings: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Return the recipe called `name`, overridden by what was given on the command line.

    Args:
        name: path, or name inside the package.
        overrides: a nested dictionary of what flags set.
        settings: `section.option=value` texts of --set.

    Raises:
        FileNotFoundError: when there is no such recipe.
        ValueError: at an unknown key or a value out of range.
        TypeError: at a value of the wrong type.
    """
    return override(_read_tree(find(name)), name, overrides, settings)


def override(tree: dict, source: str, overrides: dict | None, settings: list[str] | tuple[str, ...]) -> Recipe:
    """Return the recipe of `tree` with flags and --set texts laid over it; raises as `read` does."""
    for text in settings:
        one = parse_override(text)
        _build(one, f"--set {text}")
        overrides = _merge(overrides or {}, one)
    return from_dict(_merge(tree, overrides or {}), f"{source} with the command line" if overrides else source)


def to_dict(recipe: Recipe) -> dict:
    """Return the recipe as nested dictionaries of plain values, as a checkpoint or a YAML file holds it."""
    return dataclasses.asdict(recipe)


def differences(old: dict, new: dict) -> list[str]:
    """Return a line for each option that differs between two recipes given as dictionaries."""
    return [
        f"{section}.{key}={new[section].get(key)!r} (was {old.get(section, {}).get(key)!r})"
        for section in new
        for key in new[section]
        if old.get(section, {}).get(key) != new[section].get(key)
    ]
