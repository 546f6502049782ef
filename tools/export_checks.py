"""What an exported file computes, beside the model that it was made from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionmix.tools.export_runs import Run

TOLERANCE = 1e-4  # of files in float32
BATCHES = (1, 3)
# Added to height and width: sizes that patches and windows divide where they divide the first, and others.
LARGER = ((0, 0), (32, 64), (21, 9))


@dataclass(frozen=True)
class Difference:
    """How far a file's logits lie from the model's.

    Attributes:
        shape: of the images.
        error: largest difference of two logits.
        relative: `error` over the largest logit of the model.
        agreed: images with the same likeliest class.
    """

    shape: tuple[int, ...]
    error: float
    relative: float
    agreed: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape:<14} largest error {self.error:.1e}, {self.relative:.1e} of the largest logit"


def sizes_to_check(size: tuple[int, int], batch: int, dynamic: str) -> list[tuple[int, int, int]]:
    """Return (batch, height, width) of the images that a file is checked with.

    Args:
        size: height and width that it was exported at.
        batch: of images, where that is not dynamic.
        dynamic: "none", "batch" or "all", as `visionmix.tools.export_files.DYNAMIC` has it.
    """
    height, width = size
    larger = LARGER if dynamic == "all" else LARGER[:1]
    batches = BATCHES if dynamic != "none" else (batch,)
    return [(count, height + down, width + right) for down, right in larger for count in batches]


@torch.inference_mode()
def compare(run: Run, model: nn.Module, images: Tensor) -> Difference:
    """Return how far the logits of a file lie from those of `model`, for these images.

    Raises:
        ValueError: the file's have another shape, or are not finite where the model's are.
    """
    expected, found = model(images).float(), run(images).float()
    if found.shape != expected.shape:
        raise ValueError(f"the file returns {tuple(found.shape)}, the model {tuple(expected.shape)}")
    if not torch.equal(found.isfinite(), expected.isfinite()):
        raise ValueError(f"the file returns values that are not finite for images of shape {tuple(images.shape)}")
    error = (found - expected).abs().max().item()
    agreed = (found.flatten(1).argmax(1) == expected.flatten(1).argmax(1)).sum().item()
    return Difference(tuple(images.shape), error, error / expected.abs().max().item(), agreed)


def compare_random(run: Run, model: nn.Module, sizes: Iterable[tuple[int, int, int]]) -> Iterator[Difference]:
    """Yield how far a file's logits lie from the model's for normal noise of each (batch, height, width)."""
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        yield compare(run, model, torch.randn(batch, 3, height, width, generator=generator))


def agreement(run: Run, model: nn.Module, images: Sequence[Tensor], batch: int) -> tuple[int, int]:
    """Return (images with the same likeliest class, images compared).

    Args:
        run: the file.
        model: that it was made from.
        images: (channels, height, width) each.
        batch: of them a call, as a file of a fixed batch needs; the last ones are left out where they fill none.
    """
    groups = [torch.stack(list(images[at : at + batch])) for at in range(0, len(images) - batch + 1, batch)]
    return sum(compare(run, model, group).agreed for group in groups), batch * len(groups)
