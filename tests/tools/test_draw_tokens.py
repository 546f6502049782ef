"""tools/draw_tokens.py draws the tokens that a reduced model is left with."""

import numpy as np
import pytest
from PIL import Image

from visionmix.tools import draw_tokens

SOURCE = np.array([[3, 3, 5], [4, -1, 5]])


def test_regions_have_the_mean_colour_of_their_cells():
    image = np.arange(4 * 6 * 3, dtype=float).reshape(4, 6, 3) / 72
    painted = draw_tokens.regions(image, SOURCE)
    assert painted.shape == image.shape
    np.testing.assert_allclose(painted[0, 0], image[:2, :4].mean((0, 1)))
    np.testing.assert_allclose(painted[3, 5], image[:, 4:].mean((0, 1)))
    np.testing.assert_allclose(painted[2, 2], image[2:, 2:4].mean((0, 1)) * draw_tokens.DROPPED)


def test_borders_lie_between_tokens():
    found = {tuple(map(tuple, edge)) for edge in draw_tokens.borders(SOURCE).astype(int).tolist()}
    assert found == {
        ((2, 0), (2, 1)),
        ((1, 1), (1, 2)),
        ((2, 1), (2, 2)),
        ((0, 1), (1, 1)),
        ((1, 1), (2, 1)),
    }


def test_draws_a_panel_a_reduction(tmp_path, capsys):
    file, out = tmp_path / "in.png", tmp_path / "new" / "tokens.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(file)
    options = ["--reduce", "tome:r=[9, 2]", "--reduce", "evit:keep_rate=0.5,fuse=False", "--out", str(out)]
    assert draw_tokens.main([str(file), "--model", "test_vit", *options]) == 0
    assert "1 images with 2 reductions" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > 2 * picture.height > 200


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["cat", "--reduce", "tomme:r=2"], "did you mean 'tome'"),
        (["cat", "--reduce", "tome:r"], "cannot be read"),
        (["cat", "--model", "test_resnet"], "class ResNet"),
        (["cat", "--model", "test_vit_"], "did you mean"),
    ],
)
def test_mistakes_are_answered(arguments, text, capsys, tmp_path):
    assert draw_tokens.main(["--model", "test_vit", *arguments, "--out", str(tmp_path / "out.png")]) == 2
    assert text in capsys.readouterr().err
