"""Fenced blocks, headings and links of Markdown files."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run:(?P<reason>[^\n]*)-->\s*\Z")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_ID = re.compile(r"""<a (?:id|name)=["'](?P<id>[^"']+)["']""")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: What stands behind the opening fence.
        code: The text inside.
        line: Line of the opening fence, counted from 1.
        not_run: The reason of the comment ``<!-- not run: reason -->`` right above, or None where there is none.
    """

    language: str
    code: str
    line: int
    not_run: str | None


def pages() -> list[Path]:
    """Return the pages that people read: those of docs/ and those at the repository's root."""
    return [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of `text` in order."""
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        comment = _NOT_RUN.search(before)
        reason = comment and comment["reason"].strip()
        found.append(Block(match["language"], match["code"], before.count("\n") + 1, reason))
    return found


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without comments; separators and redirections end a command."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("();<>|&"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def links(text: str) -> list[str]:
    """Return the targets of the links and pictures of `text` outside its code."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    return [match["target"] for match in _LINK.finditer(prose)]


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of `text`, as GitHub and mkdocs make them, and those set by hand."""
    prose = _FENCE.sub("", text)
    headings = re.findall(r"^#+ +(.*?)\s*$", prose, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[ ]+", "-", each) for each in words} | {match["id"] for match in _ID.finditer(prose)}
