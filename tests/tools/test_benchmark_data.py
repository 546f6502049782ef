"""The comparison of loaders: what it measures, on a few images."""

import pytest
import torch
from PIL import Image

from visionmix.tools import benchmark, benchmark_data, demo_data, recipe

pytest.importorskip("psutil")
pytest.importorskip("skimage")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(demo_data, "PHOTOGRAPHS", {"cat": "chelsea.png", "coffee": "coffee.png"})
    monkeypatch.setattr(benchmark_data, "_IMAGES", 16)
    monkeypatch.setattr(benchmark_data, "_PASSES", 1)
    monkeypatch.setattr(benchmark_data, "_ROUNDS", 1)
    monkeypatch.setattr(benchmark_data, "SETTINGS", {"imagenet/defaults.yaml": {}})


def test_both_loaders_give_the_same_kind_of_batches(few, tmp_path):
    folder = benchmark_data.make_images(tmp_path / "train")
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 32
    for file in files:
        with Image.open(file) as image:
            assert sorted(image.size) == [375, 500]
    made = recipe.read("imagenet/defaults.yaml", {}, ["data.batch_size=32"])
    (mine,), (theirs,) = benchmark_data.ours(folder, made), benchmark_data.timms(folder, made)
    assert mine.images.shape == theirs[0].shape == (32, 3, 224, 224)
    assert mine.images.dtype == theirs[0].dtype == torch.uint8
    assert sorted(mine.targets.tolist()) == sorted(theirs[1].tolist())


@pytest.mark.long
def test_the_command_prints_both_rates_and_their_ratio(few, capsys):
    assert benchmark.main(["--data"]) == 0
    printed = capsys.readouterr().out
    assert "timm" in printed
    assert "imagenet/defaults.yaml" in printed


def test_names_or_data_are_needed(capsys):
    for arguments in ([], ["--data", "vig_s"]):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert "give names of models, or --data" in capsys.readouterr().err


def test_a_rate_is_images_over_seconds_of_the_workers_after_the_first_pass(few, tmp_path, monkeypatch):
    seconds = iter([10.0, 12.0])
    monkeypatch.setattr(benchmark_data, "_workers_seconds", lambda: next(seconds))
    batch = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8)
    assert benchmark_data.rate(lambda folder, made: [batch, batch], tmp_path, None) == 16 / 2
    with pytest.raises(TypeError, match=r"gives torch.float32"):
        benchmark_data.rate(lambda folder, made: [(batch[0].float(), batch[1])], tmp_path, None)
