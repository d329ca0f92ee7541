"""What goes between rank 0 and a shard on another host comes out as it went in, and makes what the protocol has."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.types import Snapshot
from lightning_async.policies.damping import AgeDamping
from lightning_async.shards import operations as told
from lightning_async.shards.frames import receive_frame, send_frame
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from tests.harness import socket_pair


@pytest.fixture
def ends() -> Iterator[tuple[ControlConnection, ControlConnection]]:
    mine, theirs = map(ControlConnection, socket_pair())
    yield mine, theirs
    mine.close()
    theirs.close()


STATE = {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(4.0)}, 2: {"step": torch.tensor(1.0)}}
GATHERED = Gathered([torch.ones(2), None], weight=0.5, count=1, arrivals=[(1, 0, 3, 4)])


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2, told.ApplyPush(3, 0, 17, (0.1, float("inf")), 8, (True, False), True, 18, True), None],
        told.CopyOut(1, 0, 5, reads=True),
        told.LoadStates(STATE),
        told.Restore(
            7, ({"state": STATE, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}, GATHERED, {"seen": 3})
        ),
        Snapshot(4, torch.zeros(0), [{"state": STATE}], [[{}]], ((0, 4),), (1, 2), GATHERED, {}),
        ["part", 1, 2, 3],
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_comes_out_as_it_went_in(ends: tuple[ControlConnection, ControlConnection], value: Any) -> None:
    send_frame(ends[0], value, 5.0)

    received = receive_frame(ends[1], 5.0)

    assert type(received) is type(value)
    assert repr(received) == repr(value)


def test_an_object_of_another_class_is_not_sent(ends: tuple[ControlConnection, ControlConnection]) -> None:
    with pytest.raises(TypeError, match="a Adjust"):
        send_frame(ends[0], told.Adjust(4, "wait", 1, AgeDamping()), 5.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"nonsense", "cannot be read"),
        (json.dumps({"items": [["class", "system"], ["fields", {"tuple": ["true"]}]]}).encode(), "cannot be read"),
        (json.dumps({"tensor": "torch.bits8", "shape": [1]}).encode(), "cannot be read"),
        (b"", "description of 0 bytes"),
    ],
)
def test_what_is_no_frame_is_refused(ends: tuple[ControlConnection, ControlConnection], text: bytes, said: str) -> None:
    ends[0].send_payload(None, memoryview(struct.pack("<Q", len(text)) + text), 5.0)

    with pytest.raises(WireError, match=said):
        receive_frame(ends[1], 5.0)
