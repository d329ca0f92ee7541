"""Memory without a name is opened by who was told of it, and never mistaken for what has taken its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async.exchange.shared_payload import SharedPayload, unpack
from lightning_async.transport.memory import AnonymousMemory, open_memory
from lightning_async.transport.shm import SharedSegment


def release(held: Any) -> None:
    held.release() if isinstance(held, SharedSegment) else held.close()


@contextmanager
def in_the_place_of(address: str, path: Path) -> Iterator[None]:
    """Opens a file where the descriptor was that the address speaks of, as a process does that opens files."""
    descriptor = int(address.partition(":")[0].rpartition("/")[2])
    opened = os.open(path, os.O_RDWR)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        yield
    finally:
        os.close(descriptor)


MAKERS: list[tuple[Callable[[], Any], Callable[[str], Any]]] = [
    (lambda: AnonymousMemory(4096), open_memory),
    (lambda: AnonymousMemory(4096), lambda address: open_memory(address, os.O_RDWR)),
    (lambda: SharedPayload([torch.ones(9)]), unpack),
    (lambda: SharedSegment(5, torch.float32), lambda address: SharedSegment.attach(address, 5, torch.float32)),
]
NAMES = ["memory", "writable", "payload", "segment"]


@pytest.mark.parametrize(("make", "open_it"), MAKERS, ids=NAMES)
def test_a_file_that_has_taken_its_place_is_not_opened_and_keeps_its_contents(
    make: Callable[[], Any], open_it: Callable[[str], Any], tmp_path: Path
) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_bytes(b"p" * 9000)
    held = make()
    address = held.address
    release(held)

    with (
        in_the_place_of(address, precious),
        pytest.raises(OSError, match=r"closed, and .*precious\.txt is there"),
    ):
        open_it(address)

    assert precious.read_bytes() == b"p" * 9000


@pytest.mark.parametrize(("make", "open_it"), MAKERS, ids=NAMES)
def test_other_memory_that_has_taken_its_place_is_not_opened(
    make: Callable[[], Any], open_it: Callable[[str], Any]
) -> None:
    held = make()
    address = held.address
    release(held)
    other = make()
    try:
        assert other.address.partition(":")[0] == address.partition(":")[0]
        with pytest.raises(OSError, match="it was closed, and /memfd:lightning_async-"):
            open_it(address)
    finally:
        release(other)


def test_what_was_unpacked_outlives_its_parcel() -> None:
    with SharedPayload({"weight": torch.arange(5.0)}) as payload:
        value = unpack(payload.address)
        address = payload.address
    assert value["weight"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match=r"No such file|closed"):
        unpack(address)


def test_a_value_that_cannot_be_packed_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AttributeError):
        SharedPayload(lambda: None)
    assert len(os.listdir("/proc/self/fd")) == before
