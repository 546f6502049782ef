"""Resuming within an epoch: the rest that a loader gives is that of one which was never stopped, to the bit."""

import itertools

import pytest
import torch

from visionmix.tools import data, recipe

CLASSES = ["blue", "green", "red"]
NORMALISE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIZES = [[0, 16], [1, 16, 24]]


def make(tree, *, batch=2, workers=0, world=1, rank=0, shuffle=True, **options):
    sections = {"data": {"image_size": 16, "sizes": SIZES}, "augment": {"erase_prob": 0.5, "auto_augment": "rand-m9"}}
    transform = data.train_transform(recipe.from_dict(sections, "test"), NORMALISE)
    if not shuffle:
        transform = data.eval_transform(16, "bicubic", 1.0, NORMALISE)
    split = data.FolderSet(tree / "train", CLASSES, transform, seed=3, replace=shuffle)
    options = {"sizes": SIZES, "accumulate": 2, **options} if shuffle else options
    shared = {"batch": batch, "workers": workers, "world": world, "rank": rank}
    return data.make_loader(split, shuffle=shuffle, seed=3, **shared, **options)


def plain(batch):
    return batch.images, batch.targets.tolist(), batch.unreadable, batch.missing


def same(batches, others):
    assert len(batches) == len(others)
    for (images, *rest), (images_too, *rest_too) in zip(batches, others, strict=True):
        assert torch.equal(images, images_too)
        assert rest == rest_too


def epoch_of(loader, number, count=None):
    loader.sampler.set_epoch(number)
    return [plain(batch) for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 2), (2, 1), pytest.param(2, 2, marks=pytest.mark.long)])
def test_the_rest_of_an_epoch_and_the_next_are_those_of_an_uninterrupted_run(tree, cut, workers, world):
    cut(tree / "train" / "red" / "2.jpg")
    left_out = []
    for rank in range(world):
        shared = {"workers": workers, "rank": rank, "world": world}
        loader = make(tree, **shared)
        whole, following = epoch_of(loader, 1), epoch_of(loader, 2)
        assert len(whole) == {1: 8, 2: 4}[world]
        left_out += [line for _, _, unreadable, _ in whole for line in unreadable]
        for count in (0, 1, 3, len(whole)):
            stopped = make(tree, **shared)
            same(epoch_of(stopped, 1, count), whole[:count])
            state = stopped.state_dict()
            assert state == {"epoch": 1, "images": count * 2 * world}
            resumed = make(tree, **shared)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            same(epoch_of(resumed, 1), whole[count:])
            assert resumed.state_dict() == {"epoch": 1, "images": len(whole) * 2 * world}
            same(epoch_of(resumed, 2, 2), following[:2])
            assert resumed.state_dict() == {"epoch": 2, "images": 2 * 2 * world}
    assert left_out  # the rests above compare it too


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_back_within_its_own_epoch(tree, workers):
    loader = make(tree, workers=workers)
    whole, states = [], []
    loader.sampler.set_epoch(1)
    for batch in loader:
        whole.append(plain(batch))
        states.append(loader.state_dict())
    assert states == [{"epoch": 1, "images": 2 * (number + 1)} for number in range(8)]  # what is held ready is not seen
    loader.load_state_dict(states[4])
    same([plain(batch) for batch in loader], whole[5:])
    loader.load_state_dict(states[0])
    same(epoch_of(loader, 1, 2), whole[1:3])
    same(epoch_of(loader, 2), epoch_of(make(tree), 2))
    same(epoch_of(loader, 1), whole)


def test_another_number_of_workers_goes_on_from_the_same_place(tree):
    loader = make(tree, workers=2)
    epoch_of(loader, 1, 3)
    resumed = make(tree, workers=0)
    resumed.load_state_dict(loader.state_dict())
    same(epoch_of(resumed, 1), epoch_of(make(tree), 1)[3:])


def test_one_process_goes_on_where_two_stopped(tree):
    two = [make(tree, world=2, rank=rank) for rank in range(2)]
    begun = [epoch_of(loader, 1, 3) for loader in two]
    assert two[0].state_dict() == two[1].state_dict()
    one = make(tree, batch=4)
    one.load_state_dict(two[0].state_dict())
    rest = epoch_of(one, 1)
    labels = sorted(label for _, targets, _, _ in [*begun[0], *begun[1], *rest] for label in targets)
    whole = epoch_of(make(tree, batch=4), 1)
    assert labels == sorted(label for _, targets, _, _ in whole for label in targets)
    same(rest, whole[3:])


def test_a_test_set_whose_last_batch_is_short(tree):
    for rank in range(2):
        loader = make(tree, batch=4, world=2, rank=rank, shuffle=False)
        whole = epoch_of(loader, 0)
        assert [len(targets) for _, targets, _, _ in whole] == [4, 4, 1]
        assert loader.state_dict() == {"epoch": 0, "images": 24}
        loader.load_state_dict({"epoch": 0, "images": 16})
        same(epoch_of(loader, 0), whole[2:])
        loader.load_state_dict({"epoch": 0, "images": 24})
        assert epoch_of(loader, 0) == []


@pytest.mark.parametrize("state", [None, {}, {"epoch": 1}, {"epoch": -1, "images": 0}, {"epoch": 0, "images": 1.5}])
def test_a_state_that_is_none_is_refused(tree, state):
    with pytest.raises(ValueError, match="is no place of a loader"):
        make(tree).load_state_dict(state)


def test_a_place_within_a_batch_is_refused(tree):
    loader = make(tree, batch=4)
    with pytest.raises(ValueError, match=r"lies within a batch of 1 process\(es\) x data.batch_size=4"):
        loader.load_state_dict({"epoch": 0, "images": 6})
