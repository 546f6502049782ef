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


def test_models_page_is_up_to_date():
    """All but what is counted, which takes minutes: `python tools/info.py --write` brings the page up to date."""
    rows = [line for line in info._MODELS.read_text().splitlines() if line.startswith("| `")]
    cells = {row.split("`")[1]: [cell.strip() for cell in row.strip("|").split("|")] for row in rows}
    names = [tag for models in info._families().values() for name in models for tag in info._tagged(name)]
    assert list(cells) == names
    for name in names:
        _, size, _, _, *rest = cells[name]
        assert [size, *rest] == info.published_columns(name)


def test_models_page_counts_what_the_models_cost(monkeypatch):
    monkeypatch.setattr(info, "_families", lambda: {"visionmix.models.vig": ["vig_t"]})
    page = info._MODELS.read_text()
    (row,) = [line for line in info.markdown().splitlines() if line.startswith("| `")]
    assert row in page


def test_row_of_a_family_stands_between_the_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "_families", lambda: {"visionmix.models.vig": ["vig_t", "vig_h_t"]})
    file = tmp_path / "README.md"
    file.write_text(f"before\n{info._BEGIN}\na stale row\n{info._END}\nafter\n")
    info.write_families(file)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "a stale row" not in text
    about = "bidirectional gated linear attention, plain and hierarchical"
    assert f"| ViG | {about} | 6 to 29 | 82.8 | mit | [2405.18425](https://arxiv.org/abs/2405.18425) |" in text
    file.write_text("no markers")
    with pytest.raises(ValueError, match="no table of models"):
        info.write_families(file)


def test_every_family_says_in_a_line_what_it_is():
    titles = [info.family_title(module) for module in info._families()]
    assert all(family and about for family, about in titles)


def test_tags_have_facts_of_their_own(capsys):
    info.main(["agent_deit_small.in1k_448"])
    shown = capsys.readouterr().out
    for fact in ("448x448", "17.7", "83.1", "a228f86241c445f1969b"):
        assert fact in shown
