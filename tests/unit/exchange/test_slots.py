"""A worker with two slots: what it has drawn and pushed stays in order while an exchange is under way."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lightning_async import AMSGrad
from lightning_async.data.ledger import Ledger
from lightning_async.exchange.session import Session
from lightning_async.exchange.worker import Worker
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Push, Update
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.transport import message as wire
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.fake import fake_pair
from lightning_async.transport.message import Message

pytestmark = pytest.mark.timeout(30)
OTHER = 1


class Desk:
    """A worker whose two slots end in sessions in threads of their own."""

    def __init__(self, barrier: StalenessBarrier | None = None, in_background: bool = True, fault: Any = None) -> None:
        self.parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = AMSGrad([self.parameter], lr=0.1)
        layout, self.latch = FlatLayout([[self.parameter]]), FailureLatch()
        self.ledger = Ledger(2)
        self.ledger.begin_epoch(range(10))
        self.ledger.open(10)
        self.ledger.draw(OTHER)
        self.covered: list[tuple[int, ...]] = []
        self.holder = Holder(
            layout, torch.ones(2), [optimizer], barrier or StalenessBarrier(None), self.latch, self.observe
        )
        self.session_ends: list[Any] = []
        worker_ends = []
        for slot in (0, 1):
            mine, theirs = fake_pair(layout.numel, worker_fault=fault)
            mine.serves_any_thread = in_background
            worker_ends.append(mine)
            self.session_ends.append(theirs)
            session = Session(0, theirs, self.holder, self.ledger, layout, [HyperparamLayout(optimizer)], slot)
            threading.Thread(target=self.serve, args=(session,), daemon=True).start()
        self.worker = Worker(0, worker_ends, layout, [optimizer], self.latch)

    def serve(self, session: Session) -> None:
        try:
            while not session.finished:
                session.serve_one()
        except (ChannelClosedError, WorkerFailedError):
            return

    def observe(self, update: Update) -> None:
        if update.push.worker == 0:
            self.covered.append(self.ledger.complete(0, update.push.tickets))

    def other_reads(self) -> int:
        version = self.holder.try_pull(OTHER, torch.empty(2))
        assert version is not None
        return version

    def other_pushes(self, version: int) -> None:
        assert self.holder.try_push(Push(OTHER, 0, version, [torch.ones(2)], ())) is not None

    def batch(self) -> list[int]:
        tickets = list(self.worker.draw())
        self.worker.begin_batch(samples=1)
        self.parameter.grad = torch.ones(2)
        return tickets


both_ways = pytest.mark.parametrize("in_background", [True, False], ids=["in the background", "by the training thread"])


@both_ways
def test_every_batch_is_covered_by_the_push_of_its_own_gradient(in_background: bool) -> None:
    desk = Desk(in_background=in_background)
    drawn = []
    for _ in range(5):
        drawn.append(tuple(desk.batch()))
        desk.worker.step(0)
    desk.worker.stop_dispatch()
    desk.worker.finish_segment()

    assert desk.covered == drawn
    assert desk.holder.version == 5
    desk.worker.close()


@both_ways
def test_a_hand_out_that_is_closed_leaves_no_ticket_behind(in_background: bool) -> None:
    desk = Desk(in_background=in_background)
    for _ in range(2):
        desk.batch()
        desk.worker.step(0)

    desk.worker.stop_dispatch()

    assert not desk.worker.draw()
    desk.worker.finish_segment()
    assert desk.ledger.leased(0) == 0
    # The two batches that were pushed, and what is left for the next segment: all but them and the other rank's.
    assert desk.ledger.progress() == (2, 7)
    desk.worker.close()


@both_ways
def test_a_batch_without_a_gradient_is_reported_after_the_push_of_an_older_one(in_background: bool) -> None:
    desk = Desk(StalenessBarrier(2), in_background)
    desk.other_reads()
    # Somebody else's update: from now on the other rank's version is the oldest.
    desk.holder.try_pull(2, torch.empty(2))
    desk.holder.try_push(Push(2, 0, 0, [torch.ones(2)], ()))
    desk.batch()
    desk.worker.step(0)
    second = desk.batch()
    desk.worker.step(0)
    third = desk.batch()
    # The second push waits at the barrier until the other rank's gradient has been applied.
    threading.Timer(0.2, desk.other_pushes, (0,)).start()

    desk.worker.skip()

    assert desk.covered[-1] == tuple(second)
    assert (third[0], third[0] + 1) == (second[0] + 1, desk.ledger.applied()[-1][1])
    desk.worker.close()


def test_the_next_batch_begins_while_a_payload_is_on_its_way() -> None:
    taken = threading.Event()

    def slow_network(message: Message) -> None:
        if isinstance(message, wire.Push):
            assert taken.wait(20.0)

    desk = Desk(fault=slow_network)
    desk.batch()
    desk.worker.step(0)
    desk.batch()
    version_before = desk.holder.version
    taken.set()
    desk.worker.step(0)
    desk.worker.finish_segment()

    assert version_before == 0
    assert desk.holder.version == 2
    desk.worker.close()


def test_a_lost_connection_that_is_found_in_the_background_names_the_culprit() -> None:
    def lost(message: Message) -> None:
        if isinstance(message, wire.Push):
            desk.latch.trip(RunFailure(OTHER, "its process was killed by SIGKILL"))
            raise ChannelClosedError("connection closed")

    desk = Desk(fault=lost)
    desk.batch()
    desk.worker.step(0)

    with pytest.raises(WorkerFailedError, match="rank 1 failed: its process was killed by SIGKILL"):
        desk.worker.finish_segment()
