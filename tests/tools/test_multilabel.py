"""Images of several labels: listed in CSV files or in lists of a Hugging Face data set, trained, tested, predicted."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CPU, best_of, make, run
from torch.nn import functional as F

from visionmix.tools import data, manifests, predict, train, validate
from visionmix.tools.evaluation import evaluate
from visionmix.tools.losses import criterion
from visionmix.tools.recipe_keys import DataRecipe

LABELS = ["blue", "green", "red"]
SEVERAL = {"multilabel": True}
STILL = data.eval_transform(32, "bicubic", 1.0, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})


@pytest.fixture
def listed(tmp_path):
    """Images whose left, middle and right third are bright in red, green and blue where they have that label."""
    rng = np.random.default_rng(0)
    root = tmp_path / "listed"
    (root / "photos").mkdir(parents=True)
    for split, count in (("train", 48), ("val", 13)):
        rows = []
        for number in range(count):
            chosen = [label for label in LABELS if rng.random() < 0.5]
            pixels = rng.integers(0, 60, (32, 32, 3))
            for label in chosen:
                place = LABELS.index(label)
                pixels[:, 11 * place : 11 * place + 10, 2 - place] += 180
            name = f"photos/{split}{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / name)
            rows.append((name, ";".join(chosen)))
        write(root / f"{split}.csv", rows)
    return root


def write(file, rows, header=("image", "labels")):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])


def opened(root, split="train", **options):
    wanted = DataRecipe(path=str(root), **options)
    return data.open_split(wanted, split, data.check_data(wanted), STILL)


def test_images_of_a_csv_file_have_their_labels_as_zeros_and_ones(listed):
    images = opened(listed, multilabel=True)
    rows = manifests.read(listed / "train.csv")
    assert len(images) == len(rows) == 48
    for number, (path, labels) in enumerate(rows):
        image, target = images.load(number)
        assert target.tolist() == [float(name in labels) for name in LABELS]
        assert image.tobytes() == Image.open(path).tobytes()
    loader = data.make_loader(images, batch=5, workers=0, shuffle=False)
    targets = torch.cat([batch.targets for batch in loader])
    assert targets.dtype == torch.float32
    assert targets.sum(1).unique().tolist() == [0, 1, 2, 3]
    (listed / "photos" / "train0.png").write_bytes(b"no picture")
    first = next(iter(loader))
    assert (first.targets.shape, len(first.unreadable)) == ((4, 3), 1)


def test_a_csv_file_of_one_label_each_is_a_classifiers(listed):
    rows = [(path, labels[0]) for path, labels in manifests.read(listed / "train.csv") if len(labels) == 1]
    write(listed / "one.csv", rows)
    images = opened(listed, train="one.csv", val="one.csv")
    assert [images.load(number)[1] for number in range(len(rows))] == [LABELS.index(label) for _, label in rows]
    with pytest.raises(ValueError, match=r"train.csv: \d+ image\(s\) have another number of labels than one, e.g. .*; "
                                         "set data.multilabel=true"):  # fmt: skip
        opened(listed)


def test_labels_are_matched_by_name_and_test_images_may_lack_some(listed):
    names = [f"photos/val{number}.png" for number in range(2)]
    write(listed / "val.csv", [(names[0], "red; green;red"), (names[1], "")])
    images = opened(listed, "val", multilabel=True)
    assert [images.load(number)[1].tolist() for number in range(2)] == [[0, 1, 1], [0, 0, 0]]
    write(listed / "val.csv", [(names[0], "red;pink")])
    with pytest.raises(ValueError, match="hold different classes; only in train/: blue, green; only in val/: pink"):
        data.check_data(DataRecipe(path=str(listed), multilabel=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.png,red\n", "has no column labels; its first line must name both"),
        ("image,labels\n", "lists no images"),
        ("image,labels\na.png,\n", "has no labels; write them"),
        ("image,labels\na.png,red\n,red\n", "has no image or labels in line 3"),
        ("image,labels\na.png\n", "has no image or labels in line 2"),
        ('image,labels\n"a.png,red\n', "is no CSV file in UTF-8"),
        (b"image,labels\n\xff\xfe,red\n", "is no CSV file in UTF-8"),
    ],
)
def test_other_files_are_refused(text, message, listed):
    content = text if isinstance(text, bytes) else text.encode()
    (listed / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.check_data(DataRecipe(path=str(listed), multilabel=True))


def test_missing_files_and_other_counts_are_refused(listed, tree):
    with pytest.raises(FileNotFoundError, match=r"has no other.csv; name the CSV file of train in data.train"):
        data.check_data(DataRecipe(path=str(listed), train="other.csv"))
    with pytest.raises(ValueError, match=r"data.classes=4, but .*train.csv has 3 labels"):
        data.check_data(DataRecipe(path=str(listed), classes=4, multilabel=True))
    with pytest.raises(ValueError, match=r"data.multilabel=True, but images of .* have one class each"):
        data.check_data(DataRecipe(path=str(tree), multilabel=True))


def test_lists_of_labels_of_a_hugging_face_set_are_those_of_the_csv_file(listed, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    sets = {}
    features = {"image": datasets.Image(), "tags": datasets.Sequence(datasets.ClassLabel(names=LABELS))}
    for split in ("train", "val"):
        rows = manifests.read(listed / f"{split}.csv")
        columns = {"image": [path for path, _ in rows], "tags": [labels for _, labels in rows]}
        sets[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")
    here, there = opened(listed, multilabel=True), opened(tmp_path / "saved", multilabel=True)
    assert len(here) == len(there)
    for number in range(len(here)):
        (image, target), (other, same) = here.load(number), there.load(number)
        assert image.tobytes() == other.tobytes()
        assert torch.equal(target, same)
    with pytest.raises(ValueError, match=r"the column tags of .* a list of labels an image; set data.multilabel=True"):
        opened(tmp_path / "saved")


def test_losses_are_those_of_each_label_by_itself():
    logits, targets = torch.randn(4, 3), torch.randint(2, (4, 3)).float()
    soft = targets * 0.8 + 0.1
    bce = criterion(make(None, data=SEVERAL, train={"loss": "bce", "label_smoothing": 0.2}))
    torch.testing.assert_close(bce(logits, targets), F.binary_cross_entropy_with_logits(logits, soft))
    asymmetric = criterion(make(None, data=SEVERAL, train={"loss": "asymmetric", "label_smoothing": 0.0}))
    true = logits.sigmoid()
    false = (1 - true + 0.05).clamp(max=1)
    own = torch.where(targets > 0, (1 - true) * true.log(), (1 - false) ** 4 * false.log())
    torch.testing.assert_close(asymmetric(logits, targets), -own.sum() / 4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": SEVERAL}, "data.multilabel=True needs .* train.loss='cross_entropy' .* set it to bce or asymmetric"),
        ({"train": {"loss": "asymmetric"}}, "train.loss='asymmetric' is for images of several labels"),
        ({"augment": {"mixup": 0.2}}, "augment.mixup=0.2 takes one class an image"),
        ({"augment": {"cutmix": 1.0}}, "augment.cutmix=1.0 takes one class an image"),
        ({"train": {"mesa": 1.0, "ema_decay": 0.9}}, "train.mesa=1.0 takes one class an image"),
        ({"distill": {"teacher": "test_vit"}}, "distill.kind='logits' takes .*; set it to features"),
    ],
)
def test_settings_of_one_class_an_image_are_refused(sections, message):
    if sections.keys() != {"data"} and sections.get("train") != {"loss": "asymmetric"}:
        sections = {**sections, "data": SEVERAL, "train": {"loss": "bce", **sections.get("train", {})}}
    with pytest.raises(ValueError, match=message):
        make(None, **sections)


def test_mean_average_precision_equals_counts_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator)
    targets = (torch.rand(40, 5, generator=generator) < 0.3).float()
    loader = [data.Batch(logits[:23], targets[:23], [], 0), data.Batch(logits[23:], targets[23:], [], 0)]
    result = evaluate(torch.nn.Identity(), loader, classes=5, device=CPU, multilabel=True)
    precisions = []
    for label in range(5):
        hits = targets[logits[:, label].argsort(descending=True), label]
        at = hits.cumsum(0) / torch.arange(1, 41)
        precisions.append((at * hits).sum() / hits.sum())
    assert result.figures == {"map": pytest.approx(100 * torch.stack(precisions).mean().item(), abs=1e-4)}
    assert result.loss == pytest.approx(F.binary_cross_entropy_with_logits(logits, targets).item(), rel=1e-5)
    assert (result.count, result.targets) == (40, None)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_a_model_learns_several_labels(loss, listed):
    options = {"loss": loss, "label_smoothing": 0.0}
    trainer = run(listed, 4, data=SEVERAL, train=options, optimizer={"lr": 2e-2})
    images = opened(listed, "val", multilabel=True)
    loader = data.make_loader(images, batch=4, workers=0, shuffle=False)
    result = evaluate(trainer.model, loader, classes=3, device=CPU, multilabel=True)
    assert result.figures["map"] > 90


def test_a_run_from_csv_files_is_tested_and_used_by_the_commands(listed, recipe_file, tmp_path, capsys):
    settings = ["data.multilabel=true", "train.loss=asymmetric", "augment.mixup=0", "augment.cutmix=0",
                "schedule.epochs=2"]  # fmt: skip
    command = [str(recipe_file), "--data", str(listed), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert train.main([*command, *(part for each in settings for part in ("--set", each))]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    figures = [float(row["test_map"]) for row in rows]
    assert f"mAP {figures[-1]:6.2f} %" in printed
    assert f"test mAP {figures[-1]:.2f} % of 13 images" in printed
    assert "test_top1" not in rows[0]
    assert (tmp_path / "out" / "predictions.png").is_file()
    assert not (tmp_path / "out" / "confusion.png").exists()
    best = str(best_of(tmp_path / "out"))
    for given in ([], ["--data", str(listed)]):
        assert validate.main(["--checkpoint", best, *given, "--workers", "0", "--json", str(tmp_path / "r.json")]) == 0
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["map"], result["top1"]) == (pytest.approx(max(figures)), "")
    assert validate.main(["--checkpoint", best, "--data", str(tmp_path / "out")]) == 2
    guesses = tmp_path / "p.csv"
    assert predict.main([str(listed / "photos"), "--checkpoint", best, "--output", str(guesses), "--workers", "0"]) == 0
    sums = [sum(float(row[f"probability_{place}"]) for place in (1, 2, 3)) for row in csv.DictReader(guesses.open())]
    assert len(sums) == 61
    assert max(abs(total - 1) for total in sums) > 0.1
