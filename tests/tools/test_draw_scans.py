"""tools/draw_scans.py draws every order and answers bad names without a traceback."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from visionmix import scans
from visionmix.tools import draw_scans


def colours(path):
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def test_draws_one_panel_an_order(tmp_path, capsys, monkeypatch):
    drawn = []
    draw_order = draw_scans.draw_order
    monkeypatch.setattr(draw_scans, "draw_order", lambda *call: drawn.append(call[1:]) or draw_order(*call))
    out = tmp_path / "new" / "scans.png"
    draw_scans.main(["hilbert", "window_7", "cross", "--height", "5", "--width", "9", "--out", str(out)])
    assert drawn == [(name, 5, 9) for name in ("hilbert", "window_7", *scans.direction_names("cross"))]
    assert colours(out) > 50
    assert "6 scan orders of a 5x9 grid" in capsys.readouterr().out


def test_path_visits_the_cells_in_order():
    axes = Figure().add_subplot()
    draw_scans.draw_order(axes, "snake", 3, 4)
    near, far, padded = (lines.get_segments() for lines in axes.collections[1:4])
    assert [segment[0].tolist() for segment in near[:5]] == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]]
    assert (len(near), len(far), len(padded)) == (11, 0, 0)
    (start, end) = (scatter.get_offsets().tolist() for scatter in axes.collections[-2:])
    assert (start, end) == ([[0, 0]], [[3, 2]])


def test_padding_is_drawn_apart_and_counted():
    axes = Figure().add_subplot()
    draw_scans.draw_order(axes, "window_2", 3, 4)  # 0 1 4 5 | 2 3 6 7 | 8 9 . . | 10 11 . .
    near, far, padded = (len(lines.get_segments()) for lines in axes.collections[1:4])
    assert (near, far, padded) == (9, 1, 1)
    assert axes.get_title() == "window_2 (4 padded)"


@pytest.mark.parametrize("name", ["hilbert", "skip_2_1_1", "window_3"])
def test_single_cell(name, tmp_path):
    draw_scans.main([name, "--height", "1", "--width", "1", "--out", str(tmp_path / "one.svg")])
    assert (tmp_path / "one.svg").stat().st_size > 0


def test_gallery_has_the_size_of_the_picture_in_the_docs(tmp_path):
    out = tmp_path / "gallery.png"
    draw_scans.main(["--gallery", "--out", str(out)])
    assert out.stat().st_size < 200_000
    kept = Path(__file__).parents[2] / "docs" / "images" / "scans.png"
    with Image.open(out) as ours, Image.open(kept) as theirs:
        # Fonts may differ by a pixel from one machine to another.
        assert abs(ours.width - theirs.width) < 40
        assert abs(ours.height - theirs.height) < 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hilbrt"], "did you mean 'hilbert'"),
        (["raster", "window"], "written as window_<size>"),
        (["hilbert", "--height", "0"], "height=0 .* at least 1"),
        ([], "give the names of orders"),
        (["raster", "--gallery"], "give the names of orders"),
        (["raster", "--out", "picture.xyz"], r"--out=picture.xyz does not end in \.png"),
        (["raster", "--out", "picture"], r"--out=picture does not end in \.png"),
    ],
)
def test_mistakes_are_answered_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        draw_scans.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_list(capsys):
    draw_scans.main(["--list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*scans.names(), *scans.direction_sets(), *scans.MODIFIERS])


@pytest.mark.long
def test_runs_from_a_clone(tmp_path):
    run = subprocess.run(
        [sys.executable, draw_scans.__file__, "hilbrt"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "did you mean 'hilbert'" in run.stderr
