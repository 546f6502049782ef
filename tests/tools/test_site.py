"""The nav of the documentation's site."""

from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed")

from visionmix.mixers import list_mixers
from visionmix.tools import site

NAV = [
    {"Start": ["index.md", {"Gone": "gone.md"}]},
    {"Models": ["models.md", "models/*.md"]},
    {"Extras": "extras/*.md"},
    {"API": "api/*.md"},
]


def test_patterns_are_filled_in_and_what_is_missing_is_left_out():
    names = ["api/a.md", "index.md", "models.md", "models/van.md", "models/vig.md"]
    assert site.expand(NAV, names) == [
        {"Start": ["index.md"]},
        {"Models": ["models.md", "models/van.md", "models/vig.md"]},
        {"API": ["api/a.md"]},
    ]


def test_a_page_that_the_nav_names_is_not_listed_by_a_pattern_too():
    nav = [{"Mixers": ["mixers/index.md", "mixers/*.md"]}]
    assert site.expand(nav, ["mixers/agent.md", "mixers/index.md"]) == [
        {"Mixers": ["mixers/index.md", "mixers/agent.md"]}
    ]


def test_every_mixer_has_a_page_and_a_row():
    pages = site.pages()
    for name in list_mixers():
        assert f'create_mixer("{name}"' in pages[f"mixers/{name}.md"]
        assert f"[`{name}`]({name}.md)" in pages["mixers/index.md"]


def test_a_page_shows_the_arguments_that_its_mixer_shares_with_others():
    assert "::: visionmix.mixers.softmax.Attention\n" in site.pages()["mixers/mala.md"]
    assert "visionmix.mixers.cross_scan" not in site.pages()["mixers/atrous_scan.md"]  # CrossScan has a page


def test_ops_named_like_their_package_are_in_the_reference():
    assert "::: visionmix.kernels.selective_scan.selective_scan" in site.pages()["api/kernels.md"]


@pytest.mark.parametrize(
    ("at", "link", "leads_to"),
    [
        ("architecture.md", "../CONTRIBUTING.md#style", "contributing.md#style"),
        ("integrations/timm.md", "../../CHANGELOG.md", "../changelog.md"),
        ("integrations/timm.md", "../../examples/timm_hub.py", "../examples/timm_hub.md"),
        ("export.md", "../examples/export_onnx.py", "examples/export_onnx.md"),
        ("export.md", "performance.md", "performance.md"),
    ],
)
def test_links_out_of_the_docs_lead_to_pages(at, link, leads_to):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=at))
    assert site.on_page_markdown(f"see [this]({link})", page=page) == f"see [this]({leads_to})"


def test_short_cells_and_long_links_of_tables_are_marked():
    name = "a_checkpoint_epoch_300_of_it.pth"
    html = f'<td>(1, 2)</td><td><a href="x">{name}</a></td><td>three words, and three more</td><a href="y">{name}</a>'
    assert site.on_page_content(html) == (
        f'<td class="short">(1, 2)</td><td><a class="long" href="x" title="{name}">{name}</a></td>'
        f'<td>three words, and three more</td><a href="y">{name}</a>'
    )
    flags = "<td>fixed, <code>--dynamic batch</code>, <code>--dynamic</code></td>"
    assert site.on_page_content(flags) == flags.replace("<code>", '<code class="short">')
    formula = "<td><code>out = W_o softmax(q k^T) v + b_o</code></td>"
    assert site.on_page_content(formula) == formula


def test_mixers_that_scan_show_their_orders():
    pages = site.pages()
    assert site._scan_orders("local_scan") == ["raster", "raster_reversed", "window_7", "window_7_reversed"]
    assert site._scan_orders("softmax") == []
    assert "images/mixers/cross_scan.png" in pages["mixers/cross_scan.md"]
    assert "images/mixers/" not in pages["mixers/softmax.md"]
