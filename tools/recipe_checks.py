"""Which values the keys of a recipe take, and which go together."""

import math

from visionmix.reduction.methods import method_class
from visionmix.reduction.specs import read_spec
from visionmix.registry import nearest
from visionmix.tools.recipe_keys import DistillRecipe, Recipe, ScheduleRecipe

_RANGES = {
    "data.image_size": (1, math.inf),
    "data.batch_size": (1, math.inf),
    "data.workers": (0, math.inf),
    "augment.hflip": (0, 1),
    "augment.vflip": (0, 1),
    "augment.color_jitter": (0, math.inf),
    "augment.erase_prob": (0, 1),
    "augment.mixup": (0, math.inf),
    "augment.cutmix": (0, math.inf),
    "augment.mix_prob": (0, 1),
    "augment.mix_switch_prob": (0, 1),
    "augment.crop_padding": (0, math.inf),
    "augment.repeats": (1, math.inf),
    "augment.splits": (0, math.inf),
    "optimizer.lr": (0, math.inf),
    "optimizer.lr_batch": (1, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "schedule.epochs": (1, math.inf),
    "schedule.warmup_epochs": (0, math.inf),
    "schedule.warmup_lr": (0, math.inf),
    "schedule.min_lr": (0, math.inf),
    "schedule.cooldown_epochs": (0, math.inf),
    "train.seed": (0, math.inf),
    "train.label_smoothing": (0, 1),
    "train.accumulate": (1, math.inf),
    "train.calibrate": (0, math.inf),
    "train.save_steps": (0, math.inf),
    "train.save_minutes": (0, math.inf),
    "train.mesa": (0, math.inf),
    "train.mesa_start": (0, 1),
    "distill.weight": (0, math.inf),
    "distill.task_weight": (0, math.inf),
}

# Optimisers of timm whose steps on parameters in parts (DTensor) are those on whole ones.
_SHARDED = (
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamc", "adamw", "adan", "adanw", "adopt", "adoptw", "lamb",
    "lambc", "laprop", "larc", "lars", "lion", "madgrad", "madgradw", "momentum", "muon", "nadam", "nadamw", "nesterov",
    "radam", "rmsprop", "rmsproptf", "sgd", "sgdw",
)  # fmt: skip

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


def check_values(recipe: Recipe, source: str) -> None:
    """Raise ValueError at a value out of range, or one that does not go with another."""
    for key, (least, greatest) in _RANGES.items():
        section, option = key.split(".")
        value = getattr(getattr(recipe, section), option)
        if value is not None and not (least <= value <= greatest and value < math.inf):
            bounds = f"finite and at least {least}" if greatest == math.inf else f"between {least} and {greatest}"
            raise ValueError(f"{source}: {key}={value} is out of range; it must be {bounds}")
    if recipe.train.ema_decay is not None and not 0 <= recipe.train.ema_decay < 1:
        raise ValueError(f"{source}: train.ema_decay={recipe.train.ema_decay} must be in [0, 1), or null for no EMA")
    if not 0 < recipe.data.crop_pct <= 1:
        raise ValueError(f"{source}: data.crop_pct={recipe.data.crop_pct} must be in (0, 1]")
    if recipe.data.classes is not None and recipe.data.classes < 2:
        raise ValueError(f"{source}: data.classes={recipe.data.classes} must be at least 2, or null")
    _check_images(recipe, source)
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
    if train.label_smoothing == 1 and train.loss != "cross_entropy":
        raise ValueError(
            f"{source}: train.label_smoothing=1.0 leaves train.loss={train.loss} nothing to learn; lower it"
        )
    if train.ema_warmup and train.ema_decay is None:
        raise ValueError(f"{source}: train.ema_warmup=True needs the moving average; give train.ema_decay")
    if "num_classes" in recipe.model.kwargs:
        raise ValueError(
            f"{source}: model.kwargs.num_classes={recipe.model.kwargs['num_classes']!r} is what the data decide; leave "
            "it out, or give data.classes"
        )
    _check_layer_decay(recipe, source)
    _check_views(recipe, source)
    _check_labels(recipe, source)
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
    if train.parallel == "fsdp":
        _check_sharded(recipe, source)
    if recipe.model.reduction is not None:
        _check_reduction(recipe, source)
    if (recipe.augment.mixup or recipe.augment.cutmix) and recipe.data.batch_size % 2:
        raise ValueError(f"{source}: data.batch_size={recipe.data.batch_size} must be even for mixup and CutMix")


def _check_images(recipe: Recipe, source: str) -> None:
    """Check the options that are lists of numbers: of each channel, and bounds of a random crop."""
    for option, allowed, words in (
        ("mean", _share, "finite, from 0 to 1"),
        ("std", _positive_share, "above 0, at most 1"),
    ):
        values = getattr(recipe.data, option)
        if values is not None and not (len(values) == 3 and all(map(allowed, values))):
            raise ValueError(
                f"{source}: data.{option}={values} must be three numbers, {words}, for red, green and blue, of pixels "
                "from 0 to 1; or null for the model's own"
            )
    crops = recipe.augment
    for option, values in (("scale", crops.scale), ("ratio", crops.ratio)):
        if not (len(values) == 2 and all(map(_positive, values)) and values[0] <= values[1]):
            raise ValueError(
                f"{source}: augment.{option}={values} must be [least, greatest], both above 0, the smaller first"
            )
    if crops.crop_mode == "rrc" and crops.scale[1] > 1:
        raise ValueError(
            f"{source}: augment.scale={crops.scale} asks for crops larger than their image; give 1 at "
            "most, or set augment.crop_mode to rkrc or rkrr"
        )


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _positive_share(value: float) -> bool:
    return 0 < value <= 1


def _check_layer_decay(recipe: Recipe, source: str) -> None:
    decay = recipe.optimizer.kwargs.get("layer_decay")
    if decay is not None and not (isinstance(decay, int | float) and 0 < decay <= 1):
        raise ValueError(
            f"{source}: optimizer.kwargs.layer_decay={decay!r} multiplies the rate from each layer to the one before; "
            "give a number above 0, at most 1"
        )


def _check_views(recipe: Recipe, source: str) -> None:
    """Check crops, and what goes with several views of each image."""
    augment, train = recipe.augment, recipe.train
    if augment.crop_padding and augment.crop_mode != "simple":
        raise ValueError(
            f"{source}: augment.crop_padding={augment.crop_padding} belongs to augment.crop_mode=simple, not to "
            f"{augment.crop_mode}"
        )
    if augment.crop_mode == "simple" and recipe.data.interpolation == "random":
        raise ValueError(
            f"{source}: data.interpolation='random' does not go with augment.crop_mode=simple; set it to bicubic"
        )
    if (train.loss == "jsd") != (augment.splits > 1) or augment.splits == 1:
        raise ValueError(
            f"{source}: train.loss={train.loss!r} and augment.splits={augment.splits} do not fit; jsd compares "
            "two or more splits, and the other losses take none (0)"
        )
    if train.split_bn and augment.splits < 2:
        raise ValueError(
            f"{source}: train.split_bn=True needs views to tell apart; set augment.splits to 2 or more, or it to false"
        )
    if train.split_bn and train.sync_bn:
        raise ValueError(f"{source}: train.split_bn=True does not go with train.sync_bn; set one of them to false")
    if augment.splits and (augment.mixup or augment.cutmix):
        raise ValueError(
            f"{source}: augment.splits={augment.splits} does not go with mixup and CutMix, which would mix the "
            "views of an image with those of others; set augment.mixup and augment.cutmix to 0"
        )


def _check_labels(recipe: Recipe, source: str) -> None:
    """Check what goes with images of several labels, whose classes do not exclude each other."""
    loss = recipe.train.loss
    if not recipe.data.labels:
        _check_unlabelled(recipe, source)
    if not recipe.data.multilabel:
        if loss == "asymmetric":
            raise ValueError(f"{source}: train.loss='asymmetric' is for images of several labels; set data.multilabel")
        return
    if loss not in ("bce", "asymmetric"):
        raise ValueError(
            f"{source}: data.multilabel=True needs a loss of each label by itself, and train.loss={loss!r} takes one "
            "class an image; set it to bce or asymmetric"
        )
    for key, value, off in (
        ("augment.mixup", recipe.augment.mixup, "0"),
        ("augment.cutmix", recipe.augment.cutmix, "0"),
        ("train.mesa", recipe.train.mesa, "0"),
        ("distill.kind", recipe.distill.on and recipe.distill.kind != "features" and recipe.distill.kind, "features"),
    ):
        if value:
            raise ValueError(
                f"{source}: {key}={value!r} takes one class an image, and data.multilabel=True has any number; "
                f"set it to {off}"
            )


def _check_unlabelled(recipe: Recipe, source: str) -> None:
    """Check that nothing asks for the labels that images do not have."""
    for key, value, off in (
        ("data.multilabel", recipe.data.multilabel, "false"),
        ("data.classes", recipe.data.classes, "null"),
        ("augment.mixup", recipe.augment.mixup, "0"),
        ("augment.cutmix", recipe.augment.cutmix, "0"),
        ("augment.splits", recipe.augment.splits, "0"),
        ("train.loss", recipe.train.loss != "cross_entropy" and recipe.train.loss, "cross_entropy, its default"),
        ("train.mesa", recipe.train.mesa, "0"),
        ("distill.teacher", recipe.distill.on and (recipe.distill.teacher or recipe.distill.checkpoint), "null"),
    ):
        if value:
            raise ValueError(f"{source}: {key}={value!r} needs labels, and data.labels is false; set it to {off}")


def _check_sharded(recipe: Recipe, source: str) -> None:
    if recipe.train.channels_last:
        raise ValueError(
            f"{source}: train.channels_last=True does not go with train.parallel=fsdp, whose parts of parameters are "
            "contiguous; set one of them to its default"
        )
    if recipe.optimizer.clip_mode == "agc":
        raise ValueError(
            f"{source}: optimizer.clip_mode='agc' does not go with train.parallel=fsdp, where no process has a unit's "
            "whole gradient; take norm or value"
        )
    if recipe.optimizer.name not in _SHARDED:
        raise ValueError(
            f"{source}: optimizer.name={recipe.optimizer.name!r} does not go with train.parallel=fsdp; these do: "
            f"{', '.join(_SHARDED)}"
        )


def _check_reduction(recipe: Recipe, source: str) -> None:
    """Check the method's name and those of its options; their values need the model."""
    key = f"{source}: model.reduction={recipe.model.reduction!r}"
    try:
        method, options = read_spec(recipe.model.reduction)
        method_class(method, options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{key}: {error}") from error
    if recipe.train.parallel == "fsdp":
        raise ValueError(
            f"{key} does not go with train.parallel=fsdp, which shards blocks that a reduced model takes apart; "
            "set it to ddp"
        )


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
    if wanted.name == "multistep" and not wanted.kwargs.get("decay_milestones"):
        raise ValueError(
            f"{source}: schedule.name='multistep' needs schedule.kwargs.decay_milestones, a list of epochs; give e.g. "
            "[30, 60, 90]"
        )
    milestones = wanted.kwargs.get("decay_milestones", [])
    numbers = isinstance(milestones, list | tuple) and all(isinstance(value, int | float) for value in milestones)
    if not numbers or list(milestones) != sorted(milestones):
        raise ValueError(
            f"{source}: schedule.kwargs.decay_milestones={milestones} must be a list of epochs in ascending order"
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
