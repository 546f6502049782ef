"""Layers that are fitted to data are fitted once, before a run's first step, and go into its checkpoints."""

import pytest
import torch
import yaml
from small_runs import CLASSES, CPU, make

from visionmix.mixers.kernel_hash import KernelHash
from visionmix.tools import checkpoint, data, train
from visionmix.tools.calibration import calibrate

MODEL = {"name": "test_ecoformer", "kwargs": {"depths": [1, 1, 1, 1]}}


@pytest.fixture
def fits(monkeypatch):
    """Make fitting quick, and return the vectors that were fitted to."""
    given, fit = [], KernelHash.fit

    def count(self, q):
        given.append(q)
        fit(self, q, steps=1)

    monkeypatch.setattr(KernelHash, "fit", count)
    return given


def hashes(state):
    return {name: value.clone() for name, value in state.items() if ".hash." in name}


def begin(tree, **sections):
    trainer, loader, _ = train.make_run(make(tree, model=MODEL, data={"image_size": 32}, **sections), CLASSES, CPU)
    return trainer, loader.dataset


def test_the_model_and_its_average_are_fitted_to_training_images(tree, fits):
    trainer, dataset = begin(tree, train={"ema_decay": 0.9, "calibrate": 9})
    before = hashes(trainer.model.state_dict())
    others = {name: value.clone() for name, value in trainer.model.state_dict().items() if name not in before}
    random = torch.get_rng_state()
    layers = len(trainer.model.fitted_layers())
    assert calibrate(trainer, dataset) == layers == len(fits) > 0
    assert {len(q) for q in fits} == {9}
    assert torch.equal(torch.get_rng_state(), random)
    after = hashes(trainer.model.state_dict())
    assert all(not torch.equal(value, before[name]) for name, value in after.items() if "anchors" in name)
    averages = hashes(trainer.ema.module.state_dict())
    assert averages.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in averages.items())
    for name, value in others.items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    again, dataset = begin(tree, train={"calibrate": 9})
    torch.manual_seed(99)
    calibrate(again, dataset)
    assert all(torch.equal(value, after[name]) for name, value in hashes(again.model.state_dict()).items())


def test_no_more_images_than_there_are(tree, fits):
    trainer, dataset = begin(tree, train={"calibrate": 1000})
    calibrate(trainer, dataset)
    assert {len(q) for q in fits} == {18}


def test_nothing_is_fitted_where_nothing_is_to_be(tree, fits):
    for sections in ({"train": {"calibrate": 0}}, {}):
        trainer, dataset = begin(tree, **sections)
        trainer.recipe.model.pretrained = not sections  # the weights that it brings were fitted
        assert calibrate(trainer, dataset) == 0
    plain = {"name": "test_vig"}
    trainer, loader, _ = train.make_run(make(tree, model=plain, data={"image_size": 64}), CLASSES, CPU)
    assert calibrate(trainer, loader.dataset) == 0
    assert fits == []
    with pytest.raises(ValueError, match=r"train\.calibrate=-1 is out of range"):
        make(None, train={"calibrate": -1})


def test_unreadable_images_are_told(tree, fits, cut):
    for path in (tree / "train").glob("*/*"):
        cut(path)
    trainer, dataset = begin(tree)
    with pytest.raises(data.UnreadableData, match=r"the layers cannot be fitted: .*\.jpg"):
        calibrate(trainer, dataset)


def test_a_run_fits_once_and_its_checkpoints_have_the_layers(tree, tmp_path, fits, capsys):
    settings = {
        "model": MODEL,
        "data": {"image_size": 32, "batch_size": 6, "workers": 0, "crop_pct": 1.0},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "train": {"calibrate": 6},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    call = [str(tmp_path / "run.yaml"), "--data", str(tree), "--device", "cpu", "--output"]
    assert train.main([*call, str(tmp_path / "whole")]) == 0
    layers = len(fits)
    assert f"fitted {layers} layers to 6 training images" in capsys.readouterr().out
    assert train.main([*call, str(tmp_path / "parts"), "--set", "schedule.stop_epoch=1"]) == 0
    assert len(fits) == 2 * layers
    assert train.main([*call, str(tmp_path / "parts"), "--resume", "--set", "schedule.stop_epoch=2"]) == 0
    assert len(fits) == 2 * layers
    assert capsys.readouterr().out.count("fitted") == 1
    whole, first, second = (
        checkpoint.read(tmp_path / place)["model"]
        for place in ("whole/checkpoints/epoch_0002", "parts/checkpoints/epoch_0001", "parts/checkpoints/epoch_0002")
    )
    assert hashes(whole)
    assert all(torch.equal(value, first[name]) for name, value in hashes(whole).items())
    assert all(torch.equal(value, second[name]) for name, value in whole.items())
