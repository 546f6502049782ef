"""predict over folders and shards: every picture once, in CSV and Parquet, in several processes, after a stop."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from visionmix.tools import models, predict, predictions
from visionmix.tools.items import find_items

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def guessed(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def pack(tree, shard, more=()):
    """Write the test images of `tree` into a shard, each with its class beside it, then files of any content."""
    with tarfile.open(shard, "w") as tar:
        for number, file in enumerate(sorted((tree / "val").rglob("*.jpg"))):
            tar.add(file, f"{number:04d}.jpg")
            member = tarfile.TarInfo(f"{number:04d}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"0"))
        for name, content in more:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return shard


@pytest.fixture
def call(whole_run):
    return ["--checkpoint", str(whole_run[0] / "best.safetensors"), "--workers", "0", "--topk", "2"]


def test_shards_give_the_rows_of_their_files(tree, tmp_path, call, capsys):
    (tmp_path / "shards").mkdir()
    shard = pack(tree, tmp_path / "shards" / "a.tar", [("broken.png", b"no picture"), (".hidden.jpg", b"")])
    shutil.copy(tree / "val" / "red" / "0.jpg", tmp_path / "shards" / "b.jpg")
    given = [str(tmp_path / "shards"), str(shard), str(tree / "val")]  # the shard twice
    assert predict.main([*given, *call, "--output", str(tmp_path / "p.csv"), "--batch-size", "4"]) == 0
    rows = guessed(tmp_path / "p.csv")
    names = [f"{shard}:{number:04d}.jpg" for number in range(9)]
    files = sorted((tree / "val").rglob("*.jpg"))
    assert [row["image"] for row in rows] == [
        *names, f"{shard}:broken.png", str(tmp_path / "shards" / "b.jpg"), *map(str, files)
    ]  # fmt: skip
    for inside, outside in zip(rows[:9], rows[11:], strict=True):
        assert inside["class_1"] == outside["class_1"]
        assert float(inside["probability_1"]) == pytest.approx(float(outside["probability_1"]), rel=1e-5)
    assert rows[9]["error"] == "not in a format that Pillow decodes"
    captured = capsys.readouterr()
    assert "20 pictures, 1 of which cannot be read" in captured.out
    assert f"cannot be read: {shard}:broken.png: not in a format that Pillow decodes" in captured.err
    assert not (tmp_path / "p.csv.parts").exists()


@pytest.mark.parametrize("kept", [0.5, 0.52, "members", "header", 0])
def test_a_shard_that_is_cut_off_has_a_row_that_says_so(kept, tree, tmp_path, call):
    shard = pack(tree, tmp_path / "a.tar")
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[8].offset  # the head of the fifth picture
    if kept == "header":  # damaged, with all behind it
        shard.write_bytes(content[:end] + bytes([1] * 512) + content[end + 512 :])
    else:
        shard.write_bytes(content[: end if kept == "members" else int(kept * len(content)) // 512 * 512 + 100])
    items = find_items([shard])
    assert items[-1].name == str(shard)
    assert "damaged or cut off" in items[-1].error
    if kept in ("members", "header"):
        assert len(items) == 5
    assert predict.main([str(shard), *call, "--output", str(tmp_path / "p.csv")]) == (1 if kept == 0 else 0)
    rows = guessed(tmp_path / "p.csv")
    assert rows[-1]["error"] == items[-1].error
    assert len(rows) == len(items)


def test_an_empty_shard_has_a_row(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    ((name, _, _, _, error),) = find_items([tmp_path / "a.tar"])
    assert name == str(tmp_path / "a.tar")
    assert "holds no images" in error


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_features_are_those_before_the_classifier(suffix, whole_run, tree, tmp_path, call):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    (tree / "val" / "broken.jpg").write_bytes(b"")
    output = tmp_path / f"p{suffix}"
    assert predict.main([str(tree / "val"), *call, "--features", "--output", str(output)]) == 0
    rows = predictions.read(output)
    assert list(rows[0]) == ["image", "error", "class_1", "probability_1", "class_2", "probability_2", "features"]
    model = models.load_trained(str(whole_run[0] / "best.safetensors"), device=CPU).model
    for row in rows:
        if row["image"].endswith("broken.jpg"):
            assert row["error"]
            assert not row["features"]
            assert not row["class_1"]
            continue
        assert not row["error"]
        values = row["features"].split() if suffix == ".csv" else row["features"]
        with torch.inference_mode():
            logits = model.head(torch.tensor([float(value) for value in values]))
        assert ["blue", "green", "red"][logits.argmax()] == row["class_1"]
        assert logits.softmax(0).max().item() == pytest.approx(float(row["probability_1"]), rel=1e-4)
    assert len(rows) == 10


def test_a_model_without_a_classifier_gives_features_alone(tree, tmp_path, capsys, monkeypatch):
    class Backbone(torch.nn.Module):
        num_classes = 0

        def forward_features(self, images):
            return images.mean((2, 3))

        def forward_head(self, hidden, pre_logits=False):
            return hidden

    settings = models.Input(32, "bicubic", 1.0, [0.5] * 3, [0.5] * 3)
    trained = models.Trained(Backbone(), "backbone", None, settings, None)
    monkeypatch.setattr(models, "load_trained", lambda *_, **__: trained)
    given = [str(tree / "val"), "--model", "backbone", "--pretrained", "--output", str(tmp_path / "p.csv")]
    assert predict.main(given) == 2
    assert "backbone has num_classes=0 and tells no classes apart" in capsys.readouterr().err
    assert predict.main([*given, "--features"]) == 0
    rows = guessed(tmp_path / "p.csv")
    assert list(rows[0]) == ["image", "error", "features"]
    for row in rows:
        red, _, blue = map(float, row["features"].split())
        assert (red > blue) == ("/red/" in row["image"]) or "/green/" in row["image"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--output", "p.txt"], "--output p.txt must end in .csv or .parquet"),
        (["--features"], "--features go to a file; give --output FILE"),
        (["--workers", "-1"], "workers=-1 is too small"),
        (["--output", "p.parquet"], "needs the package pyarrow; install it"),
    ],
)
def test_mistakes_are_named_before_any_work(more, words, tree, call, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_trained", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(predictions.importlib.util, "find_spec", lambda _: None)
    assert predict.main([str(tree), *call, *more]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_call_that_was_stopped_goes_on(suffix, tree, tmp_path, call, capsys, monkeypatch):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    (tree / "val" / "red" / "broken.jpg").write_bytes(b"")
    given = [str(tree / "val"), *call, "--batch-size", "2", "--output"]
    output = tmp_path / f"p{suffix}"
    assert predict.main([*given, str(tmp_path / f"whole{suffix}")]) == 0
    monkeypatch.setattr(predict, "PART_SECONDS", -1)  # a part each batch
    seen = []

    def counted(trained, items, **options):
        for rows in predict_all(trained, items, **options):
            if len(seen) == 6:
                raise KeyboardInterrupt
            yield rows
            seen.extend(row["image"] for row in rows)

    predict_all = predict.predict
    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict", counted)
        with pytest.raises(KeyboardInterrupt):
            predict.main([*given, str(output)])
    assert not output.exists()
    (tmp_path / f"p{suffix}.parts" / f".half{suffix}.77").write_bytes(b"half a part")
    assert predict.main([*given, str(output), "--topk", "3"]) == 2
    assert "holds the beginning of another call (topk=2 there, 3 now)" in capsys.readouterr().err
    again = []

    def noted(trained, items, **options):
        again.extend(item.name for item in items)
        return predict_all(trained, items, **options)

    monkeypatch.setattr(predict, "predict", noted)
    assert predict.main([*given, str(output)]) == 0
    assert "6 of 10 pictures have rows" in capsys.readouterr().out
    assert len(again) == 4
    assert not set(again) & set(seen)
    for whole, halves in zip(predictions.read(tmp_path / f"whole{suffix}"), predictions.read(output), strict=True):
        for key, value in whole.items():
            assert (
                float(halves[key] or 0) == pytest.approx(float(value or 0)) if "prob" in key else halves[key] == value
            )
    assert not (tmp_path / f"p{suffix}.parts").exists()


def test_a_picture_without_a_row_is_never_passed_over(tmp_path):
    parts = predictions.Parts(tmp_path / "p.csv", predictions.columns(0, False), {})
    parts.add([{"image": "a", "error": None}])
    with pytest.raises(RuntimeError, match=r"1 pictures have no row in .*p.csv.parts, e.g. b"):
        parts.join(["a", "b"])
    assert parts.done() == {"a"}
    assert not (tmp_path / "p.csv").exists()


RUN = """
import os, signal, sys
from visionmix.tools import predict, predictions
predict.PART_SECONDS = -1
if len(sys.argv) > 1 and sys.argv.pop(1) == "kill" and os.environ["RANK"] == "1":
    add, left = predictions.Parts.add, iter(range(3))
    def counted(self, rows):
        if next(left) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, rows)
    predictions.Parts.add = counted
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.long  # processes that import PyTorch
def test_processes_killed_and_started_in_another_number_do_every_picture_once(tree, tmp_path, call):
    (tmp_path / "run.py").write_text(RUN)
    pack(tree, tmp_path / "a.tar", [("broken.png", b"no picture")])
    given = [str(tree), str(tmp_path / "a.tar"), *call, "--batch-size", "2", "--device", "cpu", "--output"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(count, kill):
        return subprocess.run(
            [*command, str(count), str(tmp_path / "run.py"), kill, *given, str(tmp_path / "p.csv")],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip

    killed = run(2, "kill")
    assert killed.returncode != 0
    assert str(-signal.SIGKILL) in killed.stderr
    parts = list((tmp_path / "p.csv.parts").glob("*.csv"))
    before = [row["image"] for part in parts for row in guessed(part)]
    assert len(before) == len(set(before)) >= 4
    assert not (tmp_path / "p.csv").exists()
    done = run(3, "not")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of which cannot be read") == 1
    assert f"{len(before)} of 37 pictures have rows" in done.stdout
    assert predict.main([*given, str(tmp_path / "one.csv")]) == 0
    one, several = guessed(tmp_path / "one.csv"), guessed(tmp_path / "p.csv")
    assert [row["image"] for row in one] == [row["image"] for row in several]
    assert [(row["class_1"], row["error"]) for row in one] == [(row["class_1"], row["error"]) for row in several]


def test_several_processes_need_a_file(tree, call, capsys, monkeypatch):
    monkeypatch.setattr(predict.processes, "join", lambda *_, **__: (CPU, 0, 2))
    assert predict.main([str(tree), *call]) == 2
    assert "2 processes need one file for their guesses; give --output FILE" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_name_that_is_no_text_is_written_so_that_it_is(suffix, tree, tmp_path, call):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    name = os.fsdecode(b'caf\xe9, "1".png')
    with Image.open(tree / "val" / "red" / "0.jpg") as image:
        image.save(tmp_path / name, "PNG")
    output = tmp_path / f"p{suffix}"
    assert predict.main([str(tmp_path / name), *call, "--output", str(output)]) == 0
    (row,) = predictions.read(output)
    assert row["image"] == f'{tmp_path}/caf\\udce9, "1".png'
    assert not row["error"]
