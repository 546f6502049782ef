"""Testing a model on an image folder: loss, top-1, top-5 and the confusion matrix, over all processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.functional.classification import multiclass_confusion_matrix

from visionmix.tools import processes
from visionmix.tools.data import ImageSet, UnreadableData, UnreadableImage
from visionmix.tools.score import NAMES

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Evaluation:
    """The result of a model on a test set.

    Attributes:
        loss: mean cross entropy; of several labels the binary one, as a mean over labels too; without labels the sum of
            the model's own.
        figures: in percent. "top1", of images whose class is the first guess, and "top5", of images whose class is
            among the first five guesses (or all, where there are fewer classes); of several labels "map", the mean over
            labels of the average precision; none without labels.
        count: images tested; unreadable ones are not among them.
        classes: outputs of the model.
        targets: int64 (count,), the true class of each image; None of several labels and without them.
        guesses: int64 (count,), the first guess for each image; None of several labels and without them.
        unreadable: a line for each file that could not be read, with its path and the reason.
        images_per_second: of this test, loading included.
    """

    loss: float
    figures: dict[str, float]
    count: int
    classes: int
    targets: torch.Tensor | None
    guesses: torch.Tensor | None
    unreadable: list[str]
    images_per_second: float

    @property
    def top1(self) -> float:
        """Percentage of images whose class is the first guess."""
        return self.figures["top1"]

    @property
    def top5(self) -> float:
        """Percentage of images whose class is among the first five guesses."""
        return self.figures["top5"]

    @property
    def text(self) -> str:
        """The figures as a line says them."""
        if not self.figures:
            return f"loss {self.loss:.3f}"
        return ", ".join(f"{NAMES[name]} {value:.2f} %" for name, value in self.figures.items())

    @property
    def confusion(self) -> torch.Tensor:
        """Images by [true class, first guess], int64 (classes, classes)."""
        return multiclass_confusion_matrix(self.guesses, self.targets, self.classes)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the mixed-precision context of a recipe's `train.amp`; weights of "pure_bfloat16" need none."""
    return torch.autocast(device.type, dtype=AMP_DTYPES.get(amp, torch.bfloat16), enabled=amp in AMP_DTYPES)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of a model's weights, in which it takes images."""
    return next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.get_default_dtype())


def gather_lines(lines: list[str]) -> list[str]:
    """Return the sorted distinct lines of all processes."""
    return sorted({line for own in processes.gather(lines) for line in own})


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    classes: int,
    device: torch.device,
    amp: str = "none",
    after_batch: Callable[[int], None] = lambda images: None,
    adapt: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    multilabel: bool = False,
    labels: bool = True,
) -> Evaluation:
    """Test `model` on every readable image of `loader`; several processes test a share each and return the same result.

    Args:
        model: from images (batch, channels, height, width) to logits (batch, classes).
        loader: of `visionmix.tools.data.Batch`.
        classes: outputs of the model.
        device: where the model is.
        amp: "none", "float16", "bfloat16" or "pure_bfloat16", as a recipe has it.
        after_batch: called with the number of images after each batch.
        adapt: makes the logits and classes that count of the model's logits and the loader's targets.
        multilabel: whether targets are of several labels, (batch, classes).
        labels: whether there are targets; without them `model` is tested by its own losses, `forward_train`.

    Raises:
        UnreadableData: not one image could be read.
    """
    model.eval()
    dtype = model_dtype(model)
    start = time.perf_counter()
    # compute() of torchmetrics reduces over all processes.
    # "disable" leaves NaN as it is: a loss that is not a number must show, and looking for one would wait for the GPU.
    count = SumMetric(nan_strategy="disable").set_dtype(torch.float64)
    loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
    if multilabel:
        metrics = {"map": MultilabelAveragePrecision(classes, validate_args=False)}
    elif not labels:
        metrics = {}
    else:
        metrics = {
            "top1": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes), validate_args=False),
        }
    targets, guesses = (CatMetric(nan_strategy="disable").set_dtype(torch.int64) for _ in range(2))
    for metric in (count, loss, *metrics.values(), targets, guesses):
        metric.to(device)
    unreadable: list[str] = []
    for batch in loader:
        unreadable += batch.unreadable
        count.update(len(batch.targets))
        if len(batch.targets):
            target = batch.targets.to(device)
            images = batch.images.to(device, dtype, non_blocking=True)
            if not labels:
                with autocast(device, amp):
                    _, losses = model.forward_train(images)
                loss.update(torch.stack([*losses.values()]).double().sum().expand(len(target)))
                after_batch(len(target))
                continue
            with autocast(device, amp):
                logits = model(images)
            logits = logits.float()
            if adapt:
                logits, target = adapt(logits, target)
            if multilabel:
                loss.update(F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1))
                metrics["map"].update(logits, target.long())
            else:
                loss.update(F.cross_entropy(logits, target, reduction="none"))
                for metric in metrics.values():
                    metric.update(logits, target)
                targets.update(target)
                guesses.update(logits.argmax(1))
        after_batch(len(batch.targets))
    unreadable = gather_lines(unreadable)
    images = int(count.compute())
    if not images:
        raise UnreadableData(f"not one test image could be read, e.g. {', '.join(unreadable[:3])}")
    return Evaluation(
        loss=loss.compute().item(),
        figures={name: 100 * metric.compute().item() for name, metric in metrics.items()},
        count=images,
        classes=classes,
        targets=None if multilabel or not labels else targets.compute().cpu(),
        guesses=None if multilabel or not labels else guesses.compute().cpu(),
        unreadable=unreadable,
        images_per_second=images / (time.perf_counter() - start),
    )


@torch.inference_mode()
def predict_some(
    model: nn.Module, dataset: ImageSet, classes: list[str], device: torch.device, amp: str, seed: int, count: int = 50
) -> tuple[list, list, list, list]:
    """Return (images, true, predicted, sure) of `count` test images drawn at random, those that can be read.

    Of several labels, those above a probability of one half are predicted, and `sure` is that of the likeliest.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(dataset), min(count, len(dataset)), replace=False))
    rng.shuffle(chosen)
    images, true, predicted, sure = [], [], [], []
    model.eval()
    for index in chosen:
        try:
            image, target = dataset.load(int(index))
        except UnreadableImage:
            continue
        with autocast(device, amp):
            logits = model(dataset.transform(image)[None].to(device, model_dtype(model))).float()[0]
        several = isinstance(target, torch.Tensor)
        likely = logits.sigmoid() if several else logits.softmax(0)
        probability, guess = likely.max(0)
        images.append(image)
        true.append(_names(classes, target > 0.5) if several else classes[target])
        predicted.append(_names(classes, likely > 0.5) if several else classes[int(guess)])
        sure.append(float(probability))
    return images, true, predicted, sure


def _names(classes: list[str], chosen: torch.Tensor) -> str:
    """Return the names of the labels that a mask chooses."""
    return ", ".join(classes[number] for number in chosen.nonzero().flatten().tolist()) or "none"
