"""The picture of accuracy against time: every model has its place, its colour and a label that covers no other."""

import csv
import itertools
import re

import pytest
import timm

from visionmix.models import published
from visionmix.tools import draw_speed, pictures, timing


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def write(path, milliseconds, **columns):
    """Write measurements as `draw_speed.measure` does."""
    same = {"img_size": 224, "device": "a CPU", "threads": 2, "torch": "2.14.1+cpu"} | columns
    rows = [{"model": name, "p50_ms": f"{value:.4g}"} | same for name, value in milliseconds.items()]
    timing.append_rows(path, rows)
    return str(path)


def labels(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def test_models_are_drawn_where_they_belong(tmp_path, drawn):
    milliseconds = {"vmamba_tiny": 80.0, "vig_t": 26.0, "convnext_tiny": 65.0}
    path = write(tmp_path / "speed.csv", milliseconds)
    assert draw_speed.main([path, "--out", str(tmp_path / "speed.png")]) == 0
    axes = drawn[0].axes[0]
    (points,) = [found for found in axes.collections if len(found.get_offsets()) == 3]
    expected = [(80.0, published("vmamba_tiny").top1), (26.0, published("vig_t").top1), (65.0, 82.07)]
    assert points.get_offsets().tolist() == [list(pair) for pair in expected]
    ours, ours_too, theirs = points.get_facecolors().tolist()
    assert ours == ours_too != theirs
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["visionmix", "timm"]
    assert "2 threads" in axes.get_xlabel()


@pytest.mark.parametrize("spread", [1.0, 0.3])
def test_labels_cover_neither_each_other_nor_points(tmp_path, drawn, spread):
    names = [*draw_speed.OURS, *draw_speed.PEERS]
    milliseconds = {name: 70 + spread * (37 * number % 60 - 30) for number, name in enumerate(names)}
    path = write(tmp_path / "speed.csv", milliseconds)
    assert draw_speed.main([path, "--out", str(tmp_path / "speed.png")]) == 0
    found = labels(drawn[0])
    assert sorted(text.get_text() for text in found) == sorted(names)
    boxes = [text.get_window_extent() for text in found]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    frame = drawn[0].axes[0].bbox
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


def test_every_model_of_the_figure_exists_and_has_a_published_accuracy():
    assert not set(draw_speed.OURS) & set(draw_speed.PEERS)
    assert all(timm.is_model(name) for name in draw_speed.PEERS)
    assert all(published(name).top1 for name in draw_speed.OURS)


def test_measuring_times_every_model_at_its_size_and_writes_the_file_anew(tmp_path, monkeypatch):
    sizes = {}

    def run(name, *, img_size, batch, train, device, amp, memory):
        sizes[name] = img_size
        return {"model": name, "p50_ms": "50", "img_size": img_size, "device": "a CPU", "threads": 2, "torch": "2.14"}

    monkeypatch.setattr(draw_speed.benchmark, "run", run)
    for _ in range(2):
        assert draw_speed.main(["--measure", str(tmp_path / "s.csv"), "--out", str(tmp_path / "s.png")]) == 0
    with (tmp_path / "s.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == [*draw_speed.OURS, *draw_speed.PEERS]
    assert (sizes["vmamba_tiny"], sizes["efficientvim_m4"]) == (224, 256)


def test_a_busy_machine_leaves_the_file_as_it_was(tmp_path, monkeypatch, capsys):
    def run(name, **_):
        raise timing.NoisyMachine("busy")

    path = write(tmp_path / "s.csv", {"vig_t": 26.0})
    before = (tmp_path / "s.csv").read_text()
    monkeypatch.setattr(draw_speed.benchmark, "run", run)
    assert draw_speed.main(["--measure", path, "--out", str(tmp_path / "s.png")]) == 1
    assert "busy" in capsys.readouterr().err
    assert (tmp_path / "s.csv").read_text() == before


def test_mistakes_are_answered(tmp_path, capsys):
    assert draw_speed.main([str(tmp_path / "nothing.csv")]) == 1
    assert "nothing.csv" in capsys.readouterr().err
    path = write(tmp_path / "s.csv", {"vig_t": 26.0})
    write(tmp_path / "s.csv", {"vig_s": 26.0}, threads=1)
    assert draw_speed.main([path]) == 1
    assert re.search(r"has 2 machines or versions.*--measure", capsys.readouterr().err)
    path = write(tmp_path / "unknown.csv", {"atrous_vmamba_tiny": 26.0})
    assert draw_speed.main([path]) == 1
    assert "atrous_vmamba_tiny, whose top-1 is not published" in capsys.readouterr().err
