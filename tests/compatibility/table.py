"""Writes docs/compatibility.md from the markers on the tests that prove its rows.

    python -m tests.compatibility.table

A test says what it proves with ``@pytest.mark.compatibility(section, row, status="works", note="")``. Several tests may
prove one row, one test several rows, and one case of a parametrized test may carry a row of its own
(``pytest.param(..., marks=pytest.mark.compatibility(...))``).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["PAGE", "SECTIONS", "STATUSES", "Row", "collect_rows", "merge_markers", "render"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
SECTIONS = ("Optimization", "Precision", "Loop", "Data", "State", "Buffers", "Tools", "Refused")
STATUSES = ("works", "differs", "refused")

_INTRODUCTION = """\
# What works

What a Trainer and a LightningModule do under `strategy="ddp"`, and what becomes of it under `strategy="async_amsgrad"`.
Tests prove each row, most of them with real ranks that run at uneven speeds; a box at each section's end names them.
The page is made from markers on the tests (`make table`); another test fails when the two differ.

| status | meaning |
|---|---|
| works | as under DDP: n per rank is n·N over all ranks |
| differs | works, with the difference that the note tells |
| refused | an error says why, and what to do instead |

## Versions

| Python | torch | Lightning | torchmetrics | jsonargparse | what ran on 2026-11-27 |
|---|---|---|---|---|---|
| 3.10 | 2.8.0, CUDA build | 2.6.0 | 1.4.0 | 4.52.0 | `make test-lowest`, no GPU: 2,332 passed, 7 failed |
| 3.11 | 2.14.1, CUDA build | 2.6.6 | 1.9.0 | 4.53.0 | `make test-cuda-build`, no GPU: 2,335 passed, 5 failed |
| 3.11 | 2.13.0, CPU build | 2.6.6 | 1.9.0 | 4.53.0 | `make test`, before each change: 2,597 passed |

The first two ran before the day's last changes, which mended what had failed, but for one failure of the second: torch
aborted once in a forked rank that compiles ("Invalid thread pool", in autograd's thread). They have not run whole
since. Four failures of the first came from torchmetrics 1.4.0, which brings pretty-errors; the lowest version is now
1.4.1.

These are the ends of what `pyproject.toml` allows. torch 2.7 is not allowed: its ranks may hang on their way out, and
no rank gets a TCP channel. Nothing has run on a GPU: [GPUs](gpu.md) says what was tested how.
"""


@dataclass
class Row:
    """A row of the table.

    Args:
        section: one of `SECTIONS`.
        name: what a user would look for.
        status: one of `STATUSES`.
        notes: what there is to know, in Markdown.
        tests: the tests that prove it, as ``file::name``.
    """

    section: str
    name: str
    status: str
    notes: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)


def read_marker(section: str, row: str, status: str = "works", note: str = "") -> Row:
    """A marker's arguments as a row without tests.

    Raises:
        ValueError: if the section or the status does not exist.
    """
    if section not in SECTIONS:
        raise ValueError(f"section {section!r} is none of {SECTIONS}")
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {STATUSES}")
    if status != "works" and not note:
        raise ValueError(f"the row {row!r} is {status!r} and has no note that says how, or why and what to do")
    return Row(section, row, status, [note] if note else [])


def merge_markers(markers: Iterable[tuple[str, Row]]) -> list[Row]:
    """One row for each name, in the order of sections and names, with all of its notes and tests.

    Args:
        markers: pairs of a test's name and the row that it proves.

    Raises:
        ValueError: if two tests do not agree on a row's status.
    """
    rows: dict[tuple[str, str], Row] = {}
    for test, found in markers:
        row = rows.setdefault((found.section, found.name), Row(found.section, found.name, found.status))
        if row.status != found.status:
            raise ValueError(f"{found.name!r} is {row.status!r} by {row.tests}, and {found.status!r} by {test}")
        row.notes += [note for note in found.notes if note not in row.notes]
        if test not in row.tests:
            row.tests.append(test)
    return sorted(rows.values(), key=lambda row: (SECTIONS.index(row.section), row.name.replace("`", "").casefold()))


class _Collector:
    """A pytest plugin that keeps the markers of what is collected."""

    def __init__(self) -> None:
        self.markers: list[tuple[str, Row]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name = getattr(item, "originalname", item.name)
            test = f"{item.path.relative_to(ROOT).as_posix()}::{name}"
            for marker in item.iter_markers("compatibility"):
                try:
                    self.markers.append((test, read_marker(*marker.args, **marker.kwargs)))
                except (TypeError, ValueError) as error:  # noqa: PERF203  # says which test it is
                    raise pytest.UsageError(f"{test}: {error}") from error


def collect_rows() -> list[Row]:
    """The rows that the tests in this repository prove.

    Raises:
        RuntimeError: if pytest cannot collect them.
    """
    collector, output = _Collector(), io.StringIO()
    options = ["--collect-only", "--quiet", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main([*options, str(ROOT / "tests")], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest could not collect the tests:\n{output.getvalue()}")
    return merge_markers(collector.markers)


def render(rows: Iterable[Row]) -> str:
    """The page: of each section what works and what to know, then its tests in a box that is closed."""
    rows = list(rows)
    lines = [_INTRODUCTION]
    for section in SECTIONS:
        chosen = [row for row in rows if row.section == section]
        if chosen:
            lines += [f"## {section}", "", "| | status | note |", "|---|---|---|"]
            for row in chosen:
                cells = (row.name, row.status, " ".join(row.notes))
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines += ["", f'??? note "The tests: {section}"', ""]
            for row in chosen:
                lines.append(f"    - {row.name}")
                lines += [f"        - `{test.removeprefix('tests/')}`" for test in sorted(row.tests)]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(collect_rows()))
