"""Recipes: YAML files read into typed dataclasses by OmegaConf, with every key, type and range checked.

    base: defaults.yaml        # optional: a recipe beside this one, whose values this one overrides
    model: {name: vig_s, kwargs: {drop_path_rate: 0.2}}
    optimizer: {lr: 5.0e-4, weight_decay: 0.1}
    schedule: {epochs: 300}

A recipe is named by its path, or by its name inside the package: `imagenet/vig_s.yaml`. A value may refer to another,
as in `model: {kwargs: {img_size: "${data.image_size}"}}`; see OmegaConf's interpolations.
"""

import ast
import copy
import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException, UnsupportedValueType

from visionmix.registry import nearest


@dataclass
class ModelRecipe:
    """The model: `timm.create_model(name, num_classes=..., **kwargs)`."""

    name: str = "vig_s"
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False


@dataclass
class DataRecipe:
    """The images, and how they reach the model.

    Attributes:
        path: folder with train/CLASS/* and val/CLASS/*.
        image_size: side of the model's input in pixels, at test and, without sizes, in training.
        sizes: sides of training images by epoch, [first epoch, side, ...] each, e.g. [[0, 128], [100, 160, 192]], since
            small images are faster to begin with; of several sides, each batch draws one.
        batch_size: images that a process takes at once; a step takes train.accumulate such batches of each process.
        workers: data-loading processes of each training process.
        interpolation: of resizing: "bicubic", "bilinear" or "random" (training only).
        crop_pct: at test the shorter side is resized to image_size / crop_pct, then the centre is cut out.
        mean: of each channel, of pixels in 0..1; None takes the model's own.
        std: of each channel, of pixels in 0..1; None takes the model's own.
    """

    path: str | None = None
    image_size: int = 224
    sizes: list[list[int]] | None = None
    batch_size: int = 128
    workers: int = 8
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
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
        color_jitter: strength of brightness, contrast and saturation jitter; unused beside auto_augment, except "3a".
        auto_augment: policy, e.g. "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2" or "3a" (3-Augment); None for none.
        erase_prob: probability of random erasing.
        erase_mode: what fills an erased box: "const", "rand" (one colour) or "pixel" (noise).
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        mix_prob: probability that a batch is mixed at all.
        mix_switch_prob: probability of CutMix where both are on.
        mix_mode: one mixing strength per "batch", "pair" or "elem".
        repeats: times that each image comes, augmented anew, where epochs keep their length (repeated augmentation).
        splits: views of each image, the first without auto_augment, for train.loss=jsd; 0 for one view.
    """

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    erase_prob: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    repeats: int = 1
    splits: int = 0


@dataclass
class OptimizerRecipe:
    """The optimiser, by its timm name, and the settings of its step.

    Biases, one-dimensional parameters and those that the model's `no_weight_decay()` names are not decayed.

    Attributes:
        name: as `timm.optim.list_optimizers()` lists it.
        lr: peak learning rate, for a total batch of `lr_batch`.
        lr_batch: lr, warmup_lr and min_lr are multiplied by (images a step / lr_batch); None takes them as they are.
        weight_decay: decoupled, as AdamW has it.
        kwargs: further arguments of the optimiser, e.g. {betas: [0.9, 0.999], eps: 1.0e-8}, and of
            `timm.optim.create_optimizer_v2`, e.g. {layer_decay: 0.75}: each layer learns so much slower than the next.
        clip_grad: bound of the gradient, of which clip_mode says what it bounds; None for no clipping.
        clip_mode: "norm" of the whole gradient, "value" of each number, or "agc": the norm of each unit's gradient over
            that of its weights, the classifier's aside (adaptive clipping, as nets without batch norm need).
    """

    name: str = "adamw"
    lr: float = 5e-4
    lr_batch: int | None = 512
    weight_decay: float = 0.05
    kwargs: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"


@dataclass
class ScheduleRecipe:
    """The learning rate over time: linear warm-up from warmup_lr to lr, then `name` down to min_lr, step by step.

    Attributes:
        name: a schedule of `timm.scheduler.create_scheduler_v2`. "plateau" goes by epochs, and by the test's top-1.
        epochs: in all, warm-up and cool-down among them.
        warmup_epochs: of linear warm-up.
        warmup_lr: at the start of the warm-up.
        min_lr: at the end of the schedule.
        cooldown_epochs: held at min_lr after the schedule, where the average of the weights settles.
        stop_epoch: end the run after this epoch, with the schedule of all `epochs`, as a first part or a trial.
        kwargs: further arguments of the schedule, e.g. {decay_milestones: [100, 200], decay_rate: 0.5} of "multistep".
    """

    name: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau"] = "cosine"
    epochs: int = 300
    warmup_epochs: int = 20
    warmup_lr: float = 5e-7
    min_lr: float = 5e-6
    cooldown_epochs: int = 0
    stop_epoch: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def last_epoch(self) -> int:
        """The epoch after which the run ends."""
        return self.epochs if self.stop_epoch is None else self.stop_epoch


@dataclass
class TrainRecipe:
    """The other settings of a run.

    Attributes:
        seed: determines data order, augmentation and weights.
        loss: "cross_entropy"; "bce", a binary one for each class, as DeiT III has; or "jsd", the
            cross entropy of the first of augment.splits and the Jensen-Shannon divergence of all, as AugMix has.
        bce_target_threshold: soft targets above it count as 1, others as 0; None leaves them soft.
        bce_sum: sum the binary losses over classes, where the mean makes gradients of many classes small.
        label_smoothing: of the targets.
        ema_decay: of the moving average of the weights, which is then tested and saved in their place; None for none.
        ema_warmup: let the decay grow from 0 during the first steps, as short runs need.
        mesa: weight of the divergence from the moving average's logits, which makes minima flatter (MESA, arXiv
            2205.14083); 0 for none. VSSD and MILA add it as a cross entropy, which has the same gradient.
        mesa_start: share of the epochs after which it begins, when the average knows something.
        mesa_temperature: by which both logits are divided.
        amp: "none", "float16" (with a loss scaler), "bfloat16", or "pure_bfloat16": weights, gradients and the
            optimiser's state too, for half their memory; the moving average stays in float32.
        accumulate: batches whose mean gradient makes a step, as a published batch needs that memory has no room for.
        compile: run training steps through torch.compile, for speed; each image size is compiled once.
        checkpointing: compute each block's activations again in the backward pass, for memory.
        channels_last: lay images and convolutions out with channels last, in which convolutions of GPUs are faster.
        sync_bn: take batch norms' statistics over all processes, where one has too few images.
    """

    seed: int = 0
    loss: Literal["cross_entropy", "bce", "jsd"] = "cross_entropy"
    bce_target_threshold: float | None = None
    bce_sum: bool = False
    label_smoothing: float = 0.1
    ema_decay: float | None = None
    ema_warmup: bool = False
    mesa: float = 0.0
    mesa_start: float = 0.25
    mesa_temperature: float = 1.0
    amp: Literal["none", "float16", "bfloat16", "pure_bfloat16"] = "none"
    accumulate: int = 1
    compile: bool = False
    checkpointing: bool = False
    channels_last: bool = False
    sync_bn: bool = False


@dataclass
class DistillRecipe:
    """A teacher whose outputs the model learns besides the labels.

    Attributes:
        teacher: timm model name; None for no teacher, or for that of the checkpoint.
        checkpoint: the teacher's weights, of any file that `visionmix validate` reads; None takes the published ones.
        kind: what is matched: "logits", pooled "features" (through a learned projection where their widths differ), or
            "tokens": the teacher's logits, by the distillation token of a model that has one, as DeiT.
        weight: of the distance from the teacher.
        task_weight: of the loss by labels beside it.
        temperature: by which logits are divided; the higher, the more small probabilities count.
        hard: match the teacher's first guess by a cross entropy, as DeiT does, in place of its probabilities.
    """

    teacher: str | None = None
    checkpoint: str | None = None
    kind: Literal["logits", "features", "tokens"] = "logits"
    weight: float = 1.0
    task_weight: float = 1.0
    temperature: float = 1.0
    hard: bool = False

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or self.checkpoint is not None


@dataclass
class Recipe:
    """Everything that a training run depends on, except the images."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)


_SCHEMA = OmegaConf.structured(Recipe)
_SECTIONS = {section.name: typing.get_type_hints(section.type) for section in dataclasses.fields(Recipe)}
_KEYS = [f"{section}.{option}" for section, options in _SECTIONS.items() for option in options]
_RANGES = {
    "data.image_size": (1, math.inf),
    "data.batch_size": (1, math.inf),
    "data.workers": (0, math.inf),
    "augment.erase_prob": (0, 1),
    "augment.mixup": (0, math.inf),
    "augment.cutmix": (0, math.inf),
    "augment.repeats": (1, math.inf),
    "augment.splits": (0, math.inf),
    "optimizer.lr": (0, math.inf),
    "schedule.epochs": (1, math.inf),
    "schedule.warmup_epochs": (0, math.inf),
    "schedule.cooldown_epochs": (0, math.inf),
    "train.label_smoothing": (0, 1),
    "train.accumulate": (1, math.inf),
    "train.mesa": (0, math.inf),
    "train.mesa_start": (0, 1),
    "distill.weight": (0, math.inf),
    "distill.task_weight": (0, math.inf),
}


_CYCLES = ("cycle_limit", "cycle_mul", "cycle_decay")
# Arguments that timm's schedules read; the others would be passed over in silence.
_SCHEDULE_KWARGS = {
    "cosine": (*_CYCLES, "k_decay"),
    "tanh": _CYCLES,
    "step": ("decay_epochs", "decay_rate"),
    "multistep": ("decay_milestones", "decay_rate"),
    "poly": (*_CYCLES, "k_decay", "decay_rate"),
    "wsd": ("decay_epochs", "decay_fn"),
    "rsqrt": ("decay_epochs", "decay_fn", "stable_timescale"),
    "constant": (),
    "plateau": ("patience_epochs", "decay_rate"),
}
_NOISE = ("noise", "noise_pct", "noise_std", "noise_seed")
_HAVE_AN_END = ("cosine", "tanh", "poly", "wsd", "rsqrt")


def from_dict(tree: dict, source: str) -> Recipe:
    """Return the recipe that a nested dictionary holds.

    Args:
        tree: sections, each a dictionary of options; an option that it lacks keeps its default.
        source: where it comes from, named in messages.

    Raises:
        ValueError: at an unknown key, with the nearest right one, or at a value out of range.
        TypeError: at a value of the wrong type.
    """
    config = OmegaConf.merge(_SCHEMA, _merge({}, tree, source))
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a reference that leads nowhere, or to a value of another type
        raise ValueError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
    _check_ranges(recipe, source)
    return recipe


def read(name: str, overrides: dict | None = None, settings: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Return the recipe called `name`, overridden by the command line.

    Args:
        name: path, or name inside the package.
        overrides: values set by flags, as a nested dictionary.
        settings: the `section.option=value` texts given to --set.

    Raises:
        FileNotFoundError: when there is no such recipe.
        ValueError: at an unknown key or a value out of range.
        TypeError: at a value of the wrong type.
    """
    return override(_read_file(find(name)), name, overrides, settings)


def override(tree: dict, source: str, overrides: dict | None, settings: list[str] | tuple[str, ...]) -> Recipe:
    """Return the recipe of `tree` with flags and --set texts laid over it; raises as `read` does."""
    tree = _merge(tree, overrides or {}, "the command line")
    for text in settings:
        tree = _merge(tree, parse_override(text), f"--set {text}")
    return from_dict(tree, f"{source} with the command line" if overrides or settings else source)


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
    raise FileNotFoundError(
        f"there is no recipe {name!r}, neither as a file nor in the package{nearest(name, have)}; "
        f"the package has {', '.join(have)}"
    )


def parse_override(text: str) -> dict:
    """Return `section.option=value` as a nested dictionary; the value is YAML.

    Raises:
        ValueError: when the text has another form.
    """
    key, equals, _ = text.partition("=")
    names = key.split(".")
    if not equals or len(names) < 2 or not all(name.strip() for name in names):
        raise ValueError(f"--set {text!r} has another form than section.option=value, e.g. optimizer.lr=1e-3")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {error}") from error


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


def _read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """Return the recipe's options laid over those of its base."""
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path}: base names a recipe that is based on this one; remove one of the two")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path} is not YAML of sections: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a recipe: it holds {type(tree).__name__}, not sections of options")
    base = tree.pop("base", None)
    if base is None:
        return _merge({}, tree, str(path))
    if not isinstance(base, str):
        raise TypeError(f"{path}: base={base!r} is {type(base).__name__}; it must be the name of a recipe beside it")
    if not (path.parent / base).is_file():
        raise FileNotFoundError(f"{path}: base={base!r} is not a file in {path.parent}")
    return _merge(_read_file(path.parent / base, (*seen, path)), tree, str(path))


def _merge(under: dict, over: dict, source: str) -> dict:
    """Return `under` overridden by `over`, option by option; dictionaries inside an option are merged too.

    Raises:
        ValueError: at an unknown key of `over`, or a value that is not one of an option's choices.
        TypeError: at a value of the wrong type.
    """
    taken = copy.deepcopy(_SCHEMA)
    for section, options in over.items():
        if section not in _SECTIONS:
            raise _unknown(str(section), options, "a recipe", [*_SECTIONS, "base"], source)
        if not isinstance(options, dict):
            raise TypeError(
                f"{source}: {section}={options!r} is {type(options).__name__}; it must be a section of options"
            )
        for option, value in options.items():
            key = f"{section}.{option}"
            if key not in _KEYS:
                raise _unknown(key, value, section, list(_SECTIONS[section]), source)
            try:
                OmegaConf.update(taken, key, value, merge=False)
            except (OmegaConfBaseException, TypeError) as error:
                raise _refused(error, key, value, source) from None
            _check_taken(value, OmegaConf.to_container(taken[section])[option], key, source)
    return OmegaConf.to_container(OmegaConf.merge(under, over))


def _unknown(key: str, value: object, owner: str, known: list[str], source: str) -> ValueError:
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in _KEYS if name.endswith(f".{leaf}")]
    hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(key, _KEYS if "." in key else known)
    return ValueError(f"{source}: {key}={value!r} is not a key of a recipe{hint}; {owner} has {', '.join(known)}")


def _refused(error: Exception, key: str, value: object, source: str) -> Exception:
    """Return the error that says what the option `key` takes in place of `value`."""
    if isinstance(error, UnsupportedValueType | KeyValidationError):  # inside a dictionary of any values
        return TypeError(f"{source}: {error.full_key}={error.value!r} is refused: {str(error).splitlines()[0]}")
    section, option = key.split(".")
    kind = _SECTIONS[section][option]
    if typing.get_origin(kind) is Literal:
        return ValueError(f"{source}: {key}={value!r} is not one of {', '.join(typing.get_args(kind))}")
    wanted = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    owner = "it"
    if isinstance(value, list | tuple) and str(error.full_key).startswith(f"{key}["):  # one of its items is refused
        owner, key, value = option, error.full_key, error.value
    return TypeError(f"{source}: {key}={value!r} is {type(value).__name__}; {owner} must be {wanted}")


def _check_taken(given: Any, taken: Any, key: str, source: str) -> None:
    """Raise at a value that OmegaConf or YAML takes for another one than was meant.

    OmegaConf makes 3 of "3", "False" of False and True of 1; YAML reads None, (1, 2) and -.5 as texts.
    """
    if isinstance(given, dict):
        for name, value in given.items():
            _check_taken(value, taken[name], f"{key}.{name}", source)
    elif isinstance(given, list | tuple):
        for number, value in enumerate(given):
            _check_taken(value, taken[number], f"{key}[{number}]", source)
    elif type(given) is not type(taken) and (type(given), type(taken)) != (int, float):
        wanted = type(taken).__name__
        raise TypeError(f"{source}: {key}={given!r} is {type(given).__name__}; it must be {wanted}")
    elif given == "???":
        raise ValueError(f"{source}: {key}='???' means no value to OmegaConf; give a value, or leave the key out")
    elif isinstance(given, str):
        try:
            meant = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            return
        if not isinstance(meant, str) and isinstance(OmegaConf.from_dotlist([f"value={given}"]).value, str):
            written = "null" if meant is None else json.dumps(meant)
            raise ValueError(f"{source}: {key}={given!r} is a text in YAML; write {written}, without quotes")


def _check_ranges(recipe: Recipe, source: str) -> None:
    """Raise ValueError at a value out of range."""
    for key, (least, greatest) in _RANGES.items():
        section, option = key.split(".")
        value = getattr(getattr(recipe, section), option)
        if not least <= value <= greatest:
            bounds = f"at least {least}" if greatest == math.inf else f"between {least} and {greatest}"
            raise ValueError(f"{source}: {key}={value} is out of range; it must be {bounds}")
    if recipe.train.ema_decay is not None and not 0 <= recipe.train.ema_decay < 1:
        raise ValueError(f"{source}: train.ema_decay={recipe.train.ema_decay} must be in [0, 1), or null for no EMA")
    if not 0 < recipe.data.crop_pct <= 1:
        raise ValueError(f"{source}: data.crop_pct={recipe.data.crop_pct} must be in (0, 1]")
    _check_schedule(recipe.schedule, source)
    if recipe.data.sizes is not None:
        _check_sizes(recipe.data.sizes, recipe.schedule.epochs, source)
    train, optimizer = recipe.train, recipe.optimizer
    for option, value in (("bce_target_threshold", train.bce_target_threshold), ("bce_sum", train.bce_sum or None)):
        if value is not None and train.loss != "bce":
            raise ValueError(f"{source}: train.{option}={value} belongs to train.loss=bce, not to {train.loss}")
    if train.bce_target_threshold is not None and not 0 <= train.bce_target_threshold < 1:
        raise ValueError(
            f"{source}: train.bce_target_threshold={train.bce_target_threshold} must be between 0 and 1, or null"
        )
    if (train.loss == "jsd") != (recipe.augment.splits > 1):
        raise ValueError(
            f"{source}: train.loss={train.loss!r} and augment.splits={recipe.augment.splits} do not fit; jsd compares "
            "two or more splits, and the other losses take none"
        )
    if recipe.augment.splits and (recipe.augment.mixup or recipe.augment.cutmix):
        raise ValueError(
            f"{source}: augment.splits={recipe.augment.splits} does not go with mixup and CutMix, which would mix the "
            "views of an image with those of others; set augment.mixup and augment.cutmix to 0"
        )
    for key, value in (
        ("train.mesa_temperature", train.mesa_temperature),
        ("distill.temperature", recipe.distill.temperature),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{source}: {key}={value} must be above 0")
    if train.mesa and train.ema_decay is None:
        raise ValueError(f"{source}: train.mesa={train.mesa} needs the moving average; give train.ema_decay")
    if recipe.distill != DistillRecipe() and not recipe.distill.on:
        raise ValueError(
            f"{source}: the section distill has no effect without distill.teacher or distill.checkpoint; give one"
        )
    if recipe.distill.hard and recipe.distill.kind == "features":
        raise ValueError(f"{source}: distill.hard=True takes guesses, which distill.kind='features' does not have")
    if optimizer.clip_grad is not None and not optimizer.clip_grad > 0:
        raise ValueError(f"{source}: optimizer.clip_grad={optimizer.clip_grad} must be above 0, or null for none")
    if optimizer.clip_mode != "norm" and optimizer.clip_grad is None:
        raise ValueError(
            f"{source}: optimizer.clip_mode={optimizer.clip_mode!r} clips nothing without a bound; "
            "give optimizer.clip_grad"
        )
    if (recipe.augment.mixup or recipe.augment.cutmix) and recipe.data.batch_size % 2:
        raise ValueError(f"{source}: data.batch_size={recipe.data.batch_size} must be even for mixup and CutMix")


def _check_schedule(wanted: ScheduleRecipe, source: str) -> None:
    spent = wanted.warmup_epochs + wanted.cooldown_epochs
    if spent >= wanted.epochs and spent:
        also = f" and schedule.cooldown_epochs={wanted.cooldown_epochs}" if wanted.cooldown_epochs else ""
        raise ValueError(
            f"{source}: schedule.warmup_epochs={wanted.warmup_epochs}{also} leaves nothing of "
            f"schedule.epochs={wanted.epochs}; lower it"
        )
    if wanted.stop_epoch is not None and not 1 <= wanted.stop_epoch <= wanted.epochs:
        raise ValueError(
            f"{source}: schedule.stop_epoch={wanted.stop_epoch} must be between 1 and schedule.epochs={wanted.epochs}"
        )
    if wanted.cooldown_epochs and wanted.name not in _HAVE_AN_END:
        raise ValueError(
            f"{source}: schedule.cooldown_epochs={wanted.cooldown_epochs} follows the end of a schedule, which "
            f"schedule.name={wanted.name!r} does not have; {', '.join(_HAVE_AN_END)} do"
        )
    known = (*_SCHEDULE_KWARGS[wanted.name], *_NOISE)
    for name, value in wanted.kwargs.items():
        if name not in known:
            raise ValueError(
                f"{source}: schedule.kwargs.{name}={value!r} is not an argument of schedule.name={wanted.name!r}"
                f"{nearest(name, known)}; it takes {', '.join(known)}"
            )


def _check_sizes(sizes: list[list[int]], epochs: int, source: str) -> None:
    starts = [entry[0] for entry in sizes if entry]
    if len(starts) < len(sizes) or not all(len(entry) > 1 and min(entry[1:]) > 0 for entry in sizes):
        raise ValueError(f"{source}: data.sizes={sizes} needs [first epoch, side, ...] in each entry, sides above 0")
    if starts[:1] != [0] or starts != sorted(set(starts)):
        raise ValueError(f"{source}: data.sizes={sizes} must begin with epoch 0 and go on with ever later epochs")
    if starts[-1] >= epochs:
        raise ValueError(
            f"{source}: data.sizes={sizes} has sides from epoch {starts[-1]} on, after the last of "
            f"schedule.epochs={epochs}; epochs count from 0"
        )
