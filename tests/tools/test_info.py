"""Facts of models."""

import pytest
import timm
import torch

from visionmix.tools import info, model_facts


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


def test_counts_are_those_of_the_table():
    """The counts of all models take minutes: `python tools/info.py --write` brings them up to date."""
    counted = model_facts.read_costs()
    assert info.count("vig_t.in1k") == counted["vig_t.in1k"]
    assert counted["vig_t.in1k"].ops == "bidirectional_gated_linear_attention"


def test_tags_have_facts_of_their_own(capsys):
    info.main(["agent_deit_small.in1k_448"])
    shown = capsys.readouterr().out
    for fact in ("448x448", "17.7", "83.1", "a228f86241c445f1969b"):
        assert fact in shown
