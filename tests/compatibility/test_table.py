"""The table of what works says what the tests prove, and nothing else."""

from __future__ import annotations

import pytest

from tests.compatibility.table import PAGE, collect_rows, merge_markers, read_marker, render


def test_the_published_table_is_the_one_that_the_markers_give() -> None:
    assert PAGE.read_text() == render(collect_rows()), "the markers have changed: run `make table`"


def test_tests_that_prove_the_same_row_share_a_line_and_stand_in_the_box_of_its_section() -> None:
    markers = [
        ("tests/a.py::test_b", read_marker("Loop", "max_steps", note="One|two.")),
        ("tests/a.py::test_a", read_marker("Precision", "bf16", "differs", "Slower.")),
        ("tests/a.py::test_a", read_marker("Loop", "max_steps", note="One|two.")),
        ("tests/a.py::test_c", read_marker("Loop", "max_steps", note="Exact.")),
    ]

    lines = render(merge_markers(markers)).splitlines()

    assert "| max_steps | works | One\\|two. Exact. |" in lines
    box = lines.index('??? note "The tests: Loop"')
    assert lines[box + 1 : box + 6] == [
        "",
        "    - max_steps",
        "        - `a.py::test_a`",
        "        - `a.py::test_b`",
        "        - `a.py::test_c`",
    ]
    assert lines.index("## Precision") < lines.index("## Loop") < box


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("Loops", "max_steps"), "'Loops' is none of"),
        (("Loop", "max_steps", "broken"), "'broken' is none of"),
        (("Loop", "max_steps", "refused"), "no note"),
    ],
)
def test_a_marker_that_does_not_fit_the_table_is_an_error(arguments: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_marker(*arguments)


def test_two_tests_that_disagree_on_a_row_are_an_error() -> None:
    markers = [
        ("a.py::test_a", read_marker("Loop", "max_steps")),
        ("a.py::test_b", read_marker("Loop", "max_steps", "differs", "By one.")),
    ]

    with pytest.raises(ValueError, match=r"'works' by \['a.py::test_a'\], and 'differs' by a.py::test_b"):
        merge_markers(markers)
