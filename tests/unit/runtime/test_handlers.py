"""A signal's handler is recognized by its code, whatever kind of callable it is; so is the middle of an exchange."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_async.runtime.handlers import comes_between
from tests.harness import Exchange

pytestmark = pytest.mark.timeout(20)


def asked() -> bool:
    return comes_between(sys._getframe(1))


@pytest.fixture
def install() -> Iterator[Callable[[Any], object]]:
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


class Handlers:
    def __init__(self) -> None:
        self.found: list[bool] = []

    def method(self, signum: int, frame: object) -> None:
        self.found.append(asked())

    def __call__(self, signum: int, frame: object) -> None:
        self.helper()

    def helper(self) -> None:
        self.found.append(asked())

    def with_more(self, more: str, signum: int, frame: object) -> None:
        self.found.append(asked())


def wrapped(handlers: Handlers) -> Any:
    @functools.wraps(handlers.method)
    def wrapper(*args: Any) -> None:
        handlers.method(*args)

    return wrapper


@pytest.mark.parametrize(
    "handler_of",
    [
        lambda handlers: handlers.method,
        lambda handlers: handlers,
        lambda handlers: functools.partial(handlers.with_more, "more"),
        lambda handlers: lambda signum, frame: handlers.helper(),
        wrapped,
    ],
    ids=["method", "object", "partial", "lambda", "decorated"],
)
def test_what_a_handler_calls_comes_between(
    handler_of: Callable[[Handlers], Any], install: Callable[[Any], object]
) -> None:
    handlers = Handlers()
    install(handler_of(handlers))

    signal.raise_signal(signal.SIGUSR1)

    assert handlers.found == [True]


def test_other_code_does_not_also_while_a_handler_is_installed(install: Callable[[Any], object]) -> None:
    handlers = Handlers()
    install(handlers.method)

    handlers.helper()

    assert handlers.found == [False]


def test_a_thread_is_not_interrupted_by_signals(install: Callable[[Any], object]) -> None:
    handlers = Handlers()
    install(handlers.method)

    thread = threading.Thread(target=handlers.method, args=(0, None))
    thread.start()
    thread.join()

    assert handlers.found == [False]


def test_an_observer_comes_in_the_middle_of_an_exchange() -> None:
    exchange = Exchange([2], workers=1, tickets=1)
    found: list[bool] = []
    exchange.updates = found  # type: ignore[assignment]  # what is told of each update
    exchange.holder.subscribe(lambda: found.append(asked()))

    exchange.holder.leave(0)

    assert found == [True]
