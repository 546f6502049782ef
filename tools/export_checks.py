"""What an exported file computes, beside the model that it was made from."""

import copy
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
        rounding: what float32 costs the model itself, see `rounding_error`, over the largest logit. Measured where
            `relative` is more than `TOLERANCE`, else 0.
    """

    shape: tuple[int, ...]
    error: float
    relative: float
    agreed: int
    rounding: float = 0.0

    @property
    def allowed(self) -> float:
        """The largest `relative` of a file in float32: `TOLERANCE`, or twice the model's own rounding error.

        A model that ranks cells, as SG-Former does, ranks two that are nearly equal by their last bits.
        """
        return max(TOLERANCE, 2 * self.rounding)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        own = f", where the model's own rounding error is {self.rounding:.1e}" if self.rounding else ""
        return f"{shape:<14} largest error {self.error:.1e}, {self.relative:.1e} of the largest logit{own}"


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


def _logits(run: Run, images: Tensor) -> Tensor:
    try:
        return run(images).float()
    except Exception as error:  # every runtime has errors of its own
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "Guard failed" in cause:  # what torch.export says
            cause += (
                "; a dynamic file is tied to axes that have length 1 inside the model at its --img-size: export at a "
                "larger one, or with --dynamic batch"
            )
        raise ValueError(f"the file does not run for images of shape {tuple(images.shape)}: {cause}") from error


@torch.inference_mode()
def rounding_error(model: nn.Module, images: Tensor, draws: int = 4) -> float:
    """Return the largest difference between the logits of `model` and those that rounding makes of them.

    These are the logits that it computes in float64 and, `draws` times, those of `images` (batch, channels, height,
    width) whose numbers are changed by at most their last bits.
    """
    expected, generator = model(images), torch.Generator().manual_seed(0)
    others = [copy.deepcopy(model).double()(images.double())]
    for _ in range(draws):
        bits = torch.randint(-1, 2, images.shape, generator=generator)
        others.append(model(images * (1 + torch.finfo(images.dtype).eps * bits)))
    return max((other - expected).abs().max().item() for other in others)


@torch.inference_mode()
def compare(run: Run, model: nn.Module, images: Tensor, *, exact: bool = False) -> Difference:
    """Return how far the logits of a file lie from those of `model`, for these images.

    Args:
        run: the file.
        model: that it was made from.
        images: (batch, channels, height, width).
        exact: measure the model's own rounding error where the file's is more than `TOLERANCE`.

    Raises:
        ValueError: the file does not run, or its logits have another shape, or are not finite where the model's are.
    """
    expected, found = model(images).float(), _logits(run, images)
    if found.shape != expected.shape:
        raise ValueError(f"the file returns {tuple(found.shape)}, the model {tuple(expected.shape)}")
    if not torch.equal(found.isfinite(), expected.isfinite()):
        raise ValueError(f"the file returns values that are not finite for images of shape {tuple(images.shape)}")
    error = (found - expected).abs().max().item()
    agreed = (found.flatten(1).argmax(1) == expected.flatten(1).argmax(1)).sum().item()
    largest, rounding = expected.abs().max().item(), 0.0
    if exact and not error / largest <= TOLERANCE:
        rounding = rounding_error(model, images) / largest
    return Difference(tuple(images.shape), error, error / largest, agreed, rounding)


def compare_random(
    run: Run, model: nn.Module, sizes: Iterable[tuple[int, int, int]], *, exact: bool = False
) -> Iterator[Difference]:
    """Yield how far a file's logits lie from the model's for normal noise of each (batch, height, width)."""
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        yield compare(run, model, torch.randn(batch, 3, height, width, generator=generator), exact=exact)


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
