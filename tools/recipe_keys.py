"""The keys of a recipe: their types, defaults and meanings."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml


@dataclass
class ModelRecipe:
    """The model: `timm.create_model(name, num_classes=..., **kwargs)`.

    Attributes:
        name: as timm lists it, with a tag where several weights are published.
        kwargs: its arguments, e.g. {drop_path_rate: 0.2}.
        pretrained: start from the published weights, with a fresh classifier where the classes are others.
        reduction: token reduction of `visionmix.reduction` around the model, whose weights are in it: "tome:r=13", or
            {method: tome, r: 13}; None for none.
    """

    name: str = "vig_s"
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    reduction: Any = None


@dataclass
class DataRecipe:
    """The images, and how they reach the model.

    Attributes:
        path: folder with train/CLASS/* and val/CLASS/*, with train.csv and val.csv, whose columns are image and
            labels, or with WebDataset shards, train/*.tar and val/*.tar; a pattern of shards, local or of http:// and
            https:// URLs, {train,val}/{0000..1023}.tar; hf:NAME of a Hugging Face data set, or a folder that its
            save_to_disk wrote.
        train: where in path the training images are: a folder, a CSV file, a pattern of shards (or of their URLs), or a
            split's name; None looks for "train".
        val: the same for the test images; None looks for "val", "validation" or "test".
        classes: number of classes, for shards without visionmix pack's index, and for labels without names.
        multilabel: each image has any number of labels, with semicolons between them in a CSV file, or in a list in a
            Hugging Face data set. It needs train.loss "bce" or "asymmetric"; tests measure mean average precision.
        labels: false takes the images of folders train/ and val/ at any depth and trains by the model's own losses
            alone (`forward_train`), as pre-training does; tests measure the same losses.
        image_size: side of the model's input in pixels, at test and, without sizes, in training.
        sizes: sides of training images by epoch, [first epoch, side, ...] each, e.g. [[0, 128], [100, 160, 192]], since
            small images are faster to begin with; of several sides, each batch draws one.
        batch_size: images that a process takes at once; a step takes train.accumulate such batches of each process.
        workers: data-loading processes of each training process.
        interpolation: of resizing: "bicubic", "bilinear" or "random" (training only).
        crop_pct: at test images are resized to image_size / crop_pct, then the centre is cut out.
        crop_mode: at test "center" resizes the shorter side; "squash" both, at the cost of the aspect ratio, as
            Agent-Attention and FLatten do; "border" the longer one, with the mean colour around.
        mean: of each channel, of pixels in 0..1; None takes the model's own.
        std: of each channel, of pixels in 0..1; None takes the model's own.
    """

    path: str | None = None
    train: str | None = None
    val: str | None = None
    classes: int | None = None
    multilabel: bool = False
    labels: bool = True
    image_size: int = 224
    sizes: list[list[int]] | None = None
    batch_size: int = 128
    workers: int = 8
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class AugmentRecipe:
    """Augmentation of training images, as `timm.data.create_transform` and `timm.data.Mixup` understand it.

    Attributes:
        crop_mode: "rrc", a window of random size and aspect ratio; "simple", one of image_size in an image that is
            resized as at test, as DeiT III (with crop_padding=4 and data.crop_pct=1) and RaftMLP have it; or timm's
            "rkrc" and "rkrr", which resize by scale and ratio one time in two, then take the centre or any window.
        crop_padding: reflected pixels on each side in which a "simple" window may lie, too.
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

    crop_mode: Literal["rrc", "simple", "rkrc", "rkrr"] = "rrc"
    crop_padding: int = 0
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
        lr: peak learning rate, for lr_batch images a step.
        lr_batch: lr, warmup_lr and min_lr are multiplied by (images a step / lr_batch); None takes them as they are.
        weight_decay: decoupled, as AdamW has it.
        kwargs: further arguments of the optimiser, e.g. {betas: [0.9, 0.999], eps: 1.0e-8}, and of
            `timm.optim.create_optimizer_v2`, e.g. {layer_decay: 0.75}: a layer's learning rate is the next layer's
            times this.
        clip_grad: bound of the gradient; clip_mode says which quantity it bounds; None for no clipping.
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
        loss: "cross_entropy"; "bce", a binary one for each class, as DeiT III has; "asymmetric", the binary one that
            easy negatives count less in (ASL, arXiv 2009.14119), for data.multilabel; or "jsd", the cross entropy of
            the first of augment.splits and the Jensen-Shannon divergence of all, as AugMix has.
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
        split_bn: give each of augment.splits its own batch norms, of which the first are tested and saved as the best
            weights (AdvProp, arXiv 1911.09665).
        sync_bn: take batch norms' statistics over all processes, where one has too few images.
        parallel: of several processes, "ddp" gives each the whole model; "fsdp" a part of each block's parameters,
            gradients and optimiser's state (FSDP2), for models that one GPU has no room for.
        calibrate: images to which layers that are fitted to data, as EcoFormer's hashes, are fitted before the first
            step; 0 for none. What a checkpoint or model.pretrained brings is not fitted again.
        save_steps: write a checkpoint every so many steps, besides each epoch's end; 0 for none.
        save_minutes: write a checkpoint every so many minutes, besides each epoch's end; 0 for none.
    """

    seed: int = 0
    loss: Literal["cross_entropy", "bce", "asymmetric", "jsd"] = "cross_entropy"
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
    split_bn: bool = False
    sync_bn: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    calibrate: int = 32
    save_steps: int = 0
    save_minutes: float = 0.0


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
class LogRecipe:
    """Where figures go beside the display, summary.csv and TensorBoard.

    Attributes:
        wandb: project of Weights & Biases; None for none.
    """

    wandb: str | None = None


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
    log: LogRecipe = field(default_factory=LogRecipe)


def tables() -> str:
    """Return a Markdown table for each section: its keys, defaults and meanings, from the docstrings above."""
    return "\n\n".join("\n".join(_table(section)) for section in dataclasses.fields(Recipe))


def _table(section: dataclasses.Field) -> Iterator[str]:
    text = " ".join(section.type.__doc__.partition("Attributes:")[0].split())
    yield f"### {section.name}\n\n{text}\n\n| key | default | meaning |\n| --- | --- | --- |"
    written = section.type.__doc__.partition("Attributes:")[2].replace("None", "null")
    meanings = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {9,}.*)*)", written, re.MULTILINE))
    for name, default in vars(section.type()).items():
        value = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
        yield f"| `{name}` | {value} | {' '.join(meanings[name].split())} |"
