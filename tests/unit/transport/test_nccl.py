"""The NCCL channel over communicators that enforce NCCL's rules, and how the two sides come to one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.exchange import nccl_negotiation as nccl_office
from lightning_async.exchange.nccl_negotiation import NcclNegotiator, Turns
from lightning_async.exchange.negotiation import dial
from lightning_async.exchange.server import Server
from lightning_async.exchange.worker import Worker
from lightning_async.holder.placement import HolderPlacement
from lightning_async.runtime.handshake import PeerInfo
from lightning_async.transport import nccl
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.devices import RankDevices
from lightning_async.transport.message import Goodbye, Pull
from lightning_async.transport.nccl import NcclChannel, NcclExecutor
from lightning_async.transport.shm import SharedMemoryChannel
from tests.fake_nccl import Fabric
from tests.harness import Call, Entrance, Exchange, socket_pair

pytestmark = pytest.mark.timeout(60)
NUMEL = 6
CPU = torch.device("cpu")
PING = Pull(worker=1)


def gpu(number: int) -> dict[str, Any]:
    return {"uuid": f"GPU-{number}", "nccl": "2.27.3", "shares": False}


class Pair:
    """A worker's and the holder's end of a NCCL channel in one process."""

    def __init__(self, fabric: Fabric, late_reader: bool = False) -> None:
        self.ends = []
        links = [NcclExecutor(fabric.communicator(None, "pair", side, CPU), f"side-{side}") for side in (0, 1)]
        connecting = threading.Thread(target=links[1].connect, args=(5.0, lambda: False))
        connecting.start()
        links[0].connect(5.0, lambda: False)
        connecting.join()
        for side, (sock, executor) in enumerate(zip(socket_pair(), links, strict=True)):
            buffers = Buffers.allocate(NUMEL, torch.float32)
            self.ends.append(NcclChannel(ControlConnection(sock), buffers, executor, side, late_reader))

    @property
    def holder(self) -> NcclChannel:
        return self.ends[0]

    @property
    def worker(self) -> NcclChannel:
        return self.ends[1]


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    fabric = Fabric()
    before = set(threading.enumerate())
    yield fabric
    for communicator in fabric.sides.values():
        communicator.abort()
    assert fabric.broken == []
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("side-")]
    for thread in left:
        thread.join(5.0)


@pytest.fixture
def pair(fabric: Fabric, request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(fabric, late_reader=getattr(request, "param", False))
    yield pair
    for end in pair.ends:
        end.close()


@pytest.mark.parametrize("pair", [True], indirect=True)
def test_parameters_are_not_posted_while_their_worker_still_computes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "_PAYLOAD_BASE_S", 1.0)
    pair.holder.buffers.parameters.fill_(3.0)
    call = Call(lambda: pair.holder.send(PING, pair.holder.buffers.parameters))
    time.sleep(1.5)

    pair.worker.receive()
    pair.worker.receive_payload(pair.worker.buffers.parameters)
    call.outcome()

    assert pair.worker.buffers.parameters.tolist() == [3.0] * NUMEL


def test_payloads_pass_both_ways_in_strict_order(pair: Pair) -> None:
    rounds = 30

    def holder() -> None:
        for _ in range(rounds):
            pair.holder.receive()
            # A part of the buffer, as one of several optimizers pushes it.
            pair.holder.receive_payload(pair.holder.buffers.gradient[2:5])
            pair.holder.buffers.parameters.add_(pair.holder.buffers.gradient)
            pair.holder.send(PING, pair.holder.buffers.parameters)

    call = Call(holder)
    for number in range(rounds):
        pair.worker.buffers.gradient.fill_(float(number))
        pair.worker.send(PING, pair.worker.buffers.gradient[2:5])
        pair.worker.receive()
        pair.worker.receive_payload(pair.worker.buffers.parameters)
    call.outcome()

    total = float(sum(range(rounds)))
    assert pair.worker.buffers.parameters.tolist() == [0, 0, total, total, total, 0]


def test_a_payload_is_posted_only_behind_its_message(pair: Pair, fabric: Fabric) -> None:
    call = Call(lambda: pair.worker.send(PING, pair.worker.buffers.gradient))

    message = pair.holder.receive()
    time.sleep(0.05)
    before = list(fabric.posted)
    pair.holder.receive_payload(pair.holder.buffers.gradient)
    call.outcome()

    assert message == PING
    assert before == [("pair", 1, "send")]
    assert fabric.posted == [("pair", 1, "send"), ("pair", 0, "recv")]


def test_a_peer_that_does_not_deliver_in_time_ends_the_channel(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_PAYLOAD_BASE_S", 0.3)

    with pytest.raises(ChannelClosedError, match="did not answer within 0 s"):
        pair.holder.receive_payload(pair.holder.buffers.gradient)
    with pytest.raises(ChannelClosedError, match="channel closed"):
        pair.holder.receive_payload(pair.holder.buffers.gradient)


@pytest.mark.parametrize("unread", [False, True])
def test_a_peer_that_dies_in_the_middle_of_a_payload_is_noticed_at_once(pair: Pair, unread: bool) -> None:
    if unread:
        pair.worker.send(PING)
    call = Call(lambda: pair.holder.receive_payload(pair.holder.buffers.gradient))
    time.sleep(0.05)

    # What the system does for a killed process; NCCL itself says nothing.
    pair.worker._control.shutdown()

    assert str(call.ended(5.0)) == "NCCL: the peer is gone"


def test_closing_from_another_thread_frees_whoever_waits_for_a_payload(pair: Pair) -> None:
    call = Call(lambda: pair.worker.receive_payload(pair.worker.buffers.parameters))
    time.sleep(0.05)

    pair.worker.close()

    assert type(call.ended(5.0)) is ChannelClosedError


def test_the_fake_catches_an_order_that_nccl_would_hang_on(pair: Pair, fabric: Fabric) -> None:
    call = Call(lambda: pair.worker.send(PING, pair.worker.buffers.gradient[:2]))
    Call(lambda: pair.holder.receive_payload(pair.holder.buffers.gradient))
    time.sleep(0.2)
    broken, fabric.broken[:] = list(fabric.broken), []

    pair.holder.close()
    pair.worker.close()
    call.ended()

    assert any("recv of 6 meets send of 2" in rule or "send of 2 meets recv of 6" in rule for rule in broken)


def test_turns_come_in_the_order_of_ranks_and_one_at_a_time() -> None:
    turns, order = Turns(5), []

    def visit(rank: int) -> None:
        if rank == 2:
            turns.give(rank, 0, taken=False)
            return
        turns.take(rank, 0)
        order.append(("in", rank))
        time.sleep(0.01)
        order.append(("out", rank))
        turns.give(rank, 0, taken=True)

    threads = [threading.Thread(target=visit, args=(rank,)) for rank in (4, 3, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5.0)

    assert order == [(way, rank) for rank in (1, 3, 4) for way in ("in", "out")]


def test_second_lanes_come_after_every_first_one_and_one_at_a_time() -> None:
    turns, order = Turns(3), []

    def visit(rank: int, slot: int) -> None:
        turns.take(rank, slot)
        order.append(("in", slot))
        time.sleep(0.05)
        order.append(("out", slot))
        turns.give(rank, slot, taken=True)

    places = [(1, 1), (2, 1), (2, 0), (1, 0)]
    threads = [threading.Thread(target=visit, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5.0)

    assert order == [("in", 0), ("out", 0)] * 2 + [("in", 1), ("out", 1)] * 2


def test_rank_0s_own_lanes_are_never_offered_nccl() -> None:
    facts = {**gpu(0), "shares": True}
    negotiator = NcclNegotiator(CPU, facts, 2, NUMEL, torch.float32, True, lambda: pytest.fail("a store was made"))

    assert negotiator.open(PeerInfo(0, 0, {"device": facts}), None) is None  # type: ignore[arg-type]


def test_closing_ends_the_wait_for_a_turn() -> None:
    turns = Turns(3)
    call = Call(lambda: turns.take(2, 0))

    turns.close()

    assert type(call.ended(5.0)) is ChannelClosedError


class Run:
    """Rank 0's server, and workers of which each has a thread."""

    def __init__(self, workers: int, transport: Any = "auto") -> None:
        self.exchange = Exchange([NUMEL], workers=workers, tickets=1000)
        self.latch, self.holder = self.exchange.latch, self.exchange.holder
        self.entrance = Entrance(workers, self.latch)
        self.server = Server(
            self.holder,
            self.exchange.ledger,
            self.exchange.layout,
            self.exchange.hyperparams,
            self.latch,
            self.entrance.listener,
            transport,
            placement=HolderPlacement(CPU, gpu(0)),
            workers=workers,
        )
        self.channels: dict[int, Channel] = {}

    def dial(self, rank: int, claims: dict[str, Any] | None = None) -> Channel:
        devices = RankDevices(CPU, claims if claims is not None else gpu(rank))
        channel = dial(
            self.entrance.listener.address, rank, self.exchange.layout, self.exchange.hyperparams, devices=devices
        )
        self.channels[rank] = channel
        return channel

    def train(self, rank: int, steps: int) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(NUMEL))
        optimizer = AMSGrad([parameter], lr=0.1)
        worker = Worker(rank, self.channels[rank], self.exchange.layout, [optimizer], self.latch)
        for _ in range(steps):
            worker.draw()
            worker.begin_batch(1)
            parameter.grad = parameter.detach() * 2 + rank
            worker.step(0)
        worker.refresh()
        worker.close()
        return parameter.detach()

    def close(self) -> None:
        for rank, channel in self.channels.items():
            # Those that have trained are closed already.
            with contextlib.suppress(ChannelClosedError, OSError):
                channel.send(Goodbye(worker=rank))
            channel.close()
        self.server.close()
        self.entrance.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, fabric: Fabric) -> Iterator[Callable[..., Run]]:
    monkeypatch.setattr(nccl_office, "nccl_communicator", fabric.communicator)
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 0.1)
    runs: list[Run] = []

    def start(*arguments: Any) -> Run:
        runs.append(Run(*arguments))
        return runs[-1]

    yield start
    for one in runs:
        one.close()


def test_communicators_are_made_one_at_a_time_in_the_order_of_ranks(run: Callable[..., Run], fabric: Fabric) -> None:
    workers = 5
    here = run(workers)

    calls = []
    for rank in reversed(range(1, workers)):
        calls.append(Call(lambda rank=rank: here.dial(rank)))  # type: ignore[misc]
        time.sleep(0.02)
    for call in calls:
        call.outcome()

    assert fabric.connected == [f"nccl-{rank}-0-0" for rank in range(1, workers)]
    assert {type(channel) for channel in here.channels.values()} == {NcclChannel}


def test_a_run_over_nccl_is_serial_amsgrad(run: Callable[..., Run]) -> None:
    here, steps = run(3, "nccl"), 8
    calls = [Call(lambda rank=rank: here.dial(rank)) for rank in (1, 2)]  # type: ignore[misc]
    for call in calls:
        call.outcome()

    # One after the other: then the order of updates is known.
    first, second = here.train(1, steps), here.train(2, steps)

    alone = torch.nn.Parameter(torch.ones(NUMEL))
    optimizer = AMSGrad([alone], lr=0.1, fused=True)
    expected = []
    for rank in (1, 2):
        for _ in range(steps):
            alone.grad = alone.detach() * 2 + rank
            optimizer.step()
        expected.append(alone.detach().clone())
    assert here.latch.failure is None
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("side", [0, 1], ids=["holder", "worker"])
def test_a_communicator_that_cannot_be_made_gives_way_to_host_memory(
    run: Callable[..., Run], fabric: Fabric, caplog: pytest.LogCaptureFixture, side: int
) -> None:
    def refuse(name: str, which: int) -> None:
        if (name, which) == ("nccl-1-0-0", side):
            raise RuntimeError("unhandled system error")

    fabric.refuse = refuse
    here = run(3)
    with caplog.at_level("WARNING"):
        calls = [Call(lambda rank=rank: here.dial(rank)) for rank in (1, 2)]  # type: ignore[misc]
        for call in calls:
            call.outcome()

    here.train(1, 2)
    here.train(2, 2)
    assert [type(here.channels[rank]) for rank in (1, 2)] == [SharedMemoryChannel, NcclChannel]
    assert "NCCL with rank 1 failed: NCCL: unhandled system error; it goes through host memory" in caplog.text
    assert here.holder.version == 4


def test_a_communicator_that_cannot_be_made_ends_a_run_that_insists(run: Callable[..., Run], fabric: Fabric) -> None:
    def refuse(name: str, side: int) -> None:
        if side == 1:
            raise RuntimeError("unhandled system error")

    fabric.refuse = refuse
    here = run(2, "nccl")

    with pytest.raises(ChannelClosedError):
        here.dial(1)

    failure = here.latch.wait(5.0)
    assert failure is not None
    assert (failure.rank, failure.reason) == (
        1,
        'transport="nccl" was asked for, and rank 1 cannot use it: NCCL: unhandled system error. '
        'Take transport="auto", which goes through host memory for such ranks',
    )


@pytest.mark.parametrize(
    "claims", [gpu(0), {**gpu(1), "nccl": "2.20.5"}, {}, {"uuid": 3}], ids=["same", "version", "none", "nonsense"]
)
def test_a_worker_that_nccl_cannot_reach_is_not_offered_it(
    run: Callable[..., Run], fabric: Fabric, claims: dict[str, Any]
) -> None:
    here = run(3)

    first, second = here.dial(1, claims), here.dial(2)

    assert [type(first), type(second)] == [SharedMemoryChannel, NcclChannel]
    assert fabric.connected == ["nccl-2-0-0"]


def test_a_rank_that_dies_while_it_connects_does_not_hold_up_the_next(run: Callable[..., Run], fabric: Fabric) -> None:
    here = run(3)
    # Which must not connect while the one before still does.
    fabric.lingers_s = 0.2

    def die(name: str, side: int) -> None:
        if (name, side) == ("nccl-1-0-0", 1):
            doomed[0].shutdown()
            raise RuntimeError("killed")

    doomed: list[ControlConnection] = []
    accept = nccl_office._PeerDecision.__init__

    def remember(self: Any, connection: ControlConnection) -> None:
        if threading.current_thread().name == "doomed":
            doomed.append(connection)
        accept(self, connection)

    fabric.refuse = die
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_office._PeerDecision, "__init__", remember)
        call = Call(
            lambda: (setattr(threading.current_thread(), "name", "doomed"), here.dial(1))  # type: ignore[func-returns-value]
        )
        call.ended()

    assert isinstance(here.dial(2), NcclChannel)
    assert type(call.error) is ChannelClosedError
    failure = here.latch.wait(5.0)
    assert failure is not None and failure.rank == 1
