"""Testing a model on an image folder: loss, top-1, top-5 and the confusion matrix, over all processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_confusion_matrix

from visionmix.tools import processes
from visionmix.tools.data import UnreadableData

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Evaluation:
    """The result of a model on a test set.

    Attributes:
        loss: mean cross entropy.
        top1: percentage of images whose class is the first guess.
        top5: percentage of images whose class is among the first five guesses (or all, where there are fewer classes).
        count: images tested; unreadable ones are not among them.
        classes: outputs of the model.
        targets: int64 (count,), the true class of each image.
        guesses: int64 (count,), the first guess for each image.
        unreadable: a line for each file that could not be read, with its path and the reason.
        images_per_second: of this test, loading included.
    """

    loss: float
    top1: float
    top5: float
    count: int
    classes: int
    targets: torch.Tensor
    guesses: torch.Tensor
    unreadable: list[str]
    images_per_second: float

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
    top1 = MulticlassAccuracy(classes, average="micro", validate_args=False)
    top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes), validate_args=False)
    targets, guesses = (CatMetric(nan_strategy="disable").set_dtype(torch.int64) for _ in range(2))
    for metric in (count, loss, top1, top5, targets, guesses):
        metric.to(device)
    unreadable: list[str] = []
    for batch in loader:
        unreadable += batch.unreadable
        count.update(len(batch.targets))
        if len(batch.targets):
            target = batch.targets.to(device)
            with autocast(device, amp):
                logits = model(batch.images.to(device, dtype, non_blocking=True))
            logits = logits.float()
            if adapt:
                logits, target = adapt(logits, target)
            loss.update(F.cross_entropy(logits, target, reduction="none"))
            top1.update(logits, target)
            top5.update(logits, target)
            targets.update(target)
            guesses.update(logits.argmax(1))
        after_batch(len(batch.targets))
    unreadable = gather_lines(unreadable)
    images = int(count.compute())
    if not images:
        raise UnreadableData(f"not one test image could be read, e.g. {', '.join(unreadable[:3])}")
    return Evaluation(
        loss=loss.compute().item(),
        top1=100 * top1.compute().item(),
        top5=100 * top5.compute().item(),
        count=images,
        classes=classes,
        targets=targets.compute().cpu(),
        guesses=guesses.compute().cpu(),
        unreadable=unreadable,
        images_per_second=images / (time.perf_counter() - start),
    )
