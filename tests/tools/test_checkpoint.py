"""Checkpoints: the old one survives, damage and foreign weights are told."""

import argparse
import errno
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from visionmix.tools import checkpoint


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"model": {"w": torch.arange(3.0)}, "classes": ["x"], "epoch": 2})
    content = checkpoint.read(tmp_path / "a.pt")
    assert content["epoch"] == 2
    assert torch.equal(content["model"]["w"], torch.arange(3.0))
    checkpoint.save_weights(tmp_path / "a.safetensors", content["model"], {"classes": ["x"]})
    again = checkpoint.read(tmp_path / "a.safetensors")
    assert again["classes"] == ["x"]
    assert torch.equal(again["model"]["w"], torch.arange(3.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]


@pytest.fixture
def full_disk(monkeypatch):
    """A disk with room for 1,000 more bytes."""
    opened, room = Path.open, [1000]

    class File(io.FileIO):
        def write(self, content):
            if len(content) > room[0]:
                super().write(bytes(content)[: room[0]])
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= len(content)
            return super().write(content)

    def open_small(self, mode="r", *args, **kwargs):
        return File(self, "wb") if mode == "wb" else opened(self, mode, *args, **kwargs)

    def fill():
        monkeypatch.setattr(Path, "open", open_small)

    return fill


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, full_disk):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.zeros(1000)}, "epoch": 1})
    full_disk()
    with pytest.raises(OSError, match=r"could not write .*last\.pt; the earlier last\.pt is whole: the disk is full"):
        checkpoint.save(path, {"model": {"w": torch.ones(1000)}, "epoch": 2})
    assert checkpoint.read(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_real_full_device(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's device that is always full")
    (tmp_path / f".a.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not write .*a\.pt: the disk is full, make room"):
        checkpoint.save(tmp_path / "a.pt", {"model": {"w": torch.ones(100_000)}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.read(path)
    for content in (b"", b"nonsense" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* (is damaged|is not a whole safetensors file)"):
            checkpoint.read(path)
    if name.endswith("safetensors"):
        checkpoint.save_weights(path, {"w": torch.ones(1000)}, {})
    else:
        checkpoint.save(path, {"model": {"w": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"{name}.* (is damaged|is not a whole safetensors file)"):
        checkpoint.read(path)


class Evil:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


def test_no_code_of_a_file_runs(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(ValueError, match=r"holds no tensors|cannot be read without running code"):
            checkpoint.read(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_a_later_format_is_refused(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="format=99"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"format": "pt", "state_dict": {f"module.{key}": value for key, value in s.items()}},
        lambda s: {"model": {key: value + 5 for key, value in s.items()}, "model_ema": s},
        lambda s: {"model": s, "config": argparse.Namespace(lr=0.1)},
    ],
)
def test_wrapped_foreign_files(tmp_path, wrap):
    torch.save(wrap({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}), tmp_path / "a.pth")
    model = nn.Linear(3, 2)
    checkpoint.load_weights(model, checkpoint.weights(checkpoint.read(tmp_path / "a.pth")), "a.pth")
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_weights_of_another_model_are_never_half_loaded():
    model = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="another model than Linear; nothing was loaded") as caught:
        checkpoint.load_weights(model, {"weight": torch.ones(2, 4), "scale": torch.ones(2)}, "a.pth")
    for words in ("missing bias (2,)", "unknown scale", "weight is (2, 4) in the file, (2, 3) in the model"):
        assert words in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
