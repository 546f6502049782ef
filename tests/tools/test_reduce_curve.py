"""visionmix reduce-curve: what its rows say, that it goes on where it was, and what it leaves out or refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CPU, begin, save

from visionmix import reduction
from visionmix.tools import info, main, models, reduce_curve, timing

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 3, "patch_size": 4}


def vit(spec=None):
    return {"name": "vit_tiny_patch16_224", "kwargs": SMALL, "reduction": spec}


@pytest.fixture
def call(tree, tmp_path, monkeypatch):
    """Return a function that runs the command on a small ViT and returns its exit status."""
    trainer = begin(model=vit())
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    place = save(tmp_path / "epoch_0001", trainer)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, checkpoint=place):
        options = ["--data", str(tree), "--batch-size", "4", "--device", "cpu"]
        return main.main(["reduce-curve", "--checkpoint", str(checkpoint), *options, *arguments])

    run.checkpoint = place
    return run


@pytest.fixture
def few_settings(monkeypatch):
    """Leave each method the first two of its settings."""
    settings = reduce_curve.settings
    monkeypatch.setattr(reduce_curve, "settings", lambda *arguments: settings(*arguments)[:2])


def rows():
    with Path("reduction.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_settings_follow_tokens_and_depth():
    assert reduce_curve.settings("tome", 196, 12) == [f"tome:r={r}" for r in (4, 7, 10, 12, 15)]
    assert reduce_curve.settings("tome", 4, 6) == ["tome:r=1"]
    assert reduce_curve.settings("evit", 196, 12)[2] == "evit:keep_rate=0.7"
    assert reduce_curve.settings("ats", 100, 12)[-1] == "ats:samples=25"


def test_rows_have_accuracy_and_operations_of_each_setting(call, tree, capsys):
    assert call("--methods", "tome", "evit", "--reduce", "ats:samples=9", "--no-time") == 0
    found = rows()
    specs = [row["reduction"] for row in found]
    assert specs == [
        "", *reduce_curve.settings("tome", 64, 4), *reduce_curve.settings("evit", 64, 4), "ats:samples=9",
    ]  # fmt: skip
    model = models.load_trained(str(call.checkpoint), device=CPU).model
    for method in ("tome", "evit"):
        counts = [float(row["gmacs"]) for row in found if row["reduction"].startswith(method)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] < float(found[0]["gmacs"])
    assert float(found[-1]["gmacs"]) < float(found[0]["gmacs"])
    images = []
    for path in sorted((tree / "val").glob("*/*.jpg")):
        images.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255)
    inputs = models.load_trained(str(call.checkpoint), device=CPU).input
    mean, std = (torch.tensor(value)[:, None, None] for value in (inputs.mean, inputs.std))
    images = (torch.stack(images) - mean) / std
    targets = torch.arange(3).repeat_interleave(3)
    for row in found[:-1]:
        fast = reduction.apply(model, row["reduction"]) if row["reduction"] else model
        with torch.no_grad():
            right = (fast(images).argmax(1) == targets).float().mean().item()
        assert float(row["top1"]) == pytest.approx(100 * right)
        assert (row["images"], row["images_per_second"]) == ("9", "")
    cost = info.measure(models.load_trained(str(call.checkpoint), device=CPU).model, (3, 32, 32))
    assert float(found[0]["gmacs"]) == pytest.approx(sum(cost.macs.values()) / 1e9)
    assert "12 settings in reduction.csv" in capsys.readouterr().out
    picture = np.asarray(Image.open("reduction.png").convert("L"))
    assert picture.std() > 5


def test_a_call_that_was_stopped_goes_on(call, monkeypatch, capsys):
    evaluate, tested = reduce_curve.evaluate, []

    def stop_at_third(*args, **options):
        tested.append(args)
        if len(tested) == 3:
            raise OSError("the disk is gone")
        return evaluate(*args, **options)

    monkeypatch.setattr(reduce_curve, "evaluate", stop_at_third)
    options = ("--methods", "evit", "--no-time")
    assert call(*options) == 2
    assert "the disk is gone" in capsys.readouterr().err
    before = rows()
    assert [row["reduction"] for row in before] == ["", "evit:keep_rate=0.9"]
    assert call(*options) == 0
    assert rows()[:2] == before
    assert len(rows()) == 6
    assert len(tested) == 3 + 4
    assert call(*options) == 0
    assert len(tested) == 3 + 4
    assert len(rows()) == 6


def test_times_are_measured_where_they_are_asked_for(call, few_settings, monkeypatch, capsys):
    turns = []

    def in_turns(calls, rounds):
        assert [len(call()) for call in calls.values()] == [4, 4]
        turns.append(rounds)
        return {"whole": [0.1] * rounds, "reduced": [0.04] * rounds}

    def busy():
        raise timing.NoisyMachine("other processes are busy")

    assert call("--methods", "evit", "--no-time") == 0
    monkeypatch.setattr(timing, "in_turns", in_turns)
    monkeypatch.setattr(timing, "wait_until_quiet", busy)
    assert call("--methods", "evit") == 1
    assert "other processes are busy" in capsys.readouterr().err
    assert len(rows()) == 3
    monkeypatch.setattr(timing, "wait_until_quiet", lambda: None)
    assert call("--methods", "evit") == 0
    assert turns == [1, 21] * 3  # three seconds of both
    assert [row["images_per_second"] for row in rows()] == [""] * 3 + ["100.0"] * 3
    assert [row["speedup"] for row in rows()] == [""] * 3 + ["1.0"] + ["2.5"] * 2
    assert call("--methods", "evit") == 0
    assert len(rows()) == 6


def test_methods_that_do_not_fit_are_left_out_unless_asked_for(call, few_settings, capsys):
    assert call("--no-time") == 0
    text = capsys.readouterr().out
    for method in ("dynamicvit", "avit", "ssm_prune", "rmeeto"):
        assert f"{method} is left out: " in text
    methods = {row["reduction"].partition(":")[0] for row in rows()}
    assert methods == {"", "algm", "ats", "evit", "mctf", "mctf_fast", "tome", "zero_tprune"}
    assert call("--methods", "ssm_prune", "--no-time") == 2
    assert "take a model with the mixer 'bidirectional_mamba'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "tomme"], "did you mean 'tome'"),
        (["--methods", "avit"], "it is trained with the model, by model.reduction of visionmix train"),
        (["--reduce", "tome:13"], "write it as tome:r=13"),
        (["--batch-size", "0"], "batch_size=0 is too small"),
        (["--pretrained"], "give either --checkpoint FILE or --pretrained"),
    ],
)
def test_mistakes_are_refused(call, arguments, words, capsys):
    assert call(*arguments, "--no-time") == 2
    assert words in capsys.readouterr().err


def test_models_that_are_reduced_already_or_have_no_tokens_are_refused(call, tmp_path, capsys):
    reduced = save(tmp_path / "epoch_0002", begin(model=vit("tome:r=3")))
    assert call("--no-time", checkpoint=reduced) == 2
    assert "the model is reduced already, by tome(r=(3, 3, 3, 3)" in capsys.readouterr().err
    other = save(tmp_path / "epoch_0003", begin(model={"name": "test_resnet"}))
    assert call("--no-time", checkpoint=other) == 2
    assert "a model of class ResNet has no list of blocks; give a plain model" in capsys.readouterr().err


@pytest.mark.long
def test_the_demos_vit_keeps_its_accuracy_under_merging(tmp_path, monkeypatch):
    """Of photographs: 30 % fewer operations by ToMe, without training, cost 3 points at most."""
    monkeypatch.chdir(tmp_path)
    assert main.main(["demo-data", "photos", "--out", "photos"]) == 0
    output = ["--output", "out", "--set", "data.workers=0", "--device", "cpu"]
    assert main.main(["train", "demo/vit_photos.yaml", "--data", "photos", "--epochs", "4", *output]) == 0
    call = ["reduce-curve", "--checkpoint", "out/best.safetensors", "--data", "photos", "--methods", "tome"]
    assert main.main([*call, "--no-time", "--device", "cpu"]) == 0
    whole, *reduced = rows()
    assert float(whole["top1"]) > 65  # 11 classes
    fewer = [row for row in reduced if float(row["gmacs"]) <= 0.7 * float(whole["gmacs"])]
    assert fewer
    assert float(fewer[0]["top1"]) >= float(whole["top1"]) - 3
