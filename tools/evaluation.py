"""Testing a model on an image folder: loss, top-1, top-5 and the confusion matrix, summed over processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from visionmix.tools.data import UnreadableData

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Evaluation:
    """What a model reached on a test set.

    Attributes:
        loss: mean cross entropy.
        top1: percentage of images whose class is the first guess.
        top5: percentage of images whose class is among the first five guesses (or all, where there are fewer classes).
        count: images tested; unreadable ones are not among them.
        confusion: int64 (classes, classes), images by [true class, first guess].
        unreadable: paths of files that could not be read.
        images_per_second: of this test, loading included.
    """

    loss: float
    top1: float
    top5: float
    count: int
    confusion: torch.Tensor
    unreadable: list[str]
    images_per_second: float


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the mixed-precision context of "none", "float16" or "bfloat16"."""
    return torch.autocast(device.type, dtype=AMP_DTYPES.get(amp, torch.bfloat16), enabled=amp in AMP_DTYPES)


def gather_paths(paths: list[str]) -> list[str]:
    """Return the sorted distinct paths of all processes."""
    if dist.is_initialized():
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, paths)
        paths = [path for own in everyone for path in own]
    return sorted(set(paths))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    classes: int,
    device: torch.device,
    amp: str = "none",
    after_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Test `model` on every readable image of `loader`, this process's share of it where there are several.

    Args:
        model: from images (batch, channels, height, width) to logits (batch, classes).
        loader: of `visionmix.tools.data.Batch`.
        classes: outputs of the model.
        device: where the model is.
        amp: "none", "float16" or "bfloat16".
        after_batch: called with the number of images after each batch.

    Raises:
        UnreadableData: when not one image could be read.
    """
    model.eval()
    start = time.perf_counter()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, images
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    unreadable: list[str] = []
    for batch in loader:
        unreadable += batch.unreadable
        if len(batch.targets):
            targets = batch.targets.to(device)
            with autocast(device, amp):
                logits = model(batch.images.to(device, non_blocking=True))
            logits = logits.float()
            guesses = logits.topk(min(5, classes), dim=1).indices
            hits = guesses == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            sums[:3] += torch.stack([loss, hits[:, 0].sum(), hits.sum()]).cpu().double()
            sums[3] += len(targets)
            pairs = (targets * classes + guesses[:, 0]).cpu()
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        after_batch(len(batch.targets))
    if dist.is_initialized():
        # NCCL sums only tensors on a GPU.
        sums, confusion = sums.to(device), confusion.to(device)
        dist.all_reduce(sums)
        dist.all_reduce(confusion)
        sums, confusion = sums.cpu(), confusion.cpu()
    unreadable = gather_paths(unreadable)
    loss, top1, top5, count = sums.tolist()
    if not count:
        raise UnreadableData(f"not one test image could be read, e.g. {', '.join(unreadable[:3])}")
    return Evaluation(
        loss=loss / count,
        top1=100 * top1 / count,
        top5=100 * top5 / count,
        count=int(count),
        confusion=confusion,
        unreadable=unreadable,
        images_per_second=count / (time.perf_counter() - start),
    )
