"""validate over several models and variants of ImageNet: CSV, published figures, Real labels, chosen outputs."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small_runs import last_of
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from visionmix.models import published
from visionmix.tools import checkpoint, data, models, validate
from visionmix.tools.real_labels import RealLabels, read_real_labels

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def save(path, name="test_vit", num_classes=1000, seed=0):
    """Save weights that tell images apart; return the model."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    torch.save({"state_dict": model.state_dict()}, path)
    return model


def scores(model, folder):
    """Return the logits of each image in `folder`, by its name."""
    settings = models.model_input(model)
    transform = data.eval_transform(settings.image_size, settings.interpolation, settings.crop_pct, settings.normalise)
    found = {}
    for file in sorted(folder.rglob("*.jpg")):
        with Image.open(file) as image, torch.inference_mode():
            found[file.name] = model(transform(image.convert("RGB"))[None])[0]
    return found


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_several_tests_fill_a_csv_and_are_not_made_again(whole_run, tree, tmp_path, capsys, monkeypatch):
    made = []
    evaluate = validate.evaluate

    def counted(model, *args, **options):
        made.append(model)
        return evaluate(model, *args, **options)

    monkeypatch.setattr(validate, "evaluate", counted)
    files = [str(whole_run[0] / "best.safetensors"), str(last_of(whole_run[0]))]
    call = ["--data", str(tree), "--workers", "0", "--csv", str(tmp_path / "r.csv")]
    assert validate.main(["--checkpoint", files[0], *call]) == 0
    assert validate.main(["--checkpoint", *files, *call]) == 0
    assert len(made) == 2
    assert f"{files[0]}: {tmp_path / 'r.csv'} has this test" in capsys.readouterr().out
    assert [row["checkpoint"] for row in rows(tmp_path / "r.csv")] == files
    history = checkpoint.read(files[1])["history"]
    assert float(rows(tmp_path / "r.csv")[1]["top1"]) == history[-1]["test_top1"]
    # Another size, another image or other weights under the same name are another test.
    assert validate.main(["--checkpoint", files[0], *call, "--amp", "bfloat16"]) == 0
    shutil.copy(tree / "val" / "red" / "0.jpg", tree / "val" / "red" / "more.jpg")
    assert validate.main(["--checkpoint", files[0], *call]) == 0
    assert len(made) == 4
    assert [row["images"] for row in rows(tmp_path / "r.csv")] == ["9", "9", "9", "10"]
    content = checkpoint.read(files[0])
    for number, _ in enumerate(("as it is", "trained on")):
        content["model"]["head.bias"] += number
        about = {key: value for key, value in content.items() if key != "model"}
        checkpoint.save_weights(tmp_path / "best.safetensors", content["model"], about)
        assert validate.main(["--checkpoint", str(tmp_path / "best.safetensors"), *call]) == 0
    assert len(rows(tmp_path / "r.csv")) == len(made) == 6
    # A file of arguments.
    (tmp_path / "list.txt").write_text("\n" + "\n\n".join(files) + "\n")
    assert validate.main([*call, "--checkpoint", f"@{tmp_path / 'list.txt'}"]) == 0
    assert [row["checkpoint"] for row in rows(tmp_path / "r.csv")][-1] == files[1]


def test_a_checkpoint_of_shards_is_tested_on_them(tree, tmp_path, recipe_file):
    pytest.importorskip("webdataset")
    from visionmix.tools import pack, train

    assert pack.main([str(tree), str(tmp_path / "shards")]) == 0
    output = tmp_path / "out"
    given = [str(recipe_file), "--data", str(tmp_path / "shards"), "--output", str(output), "--device", "cpu"]
    assert train.main([*given, "--epochs", "2"]) == 0
    call = ["--checkpoint", str(last_of(output)), "--workers", "0", "--csv", str(tmp_path / "r.csv")]
    assert validate.main(call) == 0
    assert validate.main([*call, "--data", str(tree)]) == 0
    shards, folder = rows(tmp_path / "r.csv")
    assert float(shards["top1"]) == checkpoint.read(last_of(output))["history"][-1]["test_top1"]
    assert (shards["data"], shards["images"]) == (str(tmp_path / "shards"), "9")
    assert (folder["top1"], folder["classes"]) == (shards["top1"], shards["classes"])


def test_a_failure_leaves_the_other_tests_their_turn(whole_run, tree, tmp_path, capsys):
    best = str(whole_run[0] / "best.safetensors")
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    call = ["--data", str(tree), "--workers", "0", "--csv", str(tmp_path / "r.csv")]
    assert validate.main(["--checkpoint", str(tmp_path / "damaged.pt"), best, *call]) == 2
    assert "damaged.pt" in capsys.readouterr().err
    assert [row["checkpoint"] for row in rows(tmp_path / "r.csv")] == [best]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "BEST", "none.pt"], "checkpoint none.pt does not exist"),
        (["--model", "a", "b", "--checkpoint", "BEST", "BEST", "BEST"], "--model has 2 names and --checkpoint 3 files"),
        (["--checkpoint", "BEST", "BEST", "--json", "r.json"], "--json takes one result, and these are 2"),
        (["--checkpoint", "BEST", "--only-mapped"], "--only-mapped needs --class-map FILE"),
        (["--checkpoint", "BEST", "--csv", "OTHER"], "has other columns than this command writes"),
        (["--checkpoint", "BEST", "--real-labels", "none.json"], "--real-labels none.json does not exist"),
        (["--checkpoint", "BEST", "--real-labels", "OTHER"], "is not JSON"),
        (["--pretrained"], "--pretrained does not say which model"),
        (["--pretrained", "--model", "vig_t", "mamba_yolo_t_backbone"], "mamba_yolo_t_backbone has num_classes=0"),
    ],
)
def test_mistakes_are_named_before_any_test(arguments, words, whole_run, tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_trained", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ImageNetInfo().label_names()[:3]:
        shutil.copytree(tree / "val" / "red", tmp_path / "imagenet" / name)
    given = {"BEST": str(whole_run[0] / "best.safetensors"), "OTHER": str(tmp_path / "other.csv")}
    call = [given.get(word, word) for word in arguments]
    assert validate.main([*call, "--data", str(tmp_path / "imagenet")]) == 2
    assert words in capsys.readouterr().err


def imagenet(tree, folder, synsets):
    """Give ImageNet's names to the test images of `tree`, three in each class; return the names of the files."""
    number, names = 0, []
    for colour, synset in zip(("blue", "green", "red"), synsets, strict=True):
        (folder / synset).mkdir(parents=True)
        for file in sorted((tree / "val" / colour).iterdir()):
            number += 1
            names.append(f"ILSVRC2012_val_{number:08d}.jpg")
            shutil.copy(file, folder / synset / names[-1])
    return names


def test_the_published_figure_stands_beside_the_measured_one(tree, tmp_path, capsys):
    imagenet(tree, tmp_path / "val", ImageNetInfo().label_names()[:3])
    save(tmp_path / "vig.pth", "vig_t")
    save(tmp_path / "vit.pth", "test_vit")
    files = [str(tmp_path / name) for name in ("vig.pth", "vit.pth")]
    call = ["--data", str(tmp_path / "val"), "--workers", "0", "--csv", str(tmp_path / "r.csv"), "--img-size", "64"]
    assert validate.main(["--model", "vig_t", "--checkpoint", files[0], *call]) == 0
    assert validate.main(["--model", "test_vit", "--checkpoint", files[1], *call[:-2]]) == 0
    first, second = rows(tmp_path / "r.csv")
    figure = published("vig_t").top1
    assert float(first["published_top1"]) == figure
    assert float(first["difference"]) == pytest.approx(float(first["top1"]) - figure, abs=5e-3)
    assert f"published {figure} % ({float(first['difference']):+.2f})" in capsys.readouterr().out
    assert second["published_top1"] == second["difference"] == ""


def test_a_published_figure_is_not_set_beside_other_classes(tree, tmp_path):
    save(tmp_path / "vig.pth", "vig_t", num_classes=3)
    (tmp_path / "map").write_text("blue\ngreen\nred\n")
    call = ["--model", "vig_t", "--checkpoint", str(tmp_path / "vig.pth"), "--data", str(tree), "--img-size", "64"]
    call += ["--workers", "0", "--class-map", str(tmp_path / "map"), "--csv", str(tmp_path / "r.csv")]
    assert validate.main(call) == 0
    assert rows(tmp_path / "r.csv")[0]["published_top1"] == ""


def test_real_labels_count_every_right_class(tree, tmp_path, capsys):
    names = imagenet(tree, tmp_path / "val", ["one", "two", "three"])  # the folders' names do not matter
    model = save(tmp_path / "vit.pth")
    logits = scores(model, tmp_path / "val")
    order = {name: logits[name].argsort(descending=True).tolist() for name in names}
    # First guesses, third guesses, wrong ones, and none.
    labels = [[999 - order[names[0]][0], order[names[0]][0]], [order[names[1]][2], order[names[1]][500]]]
    labels += [[order[names[2]][5], order[names[2]][6]], [], [order[names[4]][0]]]
    labels += [[order[name][-1]] for name in names[5:]] + [[0]] * 10
    (tmp_path / "real.json").write_text(json.dumps(labels))
    call = ["--model", "test_vit", "--checkpoint", str(tmp_path / "vit.pth"), "--data", str(tmp_path / "val")]
    call += ["--workers", "0", "--batch-size", "4", "--real-labels", str(tmp_path / "real.json")]
    assert validate.main([*call, "--json", str(tmp_path / "r.json")]) == 0
    row = json.loads((tmp_path / "r.json").read_text())
    assert row["images"] == 8
    assert row["top1"] == pytest.approx(100 * 2 / 8)
    assert row["top5"] == pytest.approx(100 * 3 / 8)
    file = next((tmp_path / "val").rglob(names[0]))
    file.rename(file.with_name("cat.jpg"))
    assert validate.main(call) == 2
    assert "cat.jpg; give ImageNet's validation images under their own names" in capsys.readouterr().err
    save(tmp_path / "vit.pth", num_classes=3)
    assert validate.main(call) == 2
    assert "test_vit does not have the classes of ImageNet-1k" in capsys.readouterr().err


def test_real_labels_are_outputs_of_the_model():
    names = ImageNetInfo().label_names()
    real = RealLabels([[0, 2], []], models.Outputs("own", 1000, names[::-1], own=True))
    assert real.sets == [[999, 997], []]
    assert real.samples([("a/ILSVRC2012_val_00000001_n01440764.JPEG", 5)])[0][1] == 0
    for file in ("ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_000000011.JPEG"):
        with pytest.raises(ValueError, match="and none for"):
            real.samples([(file, 0)])
    with pytest.raises(ValueError, match="no class for any"):
        real.samples([("ILSVRC2012_val_00000002.JPEG", 0)])


@pytest.mark.parametrize("content", ["{}", "[1]", "[[1000]]", "[[-1]]", "[[true]]", '[["cat"]]'])
def test_a_file_of_other_than_real_labels(content, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match="must be a list of lists of class indices"):
        read_real_labels(tmp_path / "real.json")


def test_outputs_are_chosen_where_the_map_says_so(tree, tmp_path):
    synsets = ImageNetInfo().label_names()[100:103]
    imagenet(tree, tmp_path / "val", synsets)
    model = save(tmp_path / "vit.pth")
    logits = scores(model, tmp_path / "val")
    (tmp_path / "map").write_text("".join(f"{synset} {synset}\n" for synset in [*synsets, "n01440764"]))
    call = ["--model", "test_vit", "--checkpoint", str(tmp_path / "vit.pth"), "--data", str(tmp_path / "val")]
    call += ["--workers", "0", "--csv", str(tmp_path / "r.csv")]
    true = {file.name: 100 + synsets.index(file.parent.name) for file in (tmp_path / "val").rglob("*.jpg")}
    among = [0, 100, 101, 102]
    whole = sum(logits[name].argmax().item() == output for name, output in true.items())
    chosen = sum(among[logits[name][among].argmax()] == output for name, output in true.items())
    assert chosen > whole
    for more in ([], ["--class-map", str(tmp_path / "map")], ["--class-map", str(tmp_path / "map"), "--only-mapped"]):
        assert validate.main([*call, *more]) == 0
    found = rows(tmp_path / "r.csv")  # the map alone says nothing that the folders' names do not
    assert [float(row["top1"]) for row in found] == pytest.approx([100 * whole / 9, 100 * chosen / 9])
    assert [(row["classes"], row["outputs"]) for row in found] == [("3", "1000"), ("3", "4")]
    assert float(found[1]["loss"]) < float(found[0]["loss"])


def said_to_be(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, count in changes.items():
        place = config if key == "num_classes" else config[key]
        place["num_classes"] = count
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("source", ["--checkpoint", "--pretrained"])
@pytest.mark.parametrize(
    "changes",
    [{"model_args": 5}, {"num_classes": 5}, {"num_classes": 5, "pretrained_cfg": 5}],
    ids=str,
)
def test_a_config_at_odds_with_its_weights_never_gives_a_random_classifier(source, changes, tmp_path):
    save_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path / "hub")
    said_to_be(tmp_path / "hub", **changes)
    folder = str(tmp_path / "hub")
    given = {"file": folder} if source == "--checkpoint" else {"file": None, "name": f"local-dir:{folder}"}
    with pytest.raises(ValueError, match="with a random classifier"):
        models.load_trained(given["file"], device=CPU, name=given.get("name"), pretrained=source == "--pretrained")


@pytest.mark.long  # three processes that import PyTorch
def test_processes_share_a_test(whole_run, tree, tmp_path):
    files = [str(whole_run[0] / "best.safetensors"), str(last_of(whole_run[0]))]
    call = ["--checkpoint", *files, "--data", str(tree), "--workers", "0", "--device", "cpu", "--csv"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tools" / "validate.py"), *call, str(tmp_path / "two.csv")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 2
    assert validate.main([*call, str(tmp_path / "one.csv")]) == 0
    for one, two in zip(rows(tmp_path / "one.csv"), rows(tmp_path / "two.csv"), strict=True):
        same = ("images", "top1", "top5", "weights_hash", "images_hash", "checkpoint")
        assert [one[key] for key in same] == [two[key] for key in same]
