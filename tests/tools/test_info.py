"""Facts of models."""

import pytest
import timm
import torch

from visionmix.tools import info


def test_costs_agree_with_a_hand_count():
    """A linear layer of 8 x 6 on 5 tokens, and one convolution."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2, stride=2, bias=False), torch.nn.Flatten(2))
    cost = info.measure(model, (3, 4, 6))
    assert cost.params == 3 * 8 * 4
    assert cost.macs == {"aten.convolution": 3 * 8 * 4 * 6}
    assert cost.activations == 8 * 6


def test_the_recurrence_is_counted():
    cost = info.measure(timm.create_model("test_vig"), (3, 96, 96))
    dk, dv, heads, tokens, blocks = 8, 16, 3, 36, 3
    # 2 dk dv for k^T v, as many for q S, dk dv for the decay; two directions; half of it as multiply-adds.
    assert cost.macs["visionmix.bidirectional_gated_linear_attention"] == 5 * dk * dv * heads * tokens * blocks


def test_shows_a_model(capsys):
    info.main(["vig_s"])
    shown = capsys.readouterr().out
    for fact in ("22.62 M", "81.7", "mit", "hustvl/ViG", "2405.18425"):
        assert fact in shown


def test_unknown_model(capsys):
    with pytest.raises(SystemExit):
        info.main(["vig_x"])
    assert "did you mean" in capsys.readouterr().err


def test_writes_the_table_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "list_family_models", lambda: ["test_vig", "vig_b"])
    file = tmp_path / "README.md"
    file.write_text(f"before\n{info._BEGIN}\na stale row\n{info._END}\nafter\n")
    info.write_table(file)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "a stale row" not in text
    assert "| `vig_b` | 89.02 |" in text
    file.write_text("no markers")
    with pytest.raises(ValueError, match="no table of models"):
        info.write_table(file)
