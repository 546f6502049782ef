"""validate and predict, with checkpoints of train and with weight files of other programs."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import best_of
from timm.data import ImageNetInfo

from visionmix.tools import checkpoint, data, models, predict, validate


def guessed(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_validate_gives_the_numbers_of_the_run(whole_run, tmp_path, capsys):
    best = checkpoint.read(best_of(whole_run[0]))["history"][-1]
    for path in (best_of(whole_run[0]), whole_run[0] / "best.safetensors"):
        files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]
        assert validate.main(["--checkpoint", str(path), "--workers", "0", *files]) == 0
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["images"] == 9
        assert result["top1"] == best["test_top1"]
        assert result["loss"] == pytest.approx(best["test_loss"], rel=1e-5)
        with (tmp_path / "r.csv").open() as file:
            assert float(next(csv.DictReader(file))["top1"]) == result["top1"]
    assert f"top-1 {best['test_top1']:.2f} %" in capsys.readouterr().out


def test_validate_leaves_out_what_it_cannot_read(whole_run, tree, cut, capsys):
    cut(tree / "val" / "red" / "0.jpg")
    assert validate.main(["--checkpoint", str(best_of(whole_run[0])), "--data", str(tree), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "of 8 images" in out
    assert f"cannot be read, left out: {tree / 'val' / 'red' / '0.jpg'}" in out


def test_validate_takes_a_plain_folder_of_classes(whole_run, tree):
    assert (
        validate.main(["--checkpoint", str(best_of(whole_run[0])), "--data", str(tree / "val"), "--workers", "0"]) == 0
    )


def test_predict(whole_run, tree, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8")
    images = [str(tree / "val"), str(tree / "train" / "red" / "0.jpg"), str(broken)]
    arguments = ["--checkpoint", str(best_of(whole_run[0])), "--topk", "2"]
    assert predict.main([*images, *arguments, "--output", str(tmp_path / "p.csv")]) == 0
    assert f"cannot be read: {broken}: not in a format" in capsys.readouterr().err
    rows = guessed(tmp_path / "p.csv")
    files = [*sorted((tree / "val").rglob("*.jpg")), tree / "train" / "red" / "0.jpg", broken]
    assert [row["image"] for row in rows] == [str(file) for file in files]
    *rows, last = rows
    assert last["error"] == "not in a format that Pillow decodes"
    assert {last[name] for name in last if name not in ("image", "error")} == {""}
    # validate counts the same first guesses.
    right = sum(f"/val/{row['class_1']}/" in row["image"] for row in rows)
    best = checkpoint.read(best_of(whole_run[0]))["history"][-1]
    assert 100 * right / 9 == pytest.approx(best["test_top1"])
    for row in rows:
        assert {row["class_1"], row["class_2"]} < {"blue", "green", "red"}
        assert 1 >= float(row["probability_1"]) >= float(row["probability_2"]) >= 0
        assert row["error"] == ""
    assert predict.main([*images, *arguments]) == 0  # as a table
    captured = capsys.readouterr()
    assert f"cannot be read: {broken}: not in a format" in captured.err
    for row in rows:
        line = next(line for line in captured.out.splitlines() if row["image"] in line)
        assert line.split()[1:] == [row["class_1"], f"{100 * float(row['probability_1']):.1f}", "%"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "0"], "batch_size=0 is too small; it must be at least 1"),
        ([], "either --checkpoint FILE or --pretrained"),
        (["--checkpoint", "/nowhere.pt"], "/nowhere.pt does not exist"),
        (["--checkpoint", "/nowhere.pt", "--pretrained"], "give either --checkpoint FILE or --pretrained, not both"),
        (["--model", "test_vig", "--pretrained", "--device", "meta"], "--device 'meta' cannot be used"),
        (["--model", "vig_zz", "--pretrained"], "is not known (did you mean 'vig_"),
    ],
)
@pytest.mark.parametrize("tool", [validate, predict])
def test_validate_and_predict_name_mistakes(tool, tree, arguments, words, capsys):
    where = [str(tree)] if tool is predict else ["--data", str(tree)]
    assert tool.main([*where, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_predict_reads_every_kind_and_names_what_it_leaves_out(whole_run, tree, tmp_path, caplog, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(tree / "val" / "red", folder / "deep")
    with Image.open(folder / "deep" / "0.jpg") as image:
        image.save(folder / "1.webp")
        image.save(folder / "2.TIF")
    for name in ("notes.txt", ".DS_Store"):
        (folder / name).touch()
    (folder / "__MACOSX").mkdir()
    shutil.copy(folder / "1.webp", folder / "__MACOSX")
    call = [str(folder), "--checkpoint", str(best_of(whole_run[0])), "--output", str(tmp_path / "p.csv")]
    assert predict.main(call) == 0
    assert len({row["image"] for row in guessed(tmp_path / "p.csv")}) == 3 + 2
    (record,) = (record for record in caplog.records if record.name.startswith("visionmix"))
    assert "left out 1 file(s) that Pillow does not decode: notes.txt" in record.message
    assert not capsys.readouterr().err


def test_predict_sees_a_16_bit_image_as_the_8_bit_one(whole_run, tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    files = [str(tmp_path / "8.png"), str(tmp_path / "16.png")]
    call = [*files, "--checkpoint", str(best_of(whole_run[0])), "--output", str(tmp_path / "p.csv")]
    assert predict.main(call) == 0
    first, second = guessed(tmp_path / "p.csv")
    ranks = (1, 2, 3)
    assert [first[f"class_{rank}"] for rank in ranks] == [second[f"class_{rank}"] for rank in ranks]
    # Rows of a batch differ in their last bit, by where they lie in memory.
    likely, other = ([float(row[f"probability_{rank}"]) for rank in ranks] for row in (first, second))
    assert likely == pytest.approx(other, rel=1e-6)
    Image.fromarray(np.float32([[0, 255]])).save(tmp_path / "float.tif")
    assert predict.main([str(tmp_path / "float.tif"), "--checkpoint", str(best_of(whole_run[0]))]) == 1
    assert "float.tif has mode 'F' and values from 0 to 255" in capsys.readouterr().err


def test_predict_replaces_its_own_results_alone(whole_run, tree, tmp_path, capsys):
    given = ["--checkpoint", str(best_of(whole_run[0])), "--output"]
    notes, rows = tmp_path / "notes.csv", tmp_path / "rows.csv"
    notes.write_text("precious,data\n1,2\n")
    images = [str(file) for file in sorted((tree / "val").rglob("*.jpg"))]
    assert predict.main([images[0], *given, str(notes)]) == 2
    assert notes.read_text() == "precious,data\n1,2\n"
    assert f"--output {notes} exists and holds no predictions" in capsys.readouterr().err
    assert predict.main([*images[:2], *given, str(rows)]) == 0
    assert predict.main([*images[1:], *given, str(rows)]) == 2
    assert f"has rows of 1 other pictures, e.g. {images[0]}" in capsys.readouterr().err
    assert len(guessed(rows)) == 2
    assert predict.main([*images, *given, str(rows)]) == 0
    assert len(guessed(rows)) == len(images)


def test_the_folder_of_a_run_is_no_checkpoint(whole_run, tree, capsys):
    assert predict.main([str(tree), "--checkpoint", str(whole_run[0])]) == 2
    assert "is the folder of a run; give one of its checkpoints" in capsys.readouterr().err


def test_predict_names_missing_images(whole_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, words in (("empty", "holds no images"), ("nothing", "does not exist")):
        assert predict.main([str(tmp_path / path), "--checkpoint", str(best_of(whole_run[0]))]) == 2
        assert words in capsys.readouterr().err


def test_other_classes_and_another_model_are_refused(whole_run, tree, tmp_path, capsys):
    best = str(best_of(whole_run[0]))
    assert validate.main(["--checkpoint", best, "--model", "resnet18"]) == 2
    assert "holds a vit_tiny_patch16_224, not --model resnet18" in capsys.readouterr().err
    (tree / "val" / "red").rename(tree / "val" / "rouge")
    assert validate.main(["--checkpoint", best, "--data", str(tree)]) == 2
    assert "other classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet10t", "test_vig"])
def test_a_foreign_file_is_loaded_whole_or_not_at_all(name, tree, tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vit.pth")
    given = ["--data", str(tree), "--checkpoint", str(tmp_path / "vit.pth"), "--workers", "0"]
    assert validate.main(["--model", "test_vit", *given]) == 2
    assert "which output each stands for" in capsys.readouterr().err
    (tmp_path / "map").write_text("blue\ngreen\nred\n")
    assert validate.main(["--model", "test_vit", *given, "--class-map", str(tmp_path / "map")]) == 0
    assert validate.main(given) == 2
    assert "does not say which model it holds" in capsys.readouterr().err
    assert validate.main(["--model", name, *given]) == 2
    assert "vit.pth" in capsys.readouterr().err


def save_foreign(path, num_classes, name="test_vit"):
    """Save a state dict as another program does, with random weights that tell images apart; return the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    torch.save({"state_dict": model.state_dict()}, path)
    return model


def guesses(model, tree):
    """Return the five best outputs of `model` for each image in tree/val, by its path."""
    settings = models.model_input(model)
    transform = data.eval_transform(settings.image_size, settings.interpolation, settings.crop_pct, settings.normalise)
    found = {}
    for file in sorted((tree / "val").rglob("*.jpg")):
        with Image.open(file) as image, torch.inference_mode():
            found[file] = model(transform(image.convert("RGB"))[None])[0].topk(5).indices.tolist()
    return found


def published(monkeypatch, file):
    """Let `pretrained=True` read `file`, where it would download."""
    make = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        overlay = {"pretrained_cfg_overlay": {"file": str(file)}} if pretrained else {}
        return make(name, pretrained, **overlay | kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize("source", ["--checkpoint", "--pretrained"])
def test_another_number_of_classes_is_refused_and_a_class_map_takes_it(source, tree, tmp_path, capsys, monkeypatch):
    file = tmp_path / "weights.pth"
    model = save_foreign(file, 1000)
    published(monkeypatch, file)
    weights = ["--checkpoint", str(file)] if source == "--checkpoint" else ["--pretrained"]
    call = ["--model", "test_vit", *weights, "--data", str(tree), "--workers", "0"]
    assert validate.main(call) == 2
    error = capsys.readouterr().err
    for words in ("has 3 classes", "test_vit have 1000 outputs", "ImageNet synset", "--class-map FILE"):
        assert words in error
    five = guesses(model, tree)
    # Two folders stand for the first guess of one of their images, the third for a second guess.
    wanted = {"blue": 0, "green": 0, "red": 1}
    output = {name: next(best for file, best in five.items() if file.parent.name == name)[place]
              for name, place in wanted.items()}  # fmt: skip
    top1 = 100 * sum(best[0] == output[file.parent.name] for file, best in five.items()) / 9
    top5 = 100 * sum(output[file.parent.name] in best for file, best in five.items()) / 9
    assert top5 > top1 > 0
    info = ImageNetInfo()
    synsets = {name: info.index_to_label_name(index) for name, index in output.items()}
    texts = [
        "".join(f"{name} {index}\n" for name, index in output.items()) + "white\t3\n",
        "".join(f"{name}\t{synset}\n" for name, synset in synsets.items()),
        json.dumps(output),
        json.dumps({name: info.label_name_to_description(synset) for name, synset in synsets.items()}),
    ]
    for number, text in enumerate(texts if source == "--checkpoint" else texts[:1]):
        (tmp_path / "map").write_text(text)
        result = tmp_path / f"{number}.json"
        assert validate.main([*call, "--class-map", str(tmp_path / "map"), "--json", str(result)]) == 0
        row = json.loads(result.read_text())
        assert (row["top1"], row["top5"]) == pytest.approx((top1, top5), rel=1e-6)
        assert (row["classes"], row["outputs"], row["images"]) == (len(set(output.values())), 1000, 9)
    assert len(set(synsets.values())) == 3
    for name, synset in synsets.items():
        (tree / "val" / name).rename(tree / "val" / synset)
    assert validate.main([*call, "--json", str(tmp_path / "synsets.json")]) == 0
    assert json.loads((tmp_path / "synsets.json").read_text())["top1"] == pytest.approx(top1, rel=1e-6)


@pytest.mark.parametrize(
    ("tool", "name", "arguments", "words"),
    [
        (validate, "test_vit", ["--data", "TREE"], "has 3 classes, the weights of test_vit have 1000 outputs"),
        (validate, "vig_t.in1k", ["--data", "TREE"], "has 3 classes, the weights of vig_t.in1k have 1000 outputs"),
        (validate, "dinat_large.in22k", ["--data", "TREE"], "have 21841 outputs"),
        (validate, "mamba_yolo_t_backbone", ["--data", "TREE"], "has num_classes=0 and tells no classes apart"),
        (validate, "vig_t", ["--data", "TREE", "--class-map", "MAP"], "output 1000 is outside [0, 999]"),
        (validate, "vig_t", [], "--data is missing"),
        (validate, "vig_t.in2k", ["--data", "TREE"], "did you mean 'vig_t.in1k'"),
        (predict, "vig_t", ["TREE", "--num-classes", "3"], "--num-classes=3, but the weights of vig_t have 1000"),
        (predict, "vig_t.in2k", ["TREE"], "did you mean 'vig_t.in1k'"),
    ],
)
def test_published_weights_are_refused_before_they_are_fetched(
    tool, name, arguments, words, tree, tmp_path, capsys, monkeypatch
):
    def create_model(*args, **kwargs):
        pytest.fail("the model is made, and its weights are fetched")

    monkeypatch.setattr(timm, "create_model", create_model)
    (tmp_path / "map").write_text("blue 1\ngreen 2\nred 1000\n")
    paths = {"TREE": str(tree), "MAP": str(tmp_path / "map")}
    assert tool.main([*(paths.get(word, word) for word in arguments), "--model", name, "--pretrained"]) == 2
    assert words in capsys.readouterr().err


def test_a_model_of_timms_without_published_weights_is_refused(tree, capsys):
    call = ["--model", "vovnet39a", "--pretrained"]
    assert predict.main([str(tree), *call]) == 2
    assert "model 'vovnet39a' cannot be made: No pretrained weights exist" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["--checkpoint", "--pretrained"])
@pytest.mark.parametrize("name", ["test_vit", "test_vig"])
def test_num_classes_of_predict_must_be_that_of_the_weights(name, source, tree, tmp_path, capsys, monkeypatch):
    file = tmp_path / "weights.pth"
    save_foreign(file, 1000, name)
    published(monkeypatch, file)
    weights = ["--checkpoint", str(file)] if source == "--checkpoint" else ["--pretrained"]
    call = [str(tree / "val" / "red"), "--model", name, *weights]
    assert predict.main([*call, "--num-classes", "3"]) == 2
    assert re.search("--num-classes=3, but the weights of .* have 1000 outputs", capsys.readouterr().err)
    assert predict.main([*call, "--num-classes", "1000"]) == 0
    printed = capsys.readouterr().out
    assert predict.main(call) == 0
    assert capsys.readouterr().out == printed


def test_a_foreign_file_says_how_many_classes_it_has(tree, tmp_path):
    save_foreign(tmp_path / "seven.pth", 7)
    call = ["--model", "test_vit", "--checkpoint", str(tmp_path / "seven.pth")]
    assert predict.main([str(tree / "val" / "red"), *call, "--output", str(tmp_path / "p.csv"), "--topk", "9"]) == 0
    for row in guessed(tmp_path / "p.csv"):
        assert {row[name] for name in row if name.startswith("class")} == set("0123456")
    assert validate.main([*call, "--data", str(tree)]) == 2


def test_folders_named_by_a_checkpoints_labels_are_mapped_by_themselves(whole_run, tree, tmp_path):
    call = ["--checkpoint", str(best_of(whole_run[0])), "--data", str(tree), "--workers", "0"]
    assert predict.main([str(tree / "val"), *call[:2], "--output", str(tmp_path / "p.csv"), "--topk", "1"]) == 0
    right = dict.fromkeys(("blue", "green", "red"), 0)
    for row in guessed(tmp_path / "p.csv"):
        right[Path(row["image"]).parent.name] += row["class_1"] == Path(row["image"]).parent.name
    for gone in ("blue", "green"):
        (tree / "val" / gone).rename(tmp_path / gone)
        assert validate.main([*call, "--json", str(tmp_path / "r.json")]) == 0
        left = [name for name in right if (tree / "val" / name).is_dir()]
        row = json.loads((tmp_path / "r.json").read_text())
        assert row["top1"] == pytest.approx(100 * sum(right[name] for name in left) / (3 * len(left)), rel=1e-6)
        assert (row["classes"], row["outputs"]) == (len(left), 3)
    (tree / "val" / "red").rename(tree / "val" / "rouge")
    (tmp_path / "map.txt").write_text("rouge red\n")
    assert validate.main([*call, "--class-map", str(tmp_path / "map.txt"), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["top1"] == pytest.approx(100 * right["red"] / 3, rel=1e-6)
