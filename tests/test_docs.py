"""The pages that people read: their code runs, their commands exist, their links lead somewhere, the site is built."""

import argparse
import importlib
import os
import re
import subprocess
import sys

import doc_pages
import pytest
import torch

from visionmix.tools.main import COMMANDS

# CONTRIBUTING.md's example is a file, which test_contributing.py imports as one.
WITH_CODE = [page for page in doc_pages.pages() if page.name != "CONTRIBUTING.md" and "```python" in page.read_text()]


def name_of(page) -> str:
    return page.relative_to(doc_pages.ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, as a reader types them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for block in doc_pages.blocks(page.read_text()):
        if block.language != "python" or block.not_run is not None:
            continue
        # Empty lines in front let a traceback name the line of the page.
        code = compile("\n" * block.line + block.code, name_of(page), "exec")
        with torch.random.fork_rng():
            exec(code, names)


@pytest.mark.parametrize("page", doc_pages.pages(), ids=name_of)
def test_what_is_not_run_has_a_reason(page):
    for block in doc_pages.blocks(page.read_text()):
        assert block.not_run is None or len(block.not_run.split()) >= 2, f"{name_of(page)}:{block.line}"


@pytest.mark.parametrize("page", doc_pages.pages(), ids=name_of)
def test_commands_exist(page):
    for block in doc_pages.blocks(page.read_text()):
        if block.language == "shell":
            commands = re.findall(r"(?:^|&& |\| )visionmix ([\w-]+)", block.code, re.MULTILINE)
            assert set(commands) <= COMMANDS.keys(), f"{name_of(page)}:{block.line}"
            for file in re.findall(r"(?:python|sh|torchrun [^\n]*?) ((?:tools|examples|configs)/[\w./-]+)", block.code):
                assert (doc_pages.ROOT / file).exists(), f"{name_of(page)}:{block.line} names {file}"


def call_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return (tool, arguments) of a command of the library, or of a file in tools/ that Python or torchrun runs."""
    if words[:1] == ["visionmix"]:
        return COMMANDS[words[1]][0], words[2:]
    for at, word in enumerate(words):
        if words[0] in ("python", "torchrun") and (file := re.fullmatch(r"tools/(\w+)\.py", word)):
            return file[1], words[at + 1 :]
    return None


def test_commands_take_the_arguments_that_pages_give_them(monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, arguments=None, namespace=None):
        parse(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    called = set()
    for page in doc_pages.pages():
        for block in doc_pages.blocks(page.read_text()):
            for words in doc_pages.commands(block.code) if block.language == "shell" else ():
                if (call := call_of(words)) is None:
                    continue
                tool, arguments = call
                try:
                    importlib.import_module(f"visionmix.tools.{tool}").main(arguments)
                except Parsed:
                    called.add(tool)
                except SystemExit as error:  # --help
                    if error.code:
                        pytest.fail(f"{name_of(page)}:{block.line}: {' '.join(words)}")
    assert {"train", "validate", "predict", "export", "convert"} <= called


@pytest.mark.parametrize("page", doc_pages.pages(), ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in doc_pages.links(text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in doc_pages.anchors(other.read_text()), f"{name_of(page)} links to {target}"


def test_the_readme_is_short_and_has_a_row_for_each_card():
    text = (doc_pages.ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    cards = {path.name for path in (doc_pages.ROOT / "docs" / "models").glob("*.md")}
    assert {target.rpartition("/")[2] for target in doc_pages.links(text) if "docs/models/" in target} == cards


@pytest.mark.long
def test_the_site_is_built_strictly(tmp_path):
    """A page that the nav lacks, a dead link or anchor, a docstring whose parameter does not exist: all are errors."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    command += ["--config-file", str(doc_pages.ROOT / "mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for page in ("index", "models/vmamba/index", "mixers/cross_scan/index", "api/kernels/index", "contributing/index"):
        assert (tmp_path / "site" / page).with_suffix(".html").is_file() or page == "index"
    kernels = (tmp_path / "site" / "api" / "kernels" / "index.html").read_text()
    assert "selective_scan_2d" in kernels
