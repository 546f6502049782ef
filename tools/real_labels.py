"""ImageNet's Real labels: for each validation image all classes that are right (Beyer et al. 2020, arXiv 2006.07159).

The file is `real.json` of the paper: a list of lists of class indices, the N-th of them for ILSVRC2012_val_N, counted
from 1. Images with an empty list do not count.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from visionmix.tools.arguments import absent
from visionmix.tools.class_map import synset_outputs
from visionmix.tools.models import Outputs


def read_real_labels(file: Path) -> list[list[int]]:
    """Return the classes of each image, as indices of ImageNet-1k.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no list of lists of indices.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--real-labels {file} {absent(file)}")
    try:
        sets = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--real-labels {file} is not JSON: {error}") from error
    lists = isinstance(sets, list) and all(isinstance(labels, list) for labels in sets)
    if not lists or not all(type(label) is int and 0 <= label < 1000 for labels in sets for label in labels):
        raise ValueError(f"--real-labels {file} must be a list of lists of class indices in [0, 999], one an image")
    return sets


class RealLabels:
    """The Real labels as outputs of a model.

    Args:
        sets: as `read_real_labels` returns them.
        outputs: of the model.

    Raises:
        ValueError: the model lacks classes of ImageNet-1k.
    """

    def __init__(self, sets: Sequence[Sequence[int]], outputs: Outputs) -> None:
        places = synset_outputs(outputs)
        if places is None:
            raise ValueError(f"--real-labels: {outputs.name} does not have the classes of ImageNet-1k")
        self.sets = [[places[label] for label in labels] for labels in sets]
        most = max(map(len, self.sets), default=0)
        self.table = torch.tensor([labels + [-1] * (most - len(labels)) for labels in self.sets], dtype=torch.int64)

    @property
    def outputs(self) -> set[int]:
        """The outputs that are right for some image."""
        return {label for labels in self.sets for label in labels}

    def samples(self, samples: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return the files that have a right class, each with its place in the list of labels as its target.

        Args:
            samples: (file, target), of which the target is passed over.

        Raises:
            ValueError: a file has another name than ILSVRC2012_val_N, or N has no entry in the list, or none is left.
        """
        found = []
        for file, _ in samples:
            number = re.match(r"ILSVRC2012_val_(\d{8})(?!\d)", Path(file).name)
            place = int(number[1]) - 1 if number else -1
            if not 0 <= place < len(self.sets):
                raise ValueError(
                    f"--real-labels has {len(self.sets)} entries, for ILSVRC2012_val_00000001 and so on, and none for "
                    f"{file}; give ImageNet's validation images under their own names"
                )
            if self.sets[place]:
                found.append((file, place))
        if not found:
            raise ValueError("--real-labels has no class for any of these images")
        return found

    def adapt(self, logits: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, and as the class of each image the likeliest one of those that are right."""
        labels = self.table.to(logits.device)[places]
        own = logits.gather(1, labels.clamp(min=0)).masked_fill(labels < 0, -torch.inf)
        return logits, labels.gather(1, own.argmax(1, keepdim=True))[:, 0]
