"""Tables for a terminal, as plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tabulate import SEPARATING_LINE, tabulate

__all__ = ["printable", "text_table"]


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """Draws a table: the first column to the left, the others to the right.

    Args:
        headings: of the columns; may have several lines.
        rows: a cell for each column.
        total: a last row, set apart.

    Examples:
        >>> print(text_table(["rank", "updates"], [["0", "7"], ["1", "12"]], total=["all", "19"]))
        ┌──────┬─────────┐
        │ rank │ updates │
        ├──────┼─────────┤
        │ 0    │       7 │
        │ 1    │      12 │
        ├──────┼─────────┤
        │ all  │      19 │
        └──────┴─────────┘
    """
    # The headings are a row like the others: tabulate would make their columns wider than they need to be.
    lines = [headings, SEPARATING_LINE, *rows, *([SEPARATING_LINE, total] if total else [])]
    alignment = ["left", *["right"] * (len(headings) - 1)]
    table: str = tabulate(lines, tablefmt="simple_outline", colalign=alignment, disable_numparse=True)
    return table


def printable(text: str) -> str:
    """The text as stdout can show it: where its encoding lacks a character, a question mark stands in its place."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
