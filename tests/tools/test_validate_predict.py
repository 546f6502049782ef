"""validate and predict, on a checkpoint of train and on foreign files."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionmix.tools import checkpoint, predict, train, validate

KWARGS = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def trained(recipe_file, tree, tmp_path):
    output = tmp_path / "out"
    assert train.main([str(recipe_file), "--data", str(tree), "--output", str(output), "--epochs", "2"]) == 0
    return output


def test_validate_gives_the_numbers_of_the_run(trained, tmp_path, capsys):
    best = checkpoint.read(trained / "best.pt")["history"][-1]
    for name in ("best.pt", "best.safetensors"):
        files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]
        assert validate.main(["--checkpoint", str(trained / name), "--workers", "0", *files]) == 0
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["images"] == 9
        assert result["top1"] == best["test_top1"]
        assert result["loss"] == pytest.approx(best["test_loss"], rel=1e-5)
        with (tmp_path / "r.csv").open() as file:
            assert float(next(csv.DictReader(file))["top1"]) == result["top1"]
    assert f"top-1 {best['test_top1']:.2f} %" in capsys.readouterr().out


def test_validate_leaves_out_what_it_cannot_read(trained, tree, cut, capsys):
    cut(tree / "val" / "red" / "0.jpg")
    assert validate.main(["--checkpoint", str(trained / "best.pt"), "--data", str(tree), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "of 8 images" in out
    assert f"cannot be read, left out: {tree / 'val' / 'red' / '0.jpg'}" in out


def test_validate_takes_a_plain_folder_of_classes(trained, tree):
    assert validate.main(["--checkpoint", str(trained / "best.pt"), "--data", str(tree / "val"), "--workers", "0"]) == 0


def test_predict(trained, tree, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8")
    images = [str(tree / "val"), str(tree / "train" / "red" / "0.jpg"), str(broken)]
    arguments = ["--checkpoint", str(trained / "best.pt"), "--topk", "2", "--csv", str(tmp_path / "p.csv")]
    assert predict.main([*images, *arguments]) == 0
    captured = capsys.readouterr()
    assert f"cannot be read: {broken}: not in a format" in captured.err
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 10
    assert {row["class"] for row in rows} <= {"blue", "green", "red"}
    # The first guesses are those that validate counts.
    right = sum(row["rank"] == "1" and f"/val/{row['class']}/" in row["image"] for row in rows)
    best = checkpoint.read(trained / "best.pt")["history"][-1]
    assert 100 * right / 9 == pytest.approx(best["test_top1"])
    for image in {row["image"] for row in rows}:
        first, second = (float(row["probability"]) for row in rows if row["image"] == image)
        assert 1 >= first >= second >= 0
    assert "red" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --checkpoint FILE or --pretrained"),
        (["--checkpoint", "/nowhere.pt"], "/nowhere.pt does not exist"),
        (["--model", "vig_zz", "--pretrained"], "is not known; did you mean"),
    ],
)
@pytest.mark.parametrize("tool", [validate, predict])
def test_mistakes(tool, tree, arguments, words, capsys):
    where = [str(tree)] if tool is predict else ["--data", str(tree)]
    assert tool.main([*where, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_predict_reads_every_kind_and_names_what_it_leaves_out(trained, tree, tmp_path, caplog, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(tree / "val" / "red", folder / "deep")
    with Image.open(folder / "deep" / "0.jpg") as image:
        image.save(folder / "1.webp")
        image.save(folder / "2.TIF")
    for name in ("notes.txt", ".DS_Store"):
        (folder / name).touch()
    (folder / "__MACOSX").mkdir()
    shutil.copy(folder / "1.webp", folder / "__MACOSX")
    assert predict.main([str(folder), "--checkpoint", str(trained / "best.pt"), "--csv", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open() as file:
        assert len({row["image"] for row in csv.DictReader(file)}) == 3 + 2
    (record,) = caplog.records
    assert "left out 1 file(s) that Pillow does not decode: notes.txt" in record.message
    assert not capsys.readouterr().err


def test_predict_sees_a_16_bit_image_as_the_8_bit_one(trained, tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    files = [str(tmp_path / "8.png"), str(tmp_path / "16.png")]
    assert predict.main([*files, "--checkpoint", str(trained / "best.pt"), "--csv", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open() as file:
        rows = [(row["image"], row["class"], row["probability"]) for row in csv.DictReader(file)]
    assert [row[1:] for row in rows if row[0] == files[0]] == [row[1:] for row in rows if row[0] == files[1]]
    Image.fromarray(np.float32([[0, 255]])).save(tmp_path / "float.tif")
    assert predict.main([str(tmp_path / "float.tif"), "--checkpoint", str(trained / "best.pt")]) == 1
    assert "float.tif has mode 'F' and values from 0 to 255" in capsys.readouterr().err


def test_predict_names_missing_images(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, words in (("empty", "holds no images"), ("nothing", "does not exist")):
        assert predict.main([str(tmp_path / path), "--checkpoint", str(trained / "best.pt")]) == 2
        assert words in capsys.readouterr().err


def test_other_classes_and_another_model_are_refused(trained, tree, tmp_path, capsys):
    best = str(trained / "best.pt")
    assert validate.main(["--checkpoint", best, "--model", "resnet18"]) == 2
    assert "holds a vit_tiny_patch16_224, not --model resnet18" in capsys.readouterr().err
    (tree / "val" / "red").rename(tree / "val" / "rouge")
    assert validate.main(["--checkpoint", best, "--data", str(tree)]) == 2
    assert "other classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet10t", "test_vig"])
def test_a_foreign_file_is_loaded_whole_or_not_at_all(name, tree, tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vit.pth")
    data = ["--data", str(tree), "--checkpoint", str(tmp_path / "vit.pth"), "--workers", "0"]
    assert validate.main(["--model", "test_vit", *data]) == 0
    assert validate.main([*data]) == 2
    assert "does not say which model it holds" in capsys.readouterr().err
    assert validate.main(["--model", name, *data]) == 2
    assert "vit.pth" in capsys.readouterr().err
