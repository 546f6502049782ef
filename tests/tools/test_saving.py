"""A run's checkpoints: written beside the training, whole or not taken, old ones deleted."""

import errno
import io
import itertools
import shutil
import threading

import pytest
import torch

from visionmix.tools import checkpoint, saving


def content(value: float = 1.0, size: int = 1000) -> dict:
    return {"model": {"w": torch.full((size,), value)}, "value": value, "process": None}


@pytest.fixture
def said():
    return []


@pytest.fixture
def saver(tmp_path, said):
    return saving.Saver(tmp_path, lambda text, style: said.append(text))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save(saver, name, value=1.0, best=None):
    saver.save(name, content(value), best)
    saver.wait()


def test_names_sort_in_time(tmp_path):
    order = ["epoch_0000_step_00000007", "epoch_0001", "epoch_0001_step_00000100", "epoch_0002", "epoch_10000"]
    assert [saving.name_of(*place) for place in ((0, 7), (1,), (1, 100), (2,), (10000,))] == order
    for name in reversed(order):
        (tmp_path / name).mkdir()
    (tmp_path / "notes").mkdir()
    assert [path.name for path in saving._listed(tmp_path)] == order[::-1]


def test_the_content_is_that_of_the_moment_though_it_is_written_later(saver, tmp_path, monkeypatch):
    write, may = saving._Writer.write_data, threading.Event()

    def slow(self, *args):
        assert may.wait(60)
        return write(self, *args)

    monkeypatch.setattr(saving._Writer, "write_data", slow)
    made = content()
    saver.save("epoch_0001", made)  # and the training goes on
    made["model"]["w"].fill_(5.0)
    assert saving.newest(tmp_path)[0] is None
    may.set()
    saver.wait()
    assert torch.equal(checkpoint.read(tmp_path / "epoch_0001")["model"]["w"], torch.ones(1000))


def test_old_ones_are_deleted_but_the_best(saver, tmp_path):
    (tmp_path / "notes").mkdir()
    for epoch in range(1, 6):
        save(saver, f"epoch_{epoch:04d}", best=f"epoch_{min(epoch, 2):04d}")
    assert names(tmp_path) == ["epoch_0002", "epoch_0004", "epoch_0005", "notes"]
    save(saver, "epoch_0005_step_00000100", best="epoch_0002")
    assert names(tmp_path) == ["epoch_0002", "epoch_0005", "epoch_0005_step_00000100", "notes"]


def test_a_run_that_goes_on_from_an_earlier_one_deletes_those_after_it(saver, tmp_path):
    for epoch in (1, 2, 3, 4):
        save(saver, f"epoch_{epoch:04d}", best="epoch_0002")
    (tmp_path / "epoch_0009.unfinished").mkdir()
    save(saver, "epoch_0003", value=7.0, best="epoch_0002")
    assert names(tmp_path) == ["epoch_0002", "epoch_0003"]
    assert checkpoint.read(tmp_path / "epoch_0003")["value"] == 7.0


@pytest.mark.parametrize("cut", ["unfinished", "no metadata", "half"])
def test_one_that_was_cut_off_is_passed_over(saver, tmp_path, cut):
    for epoch in (1, 2):
        save(saver, f"epoch_{epoch:04d}", value=float(epoch))
    path = tmp_path / "epoch_0002"
    if cut == "unfinished":
        path = path.rename(tmp_path / "epoch_0002.unfinished")
    elif cut == "no metadata":
        (path / ".metadata").unlink()
    else:
        file = path / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert saving.newest(tmp_path) == (tmp_path / "epoch_0001", [path])


def test_no_moment_of_writing_loses_the_one_before(saver, tmp_path, monkeypatch):
    """The process may die between any two calls that change the disk."""
    save(saver, "epoch_0001", value=1.0)
    save(saver, "epoch_0002", value=2.0)
    seen, watching = [], []

    def watch(owner, name):
        call = getattr(owner, name)

        def watched(*args, **kwargs):
            if not watching:
                watching.append(name)
                path, _ = saving.newest(tmp_path)
                seen.append((name, path.name, checkpoint.read(path)["value"]))
                watching.clear()
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(saving._Files, "create_stream")
    watch(saving._Files, "rename")
    watch(shutil, "rmtree")
    watch(type(tmp_path), "rename")
    save(saver, "epoch_0002", value=3.0)
    save(saver, "epoch_0003", value=4.0)
    assert {name for name, *_ in seen} == {"create_stream", "rename", "rmtree"}
    assert {(name, value) for _, name, value in seen} <= {
        ("epoch_0001", 1.0), ("epoch_0002", 2.0), ("epoch_0002", 3.0), ("epoch_0003", 4.0),
    }  # fmt: skip
    assert names(tmp_path) == ["epoch_0002", "epoch_0003"]


def test_a_full_disk_is_told_and_the_one_before_stays_whole(saver, tmp_path, said, monkeypatch):
    save(saver, "epoch_0001")

    room = [300]

    def put(self, data):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return io.FileIO.write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(saving._Honest, "put", put)
        save(saver, "epoch_0002")
    assert names(tmp_path) == ["epoch_0001"]
    (text,) = said
    assert text == (
        f"could not write {tmp_path / 'epoch_0002'}: the disk is full, make room; epoch_0001 is whole, and "
        "the training goes on"
    )
    save(saver, "epoch_0003")  # there is room again
    assert names(tmp_path) == ["epoch_0001", "epoch_0003"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path, said):
    (tmp_path / "file").touch()
    saver = saving.Saver(tmp_path / "file" / "checkpoints", lambda text, style: said.append(text))
    save(saver, "epoch_0001")
    assert len(said) == 1
    assert "epoch_0001: " in said[0]
    assert said[0].endswith("; the training goes on")


def test_steps_and_minutes_between_two_checkpoints(tmp_path, monkeypatch):
    clock = itertools.count(0, 20)
    monkeypatch.setattr(saving.time, "monotonic", lambda: float(next(clock)))
    never = saving.Saver(tmp_path, print)
    assert not any(never.due(step) for step in range(1, 20))
    steps = saving.Saver(tmp_path, print, steps=3)
    assert [step for step in range(1, 10) if steps.due(step)] == [3, 6, 9]
    minutes = saving.Saver(tmp_path, print, minutes=1)
    found = []
    for step in range(1, 10):
        if minutes.due(step):
            minutes.saved = saving.time.monotonic()
            found.append(step)
    assert found == [3, 6, 9]
