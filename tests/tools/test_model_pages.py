"""The pages about models say what the tables, the golden files and the measurements say."""

import functools
import xml.etree.ElementTree as ET

import pytest
from timm.layers import LayerNorm

from visionmix.models.family import list_family_models
from visionmix.tools import model_facts, model_pages

FAMILIES = model_facts.families()
CARDS = model_pages.FOLDER / "models"


def test_every_model_and_tag_is_counted_in_order():
    tags = [tag for names in FAMILIES.values() for name in names for tag in model_facts.tagged(name)]
    assert list(model_facts.read_costs()) == tags
    assert {tag.partition(".")[0] for tag in tags} == {
        name for name in list_family_models() if not name.startswith("test_")
    }


def test_the_index_is_up_to_date():
    """`python tools/info.py --pages` brings all pages up to date."""
    assert (model_pages.FOLDER / "models.md").read_text() == model_pages.index(model_facts.read_costs())


def test_the_cards_are_up_to_date():
    costs = model_facts.read_costs()
    assert {path.stem for path in CARDS.iterdir()} == {model_pages.stem(module) for module in FAMILIES}
    for module in FAMILIES:
        assert (CARDS / f"{model_pages.stem(module)}.md").read_text() == model_pages.card(module, costs), module


@pytest.mark.parametrize(
    "module",
    [pytest.param(each, marks=[] if each.endswith((".vmamba", ".agent")) else pytest.mark.long) for each in FAMILIES],
)
def test_the_figures_are_up_to_date(module):
    drawn = model_pages.draw(module)
    assert (CARDS / f"{model_pages.stem(module)}.svg").read_text() == drawn
    ET.fromstring(drawn)


def test_a_figure_shows_stages_and_branches():
    drawn = model_pages.draw("visionmix.models.vmamba")
    for text in ("stage 3", "8 x CrossScan", "14 x 14 x 384", "a block of CrossScan"):
        assert f">{text}<" in drawn
    assert drawn.count(">+<") == 2
    # The class token makes the blocks call their mixers by another method.
    assert ">AgentAttention<" in model_pages.draw("visionmix.models.agent")


def test_a_card_says_what_was_compared_where():
    card = (CARDS / "vmamba.md").read_text()
    assert "| `vmamba_tiny` | 203x229 | [MzeroMiko/VMamba](https://github.com/MzeroMiko/VMamba/tree/2ed52ea" in card
    assert "| `vmamba_tiny.in1k` | 224 | 30.25 (30) | 4.88 (4.9) | 82.6 | mit |" in card
    assert "https://arxiv.org/abs/2401.10166" in card
    assert "`selective_scan_2d`" in card
    assert "Not compared: `atrous_vmamba_tiny`, `atrous_vmamba_small`." in (CARDS / "atrous_vmamba.md").read_text()
    assert "3, 3, 4, 3 blocks" in (CARDS / "van.md").read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (functools.partial(LayerNorm, eps=1e-6), "LayerNorm(eps=1e-06)"),
        ({"name": "na", "kernel_size": 7}, '{"name": "na", "kernel_size": 7}'),
        ((2, 2, 8, 2), "(2, 2, 8, 2)"),
        (["mala"] * 12, '"mala", 12 times'),
        (None, "None"),
    ],
)
def test_options_read_as_they_are_typed(value, text):
    assert model_facts.option_text(value) == f"`{text}`"


def test_other_columns_of_costs_are_refused(tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text("model,gmacs\n")
    with pytest.raises(ValueError, match=r"info\.py --write"):
        model_facts.read_costs(path)


def test_row_of_a_family_stands_between_the_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(model_facts, "families", lambda: {"visionmix.models.vig": ["vig_t", "vig_h_t"]})
    file = tmp_path / "README.md"
    file.write_text(f"before\n{model_pages.BEGIN}\na stale row\n{model_pages.END}\nafter\n")
    model_pages.write_families(file)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "a stale row" not in text
    about = "bidirectional gated linear attention, plain and hierarchical"
    assert f"| [ViG](docs/models/vig.md) | {about} | 6 to 29 | 82.8 | mit |" in text
    file.write_text("no markers")
    with pytest.raises(ValueError, match="no table of models"):
        model_pages.write_families(file)


def test_the_readme_has_a_row_per_family():
    rows = model_pages.family_table(model_facts.read_costs(), "docs/models")
    assert rows in (model_facts.ROOT / "README.md").read_text()


def test_every_family_says_in_a_line_what_it_is():
    titles = [model_facts.family_title(module) for module in FAMILIES]
    assert all(family and about for family, about in titles)
