"""What the pages tell a reader to type: the code blocks under a heading."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks", "commands", "script"]

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        language: of the block.
        title: the name of its file; empty if it has none.
        text: the code.
    """

    language: str
    title: str
    text: str


def blocks(page: str, heading: str) -> list[Block]:
    """The blocks under a heading, up to the next one, of whatever level."""
    text = (ROOT / page).read_text()
    hidden = _FENCE.sub(lambda fence: re.sub(r"^#", " ", fence[0], flags=re.MULTILINE), text)
    start = re.search(rf"^#+ {re.escape(heading)}$", hidden, re.MULTILINE)
    assert start is not None, f"{page} has no heading {heading!r}"
    end = re.search(r"^#+ ", hidden[start.end() :], re.MULTILINE)
    section = text[start.end() : start.end() + end.start() if end else len(text)]
    return [
        Block(language, (re.search(r'title="([^"]*)"', options) or ["", ""])[1], code)
        for language, options, code in _FENCE.findall(section)
    ]


def commands(page: str, heading: str) -> list[str]:
    """The lines of its shell blocks; one that ends with a backslash goes on with the next."""
    shell = [block.text.replace("\\\n", " ") for block in blocks(page, heading) if block.language == "bash"]
    lines = [" ".join(line.split()) for text in shell for line in text.splitlines()]
    return [line for line in lines if line.strip()]


def script(page: str, heading: str) -> Block:
    """The file that its only Python block with a title is."""
    (block,) = (block for block in blocks(page, heading) if block.language == "python" and block.title)
    return block
