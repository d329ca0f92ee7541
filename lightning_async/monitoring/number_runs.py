"""Numbers in a row, for texts that name many ranks."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["runs_of"]


def runs_of(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers, those that follow one another together.

    Examples:
        >>> runs_of([0, 2, 3, 4, 9])
        [[0], [2, 3, 4], [9]]
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
