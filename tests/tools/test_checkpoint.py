"""Checkpoints: damage, foreign weights and code in files are told; files are written whole or not at all."""

import argparse
import errno
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from visionmix.tools import checkpoint, saving

CONTENT = {
    "model": {"layer.weight": torch.arange(3.0), "count": torch.tensor(4)},
    "ema": None,
    "optimizer": {
        "state": {"layer.weight": {"exp_avg": torch.ones(3), "step": 7}, "layer.bias": {}},
        "param_groups": [{"params": ["layer.weight"], "betas": (0.9, 0.999), "lr": 0.1}],
    },
    "classes": ["x", "y"],
    "epoch": 2,
    "process": {"generators": torch.arange(5)},
}


def write(path: Path, content: dict) -> Path:
    """Write a checkpoint at once."""
    dcp.save(checkpoint.to_parts(content), storage_writer=saving._Writer(path, None), no_dist=True)
    return path


def test_round_trip(tmp_path):
    content = checkpoint.read(write(tmp_path / "epoch_0002", CONTENT))
    assert content["epoch"] == 2
    assert content["classes"] == ["x", "y"]
    assert content["ema"] is None
    assert torch.equal(content["model"]["layer.weight"], torch.arange(3.0))
    assert content["model"]["count"].item() == 4
    state = content["optimizer"]["state"]
    assert torch.equal(state["layer.weight"]["exp_avg"], torch.ones(3))
    assert state["layer.weight"]["step"] == 7
    assert state["layer.bias"] == {}
    assert content["optimizer"]["param_groups"] == CONTENT["optimizer"]["param_groups"]
    assert torch.equal(content["processes"][0]["generators"], torch.arange(5))
    checkpoint.save_weights(tmp_path / "a.safetensors", content["model"], {"classes": ["x"]})
    again = checkpoint.read(tmp_path / "a.safetensors")
    assert again["classes"] == ["x"]
    assert torch.equal(again["model"]["layer.weight"], torch.arange(3.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "epoch_0002"]


def test_a_full_disk_leaves_the_old_weights_whole(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    checkpoint.save_weights(path, {"w": torch.zeros(10)}, {"epoch": 1})

    def no_room(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", no_room)
    with pytest.raises(OSError, match=r"could not write .*; the earlier best.safetensors is whole: the disk is full"):
        checkpoint.save_weights(path, {"w": torch.ones(10)}, {"epoch": 2})
    assert checkpoint.read(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_real_full_device(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's device that is always full")
    (tmp_path / f".a.csv.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not write .*a\.csv: the disk is full, make room"):
        checkpoint.write_aside(tmp_path / "a.csv", lambda aside: aside.write_text("x" * 100_000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    words = "(cannot be read without running code|is not a whole safetensors file)"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.read(path)
    for content in (b"", b"nonsense" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* {words}"):
            checkpoint.read(path)
    if name.endswith("safetensors"):
        checkpoint.save_weights(path, {"w": torch.ones(1000)}, {})
    else:
        torch.save({"model": {"w": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"{name}.* {words}"):
        checkpoint.read(path)


@pytest.mark.parametrize("damage", ["data cut", "data gone", "metadata cut", "metadata gone", "unfinished"])
def test_a_folder_that_is_not_whole_is_refused(tmp_path, damage):
    path = write(tmp_path / "epoch_0002", CONTENT)
    part, _, how = damage.partition(" ")
    file = path / {"data": "__0_0.distcp", "metadata": ".metadata"}.get(part, "")
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "gone":
        file.unlink()
    else:
        path = path.rename(tmp_path / "epoch_0002.unfinished")
    assert checkpoint.is_whole(path) == (damage == "unfinished")  # whose name says that it may not be
    with pytest.raises((ValueError, FileNotFoundError), match=r"epoch_0002.*(cut off|has no checkpoint)"):
        checkpoint.read(path)


def test_bytes_that_have_changed_are_told(tmp_path):
    path = write(tmp_path / "epoch_0002", CONTENT)
    file = path / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ValueError, match=r"checkpoint .*epoch_0002 is damaged"):
        checkpoint.read(path)


class Evil:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


class Foreign:
    pass


def test_a_file_with_objects_is_refused_in_one_line(tmp_path):
    torch.save({"model": Foreign()}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"running code of its own.*\(it holds objects of \S*Foreign\)") as refusal:
        checkpoint.read(tmp_path / "foreign.pt")
    assert "\n" not in str(refusal.value)


def test_no_code_of_a_file_runs(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(ValueError, match=r"holds no tensors|cannot be read without running code"):
            checkpoint.read(tmp_path / name)
    path = write(tmp_path / "epoch_0001", CONTENT)
    file = io.BytesIO()
    torch.save({"process": Evil()}, file)
    parts = {"plain": {"0": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)}}
    dcp.save(parts, storage_writer=saving._Writer(tmp_path / "plain" / "epoch_0001", None), no_dist=True)
    dcp.save({"plain": {"0": torch.ones(1)}, "model": Evil()}, checkpoint_id=tmp_path / "object", no_dist=True)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    for folder in (path, tmp_path / "plain" / "epoch_0001", tmp_path / "object"):
        with pytest.raises(ValueError, match=f"{folder}.*(is damaged|not one of train.py)"):
            checkpoint.read(folder)
    assert capsys.readouterr().out == ""


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
