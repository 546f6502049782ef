"""Images that have one label each or any number of them, of whatever kind of data."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from visionmix.tools.loading import ImageSet, match_classes


class LabelSet(ImageSet):
    """The images of one split, by `Key`; each kind of data has its own `read`.

    Args:
        source: of the data, for messages.
        own: names of the data's labels.
        classes: names of all labels.
        numbers: of the labels of each image, counted in `own`; lists of one without `multilabel`.
        transform: as `ImageSet` takes it.
        outputs: the model's output for each of `classes`; their own order where None, and with `multilabel`.
        multilabel: targets are vectors with 1 at the labels of an image and 0 elsewhere, not one class.
        augmented: `seed` and `replace` of `ImageSet`.

    Raises:
        ValueError: a label is not one of `classes`.
    """

    def __init__(
        self,
        source: object,
        own: Sequence[str],
        classes: Sequence[str],
        numbers: Sequence[Sequence[int]],
        transform,
        *,
        outputs: Sequence[int] | None = None,
        multilabel: bool,
        **augmented: Any,
    ) -> None:
        super().__init__(transform, **augmented)
        places = match_classes(source, own, classes, None if multilabel else outputs)
        self.targets = [[places[number] for number in each] for each in numbers]
        self.labels = len(classes) if multilabel else None

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Image.Image:
        """Return the decoded RGB image; raises UnreadableImage where that is not possible."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, int | torch.Tensor]:
        """Return the decoded RGB image and its target; raises UnreadableImage where that is not possible."""
        numbers = self.targets[index]
        if self.labels is None:
            return self.read(index), numbers[0]
        target = torch.zeros(self.labels)
        target[numbers] = 1.0
        return self.read(index), target
