"""Hooks of mkdocs, which `mkdocs.yml` names: pages made from the code, the nav, links out of docs/ and tables.

Made pages: contributing.md and changelog.md from the files at the repository's root, a page per mixer, an index of the
mixers, a page per example, the pictures of scan orders, and the reference of the public modules.
"""

import importlib
import inspect
import re
import shutil
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from visionmix import scans
from visionmix.mixers import create_mixer, list_mixers, registry
from visionmix.tools.draw_scans import draw_orders

_ROOT = Path(__file__).resolve().parent.parent
_SOURCE = _ROOT / "output" / "site_source"  # setuptools clears build/
_MAPPED = ("configs", "kernels", "scans", "tools")  # folders that pyproject.toml maps into the package
_COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_MODULES = (
    *("visionmix", "visionmix.kernels", "visionmix.scans", "visionmix.mixers", "visionmix.reduction"),
    *("visionmix.adaptive", "visionmix.models", "visionmix.backbones", "visionmix.layers"),
)
_ORDER_OPTIONS = ("order", "directions")
_HEIGHT, _WIDTH = 8, 11
_DIM = 48  # channels that every mixer's default heads divide
_SHORT, _LONG = 20, 30  # characters of a table's cell, and of code in it, that stay in one line
_MIXERS = """# Mixers

`visionmix.create_mixer(name, dim, **options)` makes a mixer: a module from (batch, height, width, dim) to the same, for
every height and width. `timm.create_model("pyramid_tiny", mixer=name)` puts it into a model; with options, write
`mixer=dict(name=name, ...)`. In signatures, `**dd` stands for `device` and `dtype`.
"""


@event_priority(100)  # before mkdocstrings, which looks whether its folder is there
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the package out as it is installed, for the reader of docstrings, and fill the nav in."""
    shutil.rmtree(_SOURCE, ignore_errors=True)
    for folder, inside in {"visionmix": "", **{name: name for name in _MAPPED}}.items():
        # Private names are no part of the reference; the reader of docstrings stumbles over their alternatives.
        python_alone = shutil.ignore_patterns("__pycache__", "private_api.py", "*.cpp", "*.h", "*.yaml")
        shutil.copytree(_ROOT / folder, _SOURCE / "visionmix" / inside, ignore=python_alone, dirs_exist_ok=True)
    for module in _MODULES:
        _write_stubs(module)
    docs = Path(config.docs_dir)
    there = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    config.nav = expand(config.nav, sorted({*there, *pages()}))
    return config


def _write_stubs(name: str) -> None:
    """Give functions that another function made a definition in their module, which the reader of docstrings sees."""
    for made in _members(name).values():
        module = sys.modules[getattr(made, "__module__", name)]
        if inspect.isfunction(made) and f"def {made.__name__}(" not in inspect.getsource(module):
            path = _SOURCE / Path(module.__file__).relative_to(_ROOT)
            if path.parts[len(_SOURCE.parts)] != "visionmix":
                path = _SOURCE / "visionmix" / path.relative_to(_SOURCE)
            stub = f"\n\ndef {made.__name__}{inspect.signature(made)}:\n    {inspect.getdoc(made)!r}\n"
            path.write_text(path.read_text() + stub)


def _members(name: str) -> dict[str, Any]:
    """Return the public objects of a module by name, but for modules, and mixers, which have pages of their own."""
    module = importlib.import_module(name)
    mixers = {_class(each) for each in list_mixers()}
    members = {each: getattr(module, each) for each in module.__all__}
    return {
        each: made
        for each, made in members.items()
        if not inspect.ismodule(made) and not (inspect.isclass(made) and made in mixers)
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages and pictures."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    sets = {f"sets/{name}": _unique(scans.direction_names(name)) for name in scans.direction_sets()}
    mixers = {f"mixers/{name}": orders for name in list_mixers() if (orders := _scan_orders(name))}
    for name, orders in (sets | mixers).items():
        picture = _SOURCE / "images" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_orders(orders, _HEIGHT, _WIDTH, picture, columns=2)  # a phone's width
        files.append(File.generated(config, f"images/{name}.png", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links out of docs/ lead to the pages of these files."""
    depth = page.file.src_uri.count("/")
    up, out = "../" * depth, "../" * (depth + 1)
    for name, file in _COPIED.items():
        markdown = markdown.replace(f"]({out}{file}", f"]({up}{name}")
    return re.sub(rf"\]\({re.escape(out)}examples/(\w+)\.py\)", rf"]({up}examples/\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Mark what stays in one line in a table, short cells and code, and links of one long word, which are cut off."""

    def short(cell: re.Match) -> str:
        inside = re.sub(rf"<code>([^<]{{1,{_LONG}}})</code>", r'<code class="short">\1</code>', cell[1])
        is_short = len(re.sub(r"<[^>]*>", "", inside)) <= _SHORT
        return f'<td class="short">{inside}</td>' if is_short else f"<td>{inside}</td>"

    html = re.sub(r"<td>(.*?)</td>", short, html, flags=re.DOTALL)
    long = rf'<a (href="[^"]*")>([^\s<]{{{_SHORT},}})</a>(?=[^<]*</td>)'
    return re.sub(long, r'<a class="long" \1 title="\2">\2</a>', html)


def expand(nav: list, names: Iterable[str]) -> list:
    """Return `nav` with each pattern replaced by those of `names` that match it and stand nowhere else in the nav.

    An entry that matches nothing is left out, and so is a title without entries.
    """
    names, plain = list(names), set(_leaves(nav))

    def filled(entry: Any) -> list:
        if isinstance(entry, str):
            matching = [name for name in names if fnmatch(name, entry) and (name == entry or name not in plain)]
            return matching
        ((title, inside),) = entry.items()
        if isinstance(inside, str) and "*" not in inside:
            return [{title: inside}] if inside in names else []
        found = [each for item in ([inside] if isinstance(inside, str) else inside) for each in filled(item)]
        return [{title: found}] if found else []

    return [each for entry in nav for each in filled(entry)]


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for item in (nav.values() if isinstance(nav, dict) else nav) for leaf in _leaves(item)]


def pages() -> dict[str, str]:
    """Return the text of every made page by its path below docs/."""
    made = {page: _without_root((_ROOT / file).read_text()) for page, file in _COPIED.items()}
    made["mixers/index.md"] = _mixer_index()
    made["scan_sets.md"] = _direction_sets()
    made |= {f"mixers/{name}.md": _mixer(name) for name in list_mixers()}
    made |= {f"examples/{path.stem}.md": _example(path) for path in (_ROOT / "examples").glob("*.py")}
    return made | {f"api/{_stem(module)}.md": _module(module) for module in _MODULES}


def _without_root(text: str) -> str:
    """Return a page of the repository's root as it reads inside docs/."""
    return text.replace("](docs/", "](")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _example(path: Path) -> str:
    # Without a table of contents, which would be empty, a line of 120 characters fits.
    return f"---\nhide: [toc]\n---\n\n# {path.name}\n\n```python\n{path.read_text().rstrip()}\n```\n"


def _stem(module: str) -> str:
    return module.rpartition(".")[2]


def _class(name: str) -> type:
    return registry.mixer_named(name)


def _about(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def _mixer_index() -> str:
    rows = [f"| [`{name}`]({name}.md) | {_about(_class(name))} |" for name in list_mixers()]
    return "\n".join([_MIXERS, "| name | computes |", "| --- | --- |", *rows, ""])


def _mixer(name: str) -> str:
    cls = _class(name)
    parts = [f"# {name}", f'`visionmix.create_mixer("{name}", dim, ...)`']
    parts += [
        f"::: {each.__module__}.{each.__name__}\n    options:\n      members: []\n      heading_level: 2"
        for each in (cls, *_named_bases(cls))
    ]
    if _scan_orders(name):
        parts.append(f"## Its scan orders\n\n![Scan orders of {name}](../images/mixers/{name}.png)")
    return "\n\n".join(parts) + "\n"


def _named_bases(cls: type) -> list[type]:
    """Return the bases that a mixer's docstring refers to and that have no page of their own, as mixers have one."""
    mixers = [_class(name) for name in list_mixers()]
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("visionmix.mixers.") and base not in mixers]
    return [base for base in bases if f"`{base.__name__}`" in (inspect.getdoc(cls) or "")]


def _scan_orders(name: str) -> list[str]:
    """Return the scan orders in which a mixer with its default options reads a map; none if it has no such option."""
    if not set(_ORDER_OPTIONS) & set(registry.mixer_options(name)):
        return []
    orders = []
    for module in create_mixer(name, _DIM).modules():
        for attribute in ("orders", "directions", "order"):
            found = getattr(module, attribute, None)
            if isinstance(found, str | list | tuple):
                orders += found.split(",") if isinstance(found, str) else found
    return _unique(orders)


def _direction_sets() -> str:
    parts = [
        "# Direction sets",
        "A mixer that scans takes the name of one of these as its `order`. A circle marks the start of a direction, a "
        "square its end. A direction that a set has twice is drawn once.",
    ]
    for name in scans.direction_sets():
        directions = ", ".join(f"`{direction}`" for direction in scans.direction_names(name))
        parts.append(f"## {name}\n\n{directions}\n\n![{name}](images/sets/{name}.png)")
    return "\n\n".join(parts) + "\n"


def _module(name: str) -> str:
    about = (inspect.getdoc(importlib.import_module(name)) or "").partition("\n\n")[0]
    parts = [f"# {name}", about]
    for each, made in _members(name).items():
        # A function may have its package's own name, so that the place where it is defined has to be named.
        home = made.__module__ if inspect.isclass(made) or inspect.isfunction(made) else name
        parts.append(f"::: {home}.{each}")
    return "\n\n".join(parts) + "\n"
