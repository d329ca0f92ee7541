"""Whoever knocks at rank 0's listener without belonging there is refused by name, counted, and changes nothing."""

from __future__ import annotations

import json
import logging
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.exchange import negotiation as channels
from lightning_async.exchange.negotiation import dial
from lightning_async.exchange.worker import RequestRefusedError, Worker
from lightning_async.holder.layout import describe_model
from lightning_async.runtime import listener as frontdoor
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.handshake import CONTROL, HEARTBEAT, Address, HandshakeError, handshake
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.transport.codec import HEADER_BYTES, encode
from lightning_async.transport.connection import ControlConnection, connect
from lightning_async.transport.fields import pack_bitmap, pack_hyperparams
from lightning_async.transport.message import (
    Challenge,
    Draw,
    Goodbye,
    Hello,
    Message,
    Parameters,
    Proof,
    Pull,
    Push,
    Refuse,
    Release,
    Skip,
    Tickets,
)
from lightning_async.transport.shm import SharedSegment
from tests.faults.host import RANKS, Host, model
from tests.faults.injector import pid_of
from tests.faults.train import Run, train
from tests.launch import launch, report

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(frontdoor, "HANDSHAKE_TIMEOUT_S", 0.5)
    host = Host(getattr(request, "param", "auto"))
    yield host
    host.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def hello(claims: Any, worker: int = 1) -> bytes:
    text = claims if isinstance(claims, str) else json.dumps(claims)
    return encode(Hello(worker=worker, claims=text))


def other_version() -> bytes:
    data = bytearray(hello({}))
    data[4:6] = struct.pack("<H", 99)
    return bytes(data)


def introduction(**options: Any) -> Callable[[Host], ControlConnection]:
    """A rank that has proven to know the token."""
    return lambda host: host.introduce(**({"claims": host.claims()} | options))


def with_claims(**changes: Any) -> Callable[[Host], ControlConnection]:
    return lambda host: host.introduce(host.claims(**changes))


def challenged(answer: Callable[[Host], bytes]) -> Callable[[Host], ControlConnection]:
    """A stranger that answers the challenge in its own way."""

    def come(host: Host) -> ControlConnection:
        connection = ControlConnection(host.knock(hello({"role": CONTROL, "nonce": "0"})))
        connection.settimeout(5.0)
        assert isinstance(connection.receive(), Challenge)
        connection._socket.sendall(answer(host))
        return connection

    return come


STRANGERS: dict[str, tuple[Callable[[Host], bytes | ControlConnection], str]] = {
    "garbage": (lambda host: b"GET / HTTP/1.1\r\nHost: you\r\n\r\n" + b"x" * HEADER_BYTES, "lightning_async message"),
    "nothing": (lambda host: b"", "timed out"),
    "half a header": (lambda host: hello({})[: HEADER_BYTES // 2], "timed out"),
    "half a trailer": (lambda host: hello({"role": CONTROL})[:-5], "timed out"),
    "no answer to the challenge": (challenged(lambda host: b""), "timed out"),
    "another protocol version": (lambda host: other_version(), "protocol version 99"),
    "another kind": (lambda host: encode(Goodbye(worker=1)), "GOODBYE instead of HELLO"),
    "a huge message": (
        lambda host: encode(Push(worker=1, tickets=(range(1), range(2, 3)) * 4000))[:HEADER_BYTES],
        "more than the",
    ),
    "no JSON": (lambda host: hello("no JSON"), "cannot be read"),
    "no object": (lambda host: hello([1, 2]), "cannot be read"),
    "bottomless JSON": (lambda host: hello("[" * 16_000), "cannot be read"),
    "the old way": (lambda host: hello({"role": CONTROL}) * 2, "answers the challenge with HELLO"),
    "no proof": (challenged(lambda host: encode(Proof(worker=1))), "does not know this run's token"),
    "a proof that is no text": (
        challenged(lambda host: encode(Proof(worker=1, text="é" * 100))),
        "does not know this run's token",
    ),
    "wrong token": (introduction(token="0" * 32), "does not know this run's token"),
    "rank 0": (introduction(rank=0), "no 'control' for rank 0"),
    "rank past the last": (introduction(rank=RANKS), f"no 'control' for rank {RANKS}"),
    "unknown role": (introduction(role="window"), "no 'window' for rank 1"),
    "other parameter count": (with_claims(model={"parameters": 9}), "rank 1 has parameters = 9"),
    "other dtype": (with_claims(model={"dtype": "float64"}), "rank 1 has dtype = float64"),
    "other shapes": (with_claims(model={"shapes": "0" * 16}), "rank 1 has shapes = 0000"),
    "other groups": (with_claims(model={"groups": [1, 2]}), "rank 1 has groups = [1, 2]"),
    "no model": (introduction(claims={"model": None}), "rank 1 has parameters = None"),
    "a second slot": (with_claims(slot=1, overlaps=True), "comes for its slot 1 with overlap=True"),
    "a second slot without overlap": (with_claims(slot=1), "comes for its slot 1"),
    "overlap": (with_claims(overlaps=True), "give all ranks the same strategy"),
    "a slot below the first": (with_claims(slot=-1), "comes for its slot -1"),
    "a slot that is no number": (with_claims(slot=[0]), "comes for its slot -1"),
    "a slot that is a truth": (with_claims(slot=False), "comes for its slot -1"),
    "long claims": (with_claims(model={"dtype": "x" * 15_900}), "rank 1 has dtype = xxx"),
    "unprintable claims": (with_claims(model={"dtype": "\ud800"}), "rank 1 has dtype = ?"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_refused_with_the_reason(host: Host, stranger: str, caplog: pytest.LogCaptureFixture) -> None:
    message, reason = STRANGERS[stranger]

    said = message(host)
    connection = ControlConnection(host.knock(said)) if isinstance(said, bytes) else said
    with closing(connection._socket) as sock:
        port = sock.getsockname()[1]
        connection.settimeout(5.0)
        reply = connection.receive()
        while isinstance(reply, Challenge):
            reply = connection.receive()

    assert isinstance(reply, Refuse)
    assert reason in reply.reason
    assert f"refused a connection from 127.0.0.1:{port}" in caplog.text
    assert reason in caplog.text
    assert host.stats.refused == 1
    assert host.latch.failure is None
    assert host.serves(rank=1)


def test_a_stranger_that_hangs_up_is_refused(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.knock(b"").close()

    assert eventually(lambda: host.stats.refused == 1)
    assert "connection closed" in caplog.text
    assert host.serves(rank=1)


def test_silent_strangers_keep_nobody_out(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    # None of them is given up while the test lasts: one after the other they would keep the worker out.
    monkeypatch.setattr(frontdoor, "HANDSHAKE_TIMEOUT_S", 120.0)
    strangers = [host.knock() for _ in range(40)]

    assert host.serves(rank=2)
    assert host.stats.refused == 0
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("role", [HEARTBEAT, CONTROL])
def test_a_rank_that_is_here_is_not_let_in_again(host: Host, role: str) -> None:
    claims = {"model": describe_model(host.layout, host.groups)}
    first = handshake(host.listener.address, 1, role, **claims)[0]
    assert role == CONTROL or eventually(lambda: host.heartbeats.watches(1))

    with pytest.raises(HandshakeError, match="rank 1 is here already"):
        handshake(host.listener.address, 1, role, **claims)

    assert host.latch.failure is None
    assert host.stats.refused == 1
    first.shutdown()
    first.close()


def test_where_there_are_two_lanes_each_is_let_in_once_and_no_third() -> None:
    host = Host(slots=2)
    model = {"model": describe_model(host.layout, host.groups)}
    both = [handshake(host.listener.address, 1, CONTROL, **model, slot=slot, overlaps=True)[0] for slot in (0, 1)]

    for slot, overlaps, reason in ((0, True, "here already"), (2, True, "its slot 2"), (0, False, "overlap=False")):
        with pytest.raises(HandshakeError, match=reason):
            handshake(host.listener.address, 1, CONTROL, **model, slot=slot, overlaps=overlaps)

    assert host.stats.refused == 3
    assert host.latch.failure is None
    for connection in both:
        connection.shutdown()
        connection.close()
    host.close()


def has_gone(host: Host, rank: int) -> bool:
    return eventually(lambda: (rank, 0) not in host.server._present)


def test_a_rank_that_has_left_comes_back_as_its_next_incarnation_only(host: Host) -> None:
    def come(incarnation: int) -> None:
        channel = dial(host.listener.address, 1, host.layout, host.groups, incarnation)
        channel.send(Goodbye(worker=1))
        assert has_gone(host, 1)
        channel.close()

    come(0)
    with pytest.raises(HandshakeError, match="cannot be incarnation 0"):
        come(0)
    come(3)
    for incarnation in (0, 2, 3):
        with pytest.raises(HandshakeError, match=f"rank 1 was here and has left; .* incarnation {incarnation}"):
            come(incarnation)

    assert host.stats.refused == 4
    assert host.latch.failure is None
    assert host.serves(rank=2)


def test_a_lifeline_of_a_rank_that_has_left_is_refused(host: Host) -> None:
    """Who has the token could end the run by it, in the name of a rank that is done."""
    latch = FailureLatch()
    heartbeats = Heartbeats(1, latch, timeout_s=30.0)
    heartbeats.add(0, handshake(host.listener.address, 1, HEARTBEAT)[0])
    assert eventually(lambda: host.heartbeats.watches(1))
    heartbeats.close()
    assert eventually(lambda: not host.heartbeats.watches(1))

    with pytest.raises(HandshakeError, match="rank 1 was here and has left"):
        handshake(host.listener.address, 1, HEARTBEAT)

    assert host.stats.refused == 1
    assert host.latch.failure is None
    handshake(host.listener.address, 1, HEARTBEAT, incarnation=1)[0].close()


def test_a_door_without_lifelines_refuses_them() -> None:
    """That of the holder's own process: the ranks' heartbeats come in at rank 0's."""
    refused: list[int] = []
    listener = Listener("127.0.0.1", RANKS, None)
    listener.on_refused = lambda: refused.append(1)

    with pytest.raises(HandshakeError, match="heartbeats come in at another listener"):
        handshake(listener.address, 1, HEARTBEAT)

    assert refused == [1]
    listener.close()


def sessions() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("session-")]


def test_a_session_whose_worker_never_takes_its_offer_ends_with_the_run(host: Host) -> None:
    """It is killed between its handshake and its channel."""
    claims = {"model": describe_model(host.layout, host.groups)}
    connection = handshake(host.listener.address, 1, CONTROL, **claims)[0]
    time.sleep(0.3)
    assert [thread.name for thread in sessions()] == ["session-1"]

    host.latch.trip(RunFailure(1, "its process was killed by SIGKILL"))
    connection.close()
    host.server.close()

    assert sessions() == []


def test_a_rank_waits_for_its_buffers_for_longer_than_a_stranger_may_be_silent(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LargeSegment(SharedSegment):
        def __init__(self, numel: int, dtype: torch.dtype) -> None:
            time.sleep(1.5)
            super().__init__(numel, dtype)

    monkeypatch.setattr(channels, "SharedSegment", LargeSegment)

    assert host.serves(1)


def test_nobody_is_served_after_training(host: Host) -> None:
    host.server.close(timeout_s=1.0)

    with pytest.raises(HandshakeError, match="no training is under way"):
        dial(host.listener.address, 1, host.layout, host.groups)


def test_nobody_answers_at_a_closed_door(host: Host) -> None:
    host.listener.close()

    with pytest.raises(ChannelClosedError, match="no holder answers"):
        connect(host.listener.address.host, host.listener.address.port, timeout_s=1.0)
    assert not [thread for thread in threading.enumerate() if thread.name == "listener"]


# --- a rank of the run that does not keep to the protocol ----------------------------------------------------------


def push(host: Host, **changes: Any) -> Push:
    """A push that fits the session, but for ``changes``."""
    fields: dict[str, Any] = {
        "worker": 1,
        "version": 0,
        "tickets": (range(1),),
        "samples": 4,
        "dtype": torch.float32,
        "payload_bytes": host.layout.numel * 4,
        "hyperparams": pack_hyperparams(host.hyperparams),
        "present": pack_bitmap([True, True]),
    }
    return Push(**(fields | changes))


WRONG: dict[str, tuple[Callable[[Host], Message], str]] = {
    "fewer bytes": (lambda host: push(host, payload_bytes=36), "it pushes 36 bytes for optimizer 0, which has 40"),
    "more bytes": (lambda host: push(host, payload_bytes=2**60), "bytes for optimizer 0, which has 40"),
    "other dtype": (lambda host: push(host, dtype=torch.float16), "it pushes torch.float16"),
    "no dtype": (lambda host: push(host, dtype=None), "it pushes None"),
    "other optimizer": (lambda host: push(host, optimizer=1), "it pushes for optimizer 1 of 1"),
    "short bitmap": (lambda host: push(host, present=b""), "A bitmap of 2 flags has 1 bytes, and 0 arrived"),
    "bitmap past the end": (lambda host: push(host, present=b"\x07"), "bits set past the last"),
    "more hyperparameters": (
        lambda host: push(host, hyperparams=push(host).hyperparams * 2),
        "It sends 16 hyperparameters, the holder has 8",
    ),
    "no hyperparameters": (lambda host: push(host, hyperparams=b""), "It sends 0 hyperparameters, the holder has 8"),
    "hyperparameters that are not finite": (
        lambda host: push(host, hyperparams=b"\0" * 56 + struct.pack("<d", math.nan)),
        "Hyperparameters must be finite",
    ),
    "more tickets": (lambda host: push(host, tickets=(range(2),)), "worker 1 reports 2 batches but holds 1"),
    "another's ticket": (lambda host: push(host, tickets=(range(1, 2),)), "reports batch 1, which it does not hold"),
    "another's name": (lambda host: push(host, worker=2), "claims to come from worker 2"),
    "a version that it does not hold": (lambda host: push(host, version=5), "a gradient of version 5 but holds 0"),
    "pull while it holds": (lambda host: Pull(worker=1), "still holds version 0"),
    "skip too many": (lambda host: Skip(worker=1, tickets=(range(2),)), "reports 2 batches but holds 1"),
    "give back another's": (
        lambda host: Release(worker=1, tickets=(range(5, 6),)),
        "gives back batch 5, which it does not hold",
    ),
    "an answer": (lambda host: Parameters(worker=1), "a worker may not send PARAMETERS"),
    "a second hello": (lambda host: Hello(worker=1), "a worker may not send HELLO"),
}


@pytest.mark.parametrize("host", ["auto", "tcp"], indirect=True)
@pytest.mark.parametrize("mistake", WRONG)
def test_a_request_that_does_not_fit_is_refused_and_ends_the_run_by_name(host: Host, mistake: str) -> None:
    request, reason = WRONG[mistake]
    channel = reading_worker(host)
    # A payload of the right size behind a message that was not: the refusal must come before it is taken.
    payload = host.layout.buffer() if mistake == "a version that it does not hold" else None

    channel.send(request(host), payload)
    reply = channel.receive()

    assert isinstance(reply, Refuse)
    assert reason in reply.reason
    failure = host.latch.wait(5.0)
    assert failure is not None
    assert failure.rank == 1
    assert f"worker 1 refused: {reply.reason}" == failure.reason
    assert host.stats.refused == 1
    # Nothing of it was applied.
    assert host.holder.version == 0
    channel.close()


def test_garbage_in_the_middle_of_a_session_ends_the_run_by_name(host: Host) -> None:
    channel: Any = reading_worker(host)

    channel._control._socket.sendall(b"garbage" * 100)
    failure = host.latch.wait(10.0)

    assert failure is not None
    assert failure.rank == 1
    assert "Expected a lightning_async message" in failure.reason
    channel.close()


@pytest.mark.parametrize("host", ["auto", "tcp"], indirect=True)
def test_a_refused_worker_does_not_wait_for_its_payload_to_be_taken(host: Host) -> None:
    """A rank whose param groups have a number more, which the handshake would have noticed."""
    latch = FailureLatch()
    heartbeats = Heartbeats(1, latch, timeout_s=30.0)
    heartbeats.add(0, handshake(host.listener.address, 1, HEARTBEAT)[0])
    parameters = model()
    optimizer = AMSGrad(parameters)
    optimizer.param_groups[0]["more"] = 1.0
    channel = dial(host.listener.address, 1, host.layout, host.groups)
    worker = Worker(1, channel, host.layout, [optimizer], latch)
    worker.draw()
    worker.begin_batch(samples=4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    # Neither the heartbeat nor a payload gives up while the test lasts.
    with pytest.raises((WorkerFailedError, RequestRefusedError), match="9 hyperparameters, the holder has 8"):
        worker.step(0)

    worker.close()
    heartbeats.close()


def reading_worker(host: Host) -> Channel:
    """The channel of a worker that has drawn one ticket and holds version 0."""
    channel = dial(host.listener.address, 1, host.layout, host.groups)
    channel.send(Draw(worker=1))
    assert isinstance(channel.receive(), Tickets)
    channel.send(Pull(worker=1))
    assert isinstance(channel.receive(), Parameters)
    out: Tensor = host.layout.buffer()
    channel.receive_payload(out)
    return channel


# --- and in a real run -----------------------------------------------------------------------------------------------


def test_strangers_do_not_disturb_a_run(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        from lightning_async import AsyncAMSGradStrategy

        # pytest's own handlers would swallow what a user sees.
        logging.getLogger().handlers.clear()
        opened = Listener.__init__

        def open_and_tell(self: Listener, *args: Any) -> None:
            opened(self, *args)
            (folder / "address.tmp").write_text(self.address.as_json())
            (folder / "address.tmp").rename(folder / "address")

        teardown = AsyncAMSGradStrategy.teardown

        def teardown_and_report(self: AsyncAMSGradStrategy) -> None:
            report(folder, self.global_rank, refused=self.stats.refused, updates=self.stats.updates)
            teardown(self)

        Listener.__init__ = open_and_tell  # type: ignore[method-assign]
        AsyncAMSGradStrategy.teardown = teardown_and_report  # type: ignore[method-assign]
        train(Run(ranks=2, trainer={"max_epochs": 10}, sleep_s=(0.02, 0.02)), folder)

    held: list[socket.socket] = []

    def knock(session: int) -> None:
        pid_of(tmp_path, 1)
        address = Address.from_json((tmp_path / "address").read_text())
        for data in (b"x" * 500, other_version(), hello({"token": "guess", "role": HEARTBEAT}) * 2, b""):
            sock = socket.create_connection((address.host, address.port))
            sock.sendall(data)
            held.append(sock)

    run = launch(script, tmp_path, meanwhile=knock)
    for sock in held:
        sock.close()

    assert run.returncode == 0, run.output
    assert run.report(0)["updates"] == 160
    # The silent one was still being waited for.
    assert run.report(0)["refused"] == 3
    assert run.output.count("lightning_async refused a connection from 127.0.0.1") == 3
