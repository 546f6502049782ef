"""The comparison of mixers: parameters that agree, results that are written."""

import csv

import pytest

import visionmix
from visionmix.tools import bakeoff, recipe


@pytest.fixture(scope="module")
def made():
    return recipe.read("demo/bakeoff.yaml", {}, [])


@pytest.fixture(scope="module")
def wanted(made):
    return bakeoff.count_parameters(made.model, 11, "softmax", 4.0)


@pytest.mark.parametrize("name", visionmix.list_mixers())
def test_parameters_agree(made, wanted, name):
    kwargs = bakeoff.fit_mixer(made.model, 11, name, wanted)
    count = bakeoff.count_parameters(made.model, 11, kwargs["mixer"], kwargs["mlp_ratio"])
    assert abs(count - wanted) <= 0.03 * wanted


def test_unreachable_parameter_counts_are_refused():
    with pytest.raises(ValueError, match=r"no feed-forward makes 5 parameters: 60 at a ratio of 0\.5"):
        bakeoff.fit_ratio(lambda ratio: int(10 + 100 * ratio), 5)


def test_results(tmp_path):
    rows = [
        {"mixer": name, "seed": seed, "top1": top1, "params_m": 1.0, "mlp_ratio": 4, "forward_ms": 3.0, "peak_mb": 7}
        for name, seed, top1 in (("conv", 0, 50.0), ("conv", 1, 54.0), ("mala", 0, 60.0))
    ]
    bakeoff.write_results(tmp_path, rows)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["mala", "conv"]
    assert "52.00 ± 2.83" in lines[3]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["mixer"] for row in csv.DictReader(file)] == ["conv", "conv", "mala"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy_time.png", "accuracy_memory.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo/bakeoff.yaml", "--data", "x", "--mixers", "nothing"], "--mixers nothing is not a mixer"),
        (["demo/nothing.yaml", "--data", "x"], "nothing"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert bakeoff.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_trains_and_goes_on(tmp_path, monkeypatch, tree):
    monkeypatch.setattr(bakeoff, "cost", lambda *_: {"forward_ms": "1", "peak_mb": "1"})
    arguments = ["demo/bakeoff.yaml", "--data", str(tree), "--output", str(tmp_path / "out"), "--mixers",
                 "conv", "--set", "schedule.epochs=1", "--set", "schedule.warmup_epochs=0", "--set",
                 "data.batch_size=4"]  # fmt: skip
    assert bakeoff.main(arguments) == 0
    first = (tmp_path / "out" / "results.csv").read_text()
    assert bakeoff.main(arguments) == 0
    assert (tmp_path / "out" / "results.csv").read_text() == first
    assert {"attention.png", "receptive_field.png"} <= {path.name for path in (tmp_path / "out").glob("*.png")}
