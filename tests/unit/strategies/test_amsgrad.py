"""The warning that AMSGrad is switched on points at the user's own code."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from lightning_async.strategies.amsgrad import warn_at
from tests.models import TinyClassifier


class Adam(TinyClassifier):
    def configure_optimizers(self) -> Any:
        return None


LINE = Adam.configure_optimizers.__code__.co_firstlineno


def wrapped(module: Adam) -> Any:
    @functools.wraps(module.configure_optimizers)
    def inner() -> Any:
        return module.configure_optimizers()

    return inner


@pytest.mark.parametrize("of", [lambda module: module.configure_optimizers, wrapped], ids=["method", "wrapped"])
def test_the_warning_is_at_the_line_of_configure_optimizers(of: Any) -> None:
    with pytest.warns(UserWarning, match="switched on") as told:
        warn_at(of(Adam()), "switched on")

    assert (told[0].filename, told[0].lineno) == (__file__, LINE)


@pytest.mark.parametrize("function", [None, len])
def test_without_a_line_of_its_own_the_caller_is_named(function: Any) -> None:
    with pytest.warns(UserWarning, match="switched on") as told:
        warn_at(function, "switched on")

    assert told[0].filename == __file__
