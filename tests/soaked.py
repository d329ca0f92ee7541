"""Cases of a test that differ little from others, which `make soak` takes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["soaked"]


def soaked(values: Iterable[Any], *left: Any) -> list[Any]:
    """The values, as a test's parameters.

    Args:
        values: of one parameter.
        left: those that are left to `make soak`.

    Examples:
        >>> [bool(param.marks) for param in soaked([1, 2], 2)]
        [False, True]
    """
    return [pytest.param(value, marks=[pytest.mark.soak] if value in left else []) for value in values]
