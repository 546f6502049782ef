"""Loaders of images: the order of an epoch, its place in the middle, and batches without what cannot be read.

The order of the images and the augmentation of each are functions of (seed, epoch, image) alone. They do not depend on
the number of workers, and a resumed run sees the images that the uninterrupted run would have seen.
"""

import itertools
import random
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from visionmix.tools.images import UnreadableImage

# Names that a split may have, in folders and data sets.
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
# Of a box to erase: image or view, top, left, height, width, seed of what fills it.
BOX = 6
NO_BOXES = torch.zeros(0, BOX, dtype=torch.int64)
# Draws after which a training batch gives up finding a readable image.
MAX_DRAWS = 20


class UnreadableData(ValueError):
    """So few files can be read that there is nothing to work with."""


def _seed(*words: int) -> int:
    """Seed python's and numpy's generators with a hash of `words`; return a seed for torch's."""
    state = np.random.SeedSequence(words).generate_state(3, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) % 2**32)
    return int(state[2]) % 2**63


def seed_everything(*words: int) -> None:
    """Seed python's, numpy's and torch's generators (those of all devices) with a hash of `words`."""
    torch.manual_seed(_seed(*words))


class Repeatable:
    """Context in which a hash of `words` seeds the three generators.

    On exit they are as they were before, except in a loader's workers, which have no other use for them.
    """

    def __init__(self, *words: int) -> None:
        self.words, self.states = words, None

    def __enter__(self) -> None:
        if get_worker_info() is None:
            self.states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        torch.random.default_generator.manual_seed(_seed(*self.words))

    def __exit__(self, *exc: object) -> None:
        if self.states:
            python, numpy, pytorch = self.states
            random.setstate(python)
            np.random.set_state(numpy)
            torch.random.set_rng_state(pytorch)


@dataclass
class Sample:
    """One image ready for the model; `image` is None where nothing readable was found.

    Attributes:
        image: (channels, height, width), uint8 or normalised float32; of `Views`, (views, channels, height, width).
        target: class index, or of several labels what `multi_hot` returns.
        unreadable: a line for each file that was passed over on the way, with its path and the reason.
        boxes: to erase, int64 (boxes, 6): view, top, left, height, width, seed.
    """

    image: torch.Tensor | None
    target: int | torch.Tensor
    unreadable: list[str]
    boxes: torch.Tensor = NO_BOXES


@dataclass
class Batch:
    """A batch of the samples that could be read.

    Attributes:
        images: (views * batch, channels, height, width), uint8 for `transforms.Finish` or normalised float32; the first
            views of all come first.
        targets: int64 (batch,), or of several labels float32 (batch, labels).
        unreadable: a line for each file that could not be read, with its path and the reason.
        missing: samples for which nothing was found.
        boxes: to erase, int64 (boxes, 6): image, top, left, height, width, seed.
    """

    images: torch.Tensor
    targets: torch.Tensor
    unreadable: list[str]
    missing: int
    boxes: torch.Tensor = NO_BOXES

    def pin_memory(self) -> "Batch":
        """Pin the tensors for a quicker copy to the GPU; DataLoader calls this."""
        self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()
        return self


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch, leaving out the missing ones."""
    found = [sample for sample in samples if sample.image is not None]
    images = _stack([sample.image for sample in found]) if found else torch.zeros(0)
    boxes = torch.cat([NO_BOXES, *(sample.boxes for sample in found)])
    places = [number for number, sample in enumerate(found) for _ in sample.boxes]
    boxes[:, 0] = boxes[:, 0] * len(found) + torch.tensor(places, dtype=torch.int64)
    return Batch(
        images=images.transpose(0, 1).flatten(0, 1) if images.ndim == 5 else images,
        targets=_targets([sample.target for sample in found]),
        unreadable=[path for sample in samples for path in sample.unreadable],
        missing=len(samples) - len(found),
        boxes=boxes,
    )


def _targets(targets: list) -> torch.Tensor:
    if targets and isinstance(targets[0], torch.Tensor):
        return torch.stack(targets)
    return torch.tensor(targets, dtype=torch.int64)


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Stack images that have their channels first or, as those of Pillow, last in memory; to turn them costs time."""
    if images[0].is_contiguous():
        return torch.stack(images)
    return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


def with_boxes(found: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels and boxes that a transform gave; one without boxes gives the pixels alone."""
    return found if isinstance(found, tuple) else (found, NO_BOXES)


class Key(NamedTuple):
    """An image of an epoch: together with the seed, all that its augmentation depends on.

    Attributes:
        epoch: from 0.
        index: of the image in the set.
        copy: of the image in the epoch, from 0.
        size: side of the input in pixels; 0 where there is only one.
    """

    epoch: int
    index: int
    copy: int = 0
    size: int = 0


class ImageSet(Dataset):
    """The images of one split, by `Key`; each kind of data has its own `load` and length.

    Args:
        transform: from a PIL image to a tensor, or a tensor and its boxes; a dictionary of them where keys have sizes.
        seed: with the key it determines the augmentation.
        replace: draw another image in place of an unreadable one, as training does; otherwise it is left out.
    """

    def __init__(self, transform, *, seed: int, replace: bool) -> None:
        self.transform, self.seed, self.replace = transform, seed, replace

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, int | torch.Tensor]:
        """Return the decoded RGB image and its target; raises UnreadableImage where that is not possible."""
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, first, copy, size = Key(*key)
        index = first
        transform = self.transform[size] if size else self.transform
        others = None
        unreadable: list[str] = []
        for _ in range(MAX_DRAWS if self.replace else 1):
            try:
                image, target = self.load(index)
            except UnreadableImage as error:
                unreadable.append(str(error))
                others = others or np.random.default_rng([self.seed, epoch, first])
                index = int(others.integers(len(self)))
                continue
            with Repeatable(self.seed, epoch, index, *[copy] * (copy > 0)):
                found = transform(image)
            pixels, boxes = with_boxes(found)
            return Sample(pixels, target, unreadable, boxes)
        return Sample(None, -1, unreadable)


def match_classes(
    source: object, own: Sequence[str], classes: Sequence[str], outputs: Sequence[int] | None
) -> list[int]:
    """Return the model's output for each class of a data set.

    Args:
        source: of the data, for messages.
        own: the data set's classes.
        classes: those that the model was told.
        outputs: the model's output for each of `classes`; their own order where None.

    Raises:
        ValueError: the data set has a class that is not one of `classes`.
    """
    targets = dict(zip(classes, range(len(classes)) if outputs is None else outputs, strict=True))
    if unknown := [name for name in own if name not in targets]:
        raise ValueError(f"{source} has classes that the model does not know: {', '.join(unknown[:5])}")
    return [targets[name] for name in own]


class EpochSampler(Sampler):
    """This process's share of an epoch's `Key`s; call `set_epoch` before each pass, or `start_at` to go on in one.

    For training, the keys are a permutation drawn from (seed, epoch), cut to whole steps of all processes. For testing,
    they are in order and all dealt out, so that every image is counted exactly once.

    With `repeats` (repeated augmentation; Hoffer et al. 2019, arXiv 1901.09335), each image of the permutation comes so
    many times in a row, to other processes where there are several, until as many are dealt out as without.

    Args:
        size: images there are.
        batch: images that each process takes at once.
        seed: with the epoch it determines the permutation.
        shuffle: whether this is training.
        rank: of this process.
        world: number of processes.
        accumulate: batches of a training step.
        repeats: times that an image comes in training, each augmented anew.
        sizes: sides of training images by epoch, as a recipe's `data.sizes`; all processes draw the same for a batch.
    """

    def __init__(
        self,
        size: int,
        *,
        batch: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        repeats: int = 1,
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.size, self.batch, self.seed, self.shuffle, self.rank, self.world = size, batch, seed, shuffle, rank, world
        self.accumulate, self.repeats, self.sizes = accumulate, repeats if shuffle else 1, sizes or [[0, 0]]
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation and the augmentation of the next pass."""
        if epoch != self.epoch:
            self.start_at(epoch, 0)

    def start_at(self, epoch: int, images: int) -> None:
        """Let the next pass be the rest of this epoch after its first `images`, of all processes together."""
        self.epoch, self.start = epoch, images // self.world

    def __len__(self) -> int:
        if self.shuffle:
            step = self.batch * self.accumulate
            return self.size // (step * self.world) * step
        return len(range(self.rank, self.size, self.world))

    def __iter__(self) -> "_Pass":
        return _Pass(self)

    def keys(self) -> Iterator[Key]:
        """Return the keys of the whole epoch."""
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        places = range(self.rank, self.size * self.repeats, self.world)[: len(self)]
        choices = [sizes for first, *sizes in self.sizes if first <= self.epoch][-1]
        drawn = np.random.default_rng([self.seed, self.epoch, 0, 1]).choice(choices, len(self) // self.batch + 1)
        return (
            Key(self.epoch, int(order[place // self.repeats]), place % self.repeats, int(drawn[number // self.batch]))
            for number, place in enumerate(places)
        )


class _Pass(Iterator):
    """The keys from a sampler's start on; its state is how far it is, which torchdata notes with each batch."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler, self.keys = sampler, None

    def __next__(self) -> Key:
        if self.keys is None:  # only now, since loaders make iterators that they never use
            self.epoch, self.seen = self.sampler.epoch, self.sampler.start
            self.sampler.start = 0
            self.keys = itertools.islice(self.sampler.keys(), self.seen, None)
        key = next(self.keys)
        self.seen += 1
        return key

    def state_dict(self) -> dict[str, int]:
        epoch, seen = (self.sampler.epoch, self.sampler.start) if self.keys is None else (self.epoch, self.seen)
        batches = -(-seen // self.sampler.batch)  # the last one of a test may be short, and shorter in one process
        return {"epoch": epoch, "images": batches * self.sampler.batch * self.sampler.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.start_at(**state)
        self.keys = None


class Loader(StatefulDataLoader):
    """torchdata's loader over an `EpochSampler`, with a state that does not depend on how many processes and workers.

    All that the rest of an epoch depends on, besides the arguments of `make_loader`, is how many of its images were
    handed out. Batches that workers hold ready do not count.
    """

    def state_dict(self) -> dict[str, int]:
        """Return the place after the last batch: {"epoch": ..., "images": of all processes}, the same in each."""
        if self._iterator is None:
            return iter(self.sampler).state_dict()
        return _find_place(super().state_dict())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on there; `sampler.set_epoch` of another epoch gives that epoch from its start.

        Raises:
            ValueError: `state` is no place within an epoch, or one between two batches of this many processes.
        """
        epoch, images = (state.get(name) if isinstance(state, dict) else None for name in ("epoch", "images"))
        if not (isinstance(epoch, int) and isinstance(images, int) and epoch >= 0 and images >= 0):
            raise ValueError(f'state={state!r} is no place of a loader; it must be {{"epoch": ..., "images": ...}}')
        step = self.batch_size * self.sampler.world
        if images % step and images < self.sampler.size:
            raise ValueError(
                f"state={state} lies within a batch of {self.sampler.world} process(es) x "
                f"data.batch_size={self.batch_size}; go on with as many images a step as before, or from an epoch's end"
            )
        super().load_state_dict({})  # ends the present pass
        self.sampler.start_at(epoch, images)


def _find_place(state: dict) -> dict[str, int]:
    """Return the state of the `_Pass` among those of the loader, its workers and samplers."""
    if "images" in state:
        return state
    inner = (value for value in state.values() if isinstance(value, dict))
    return next((found for value in inner if (found := _find_place(value))), {})


def _quiet_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    dataset: ImageSet,
    *,
    batch: int,
    workers: int,
    shuffle: bool,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    repeats: int = 1,
    sizes: Sequence[Sequence[int]] | None = None,
) -> Loader:
    """Return a loader of `Batch`es, `accumulate` of them for each training step; its sampler is an `EpochSampler`.

    Its `state_dict()` is the place within an epoch, from which `load_state_dict()` goes on.

    Raises:
        ValueError: a training set is smaller than one step of all processes.
    """
    step = batch * accumulate
    if shuffle and len(dataset) < step * world:
        times, also = (f" x train.accumulate={accumulate}", " or train.accumulate") if accumulate > 1 else ("", "")
        raise ValueError(
            f"the training set has {len(dataset)} images, fewer than one step takes ({world} process(es) x "
            f"data.batch_size={batch}{times}); lower data.batch_size{also}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with torch 2.14
        return Loader(
            dataset,
            batch_size=batch,
            sampler=EpochSampler(
                len(dataset),
                batch=batch,
                seed=seed,
                shuffle=shuffle,
                rank=rank,
                world=world,
                accumulate=accumulate,
                repeats=repeats,
                sizes=sizes,
            ),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_quiet_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its own, so that making an iterator draws nothing from the training's
        )
