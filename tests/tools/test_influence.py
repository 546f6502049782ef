"""tools/influence.py finds what an output depends on; two tools draw it."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from visionmix import create_mixer
from visionmix.tools import draw_attention, draw_receptive_field, influence


class OneMixer(nn.Module):
    """A mixer on the image itself, whose colours are channels."""

    output_fmt = "NHWC"

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward_features(self, x):
        return self.mixer(x.permute(0, 2, 3, 1))

    def forward(self, x):
        return self.forward_features(x)


def image(height=5, width=4, channels=6):
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def one_row(mixer, x, query=(0.5, 0.5)):
    (row,) = influence.attention_rows(OneMixer(mixer).eval(), x, query)
    return row


def test_softmax_weights_are_its_own():
    torch.manual_seed(0)
    mixer, x = create_mixer("softmax", 6, num_heads=2), image()
    row = one_row(mixer, x, (0.5, 0.9))
    assert (row.layer, row.query, row.exact) == ("mixer", (2, 3), True)
    q, k, _ = mixer.qkv(x.flatten(2).transpose(1, 2))[0].unflatten(-1, (3, 2, 3)).unbind(1)
    scores = torch.einsum("hd,jhd->hj", q[2 * 4 + 3], k) / math.sqrt(3)
    expected = scores.softmax(-1).mean(0).reshape(5, 4)
    np.testing.assert_allclose(row.weights, expected.detach(), atol=1e-6)


def test_linear_attentions_weights_are_those_of_its_features():
    torch.manual_seed(0)
    mixer, x = create_mixer("linear", 6, num_heads=2, feature_map="elu"), image()
    row = one_row(mixer, x)
    q, k, _ = mixer.qkv(x.flatten(2).transpose(1, 2))[0].unflatten(-1, (3, 2, 3)).unbind(1)
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    weights = torch.einsum("hd,jhd->hj", q[2 * 4 + 2], k)
    expected = (weights / weights.sum(-1, keepdim=True)).mean(0).reshape(5, 4)
    np.testing.assert_allclose(row.weights, expected.detach(), atol=1e-5)
    assert row.exact


@pytest.mark.parametrize("name", ["cross_scan", "bidirectional_mamba"])
def test_a_recurrences_row_has_the_sizes_of_its_derivatives(name):
    torch.manual_seed(0)
    mixer, x = create_mixer(name, 6).double(), image().double()
    row = one_row(mixer, x)
    jacobian = torch.autograd.functional.jacobian(lambda y: mixer(y)[0, 2, 2], x.permute(0, 2, 3, 1))[:, 0]
    expected = jacobian.square().sum((0, 3)).sqrt()
    expected = expected / expected.sum()
    assert not row.exact
    # 32 probes: a share is off by its own size over the root of twice as many degrees of freedom.
    np.testing.assert_allclose(row.weights, expected, rtol=0.5, atol=1e-12)
    assert abs(np.log(row.weights / expected.numpy())).mean() < 0.2


def test_a_causal_scan_sees_nothing_that_comes_later():
    torch.manual_seed(0)
    row = one_row(create_mixer("occupancy_scan", 6, order="raster"), image())
    flat = row.weights.ravel()
    assert (flat[:11] > 0).all()
    assert not flat[11:].any()


def test_layers_are_those_that_mix_tokens():
    assert list(influence.mixer_layers(timm.create_model("test_vig"))) == [f"blocks.{at}.mixer" for at in range(3)]
    assert list(influence.mixer_layers(timm.create_model("test_vit"))) == [f"blocks.{at}.attn" for at in range(6)]
    assert influence.chosen_layers(list("abcdefgh")) == ["b", "d", "f", "h"]
    assert influence.chosen_layers(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("name", ["test_vig", "test_mambar_tiny", "test_agent_swin", "test_dinat", "test_vit"])
def test_models_have_rows_of_their_maps(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    side = model.default_cfg["input_size"][-1]
    rows = influence.attention_rows(model, torch.randn(1, 3, side, side), (0.0, 0.99))
    for row in rows:
        assert row.weights.shape == (row.query[1] + 1,) * 2  # the last column of a square map
        assert row.weights.sum() == pytest.approx(1)
        assert row.weights[row.query] > 0


def test_what_has_no_row_is_refused():
    with pytest.raises(ValueError, match="a ResNet, has no token mixers"):
        influence.attention_rows(timm.create_model("test_resnet").eval(), torch.randn(1, 3, 64, 64), (0, 0))
    with pytest.raises(ValueError, match=r"layer='stem' is no token mixer of the model; it has blocks\.0\.mixer"):
        influence.attention_rows(timm.create_model("test_vig").eval(), torch.randn(1, 3, 96, 96), (0, 0), ["stem"])
    with pytest.raises(ValueError, match="layer 'attn' is not called with all cells"):
        influence.attention_rows(InWindows().eval(), image(4, 4), (0, 0))


class InWindows(nn.Module):
    """Attention that sees halves of a map, as windows in the batch."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(6, 6)

    def forward(self, x):
        return self.attn(x.flatten(2).transpose(1, 2).reshape(2, -1, 6))


def test_the_field_of_a_convolution_is_its_kernel():
    mixer = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    nn.init.constant_(mixer.weight, 0.5)

    class Convolution(OneMixer):
        output_fmt = "NCHW"

        def forward_features(self, x):
            return self.mixer(x)

    field = influence.receptive_field(Convolution(mixer), torch.rand(2, 6, 9, 7))
    expected = np.zeros((9, 7))
    expected[3:6, 2:5] = 1
    np.testing.assert_allclose(field, expected)
    assert influence.side_that_holds(field, 0.99) == pytest.approx(3 / 7)
    assert influence.side_that_holds(field, 0.1) == pytest.approx(1 / 7)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_attention_is_drawn_side_by_side(file, tmp_path, capsys):
    out = tmp_path / "new" / "a.png"
    assert draw_attention.main(["test_vig", "test_vmamba", file, "--query", "0.2,0.8", "--out", str(out)]) == 0
    assert "2 models drawn" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > picture.height / 2 > 200


def test_receptive_fields_are_drawn_side_by_side(file, tmp_path, capsys):
    out = tmp_path / "r.png"
    assert draw_receptive_field.main(["test_vig", "test_resnet", "--images", file, "--out", str(out)]) == 0
    assert "2 models drawn" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > picture.height > 200


def test_models_of_one_name_are_called_by_their_files_folders_and_take_any_size(file, tmp_path, monkeypatch):
    files = []
    for name in ("first", "second"):
        files.append(str(tmp_path / name / "best.safetensors"))
        Path(files[-1]).parent.mkdir()
        save_file(timm.create_model("test_vig").state_dict(), files[-1])
    drawn = {}
    monkeypatch.setattr(draw_attention, "draw_attention", lambda found, *_: drawn.update(found))
    models, weights = ["test_vig", "test_vig"], ["--checkpoint", files[0], "--checkpoint", files[1]]
    assert draw_attention.main([*models, file, *weights, "--img-size", "80"]) == 0
    assert list(drawn) == ["first", "second"]
    assert {picture.shape for picture, _ in drawn.values()} == {(80, 80, 3)}
    assert {row.weights.shape for _, rows in drawn.values() for row in rows} == {(5, 5)}


@pytest.mark.parametrize(
    ("tool", "arguments", "text"),
    [
        (draw_attention, ["test_vigg", "cat"], "did you mean 'test_vig'"),
        (draw_attention, ["test_resnet", "cat"], "has no token mixers"),
        (draw_attention, ["test_vig", "nowhere.png"], "nowhere.png"),
        (draw_receptive_field, ["test_vig", "--images", "nowhere.png"], "nowhere.png"),
        (draw_attention, ["test_vig", "test_vig", "cat"], "'test_vig' is named twice"),
        (draw_attention, ["test_vig", "cat", "--img-size", "8"], "img_size=8 is smaller than patch_size=16"),
    ],
)
def test_mistakes_are_answered(tool, arguments, text, capsys, tmp_path):
    assert tool.main([*arguments, "--out", str(tmp_path / "out.png")]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["test_vig", "cat", "--query", "1,0"], "'1,0' is outside the image"),
        (["test_vig", "cat", "--query", "3"], "'3' is not ROW,COL"),
        (["test_vig", "cat", "--img-size", "0"], "--img-size 0 is no size"),
        (["test_vig", "test_vit", "cat", "--checkpoint", "a.pt"], "--checkpoint is given 1 times for 2 models"),
    ],
)
def test_mistakes_on_the_command_line_are_answered(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        draw_attention.main(arguments)
    assert caught.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())
