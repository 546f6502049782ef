"""tools/draw_tokens.py draws the tokens that a reduced model is left with."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionmix import reduction
from visionmix.tools import draw_tokens

SOURCE = np.array([[3, 3, 5], [4, -1, 5]])


def test_regions_have_the_mean_colour_of_their_cells():
    image = np.arange(4 * 6 * 3, dtype=float).reshape(4, 6, 3) / 72
    painted = draw_tokens.regions(image, SOURCE, np.where(SOURCE < 0, 0.25, 1.0))
    assert painted.shape == image.shape
    np.testing.assert_allclose(painted[0, 0], image[:2, :4].mean((0, 1)))
    np.testing.assert_allclose(painted[3, 5], image[:, 4:].mean((0, 1)))
    np.testing.assert_allclose(painted[2, 2], image[2:, 2:4].mean((0, 1)) * 0.25)


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


VIM = ("ssm_prune", "rmeeto")
OPTIONS = {
    "algm": ":threshold=0.0",
    "avit": ":gate_center=0,gate_scale=1.0",
    "evit": ":keep_rate=0.5",
    "mctf": ":r=8",
    "tome": ":r=9",
}


@pytest.mark.parametrize("method", reduction.list_methods())
def test_every_method_shows_what_it_does(method):
    """Cells are dark, of unequal light, or share a token."""
    torch.manual_seed(0)
    model = timm.create_model("test_vim_tiny" if method in VIM else "test_vit").eval()
    size = model.default_cfg["input_size"][1:]
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens.tokens_of(model, images, method + OPTIONS.get(method, ""))
    cells = drawn.source[0].size
    shared = len(np.unique(drawn.source[0])) < cells
    assert drawn.light.min() < 1 or shared
    assert draw_tokens.DROPPED <= drawn.light.min() <= drawn.light.max() <= 1
    assert len(draw_tokens.borders(drawn.edges[0]))
    assert drawn.title.endswith("blocks a token" if method == "avit" else "tokens")


def test_halted_tokens_are_as_light_as_the_blocks_they_ran():
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    images = torch.randn(1, 3, 160, 160)
    never = draw_tokens.tokens_of(model, images, "avit:gate_center=1000")
    at_once = draw_tokens.tokens_of(model, images, "avit:gate_center=-1000")
    depth = len(model.blocks)
    assert (never.light == 1).all()
    np.testing.assert_allclose(at_once.light, draw_tokens.DROPPED + (1 - draw_tokens.DROPPED) / depth, rtol=1e-6)
    assert (never.title, at_once.title) == (f"{depth:.1f} blocks a token", "1.0 blocks a token")


def test_a_model_that_prunes_by_itself_needs_no_reduction(tmp_path, capsys):
    out = tmp_path / "tokens.png"
    assert draw_tokens.main(["cat", "--model", "test_dynamicvit", "--out", str(out)]) == 0
    assert out.exists()
    assert draw_tokens.main(["cat", "--model", "test_dynamicvit", "--reduce", "tome:r=2", "--out", str(out)]) == 2
    assert "reduced already" in capsys.readouterr().err


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
