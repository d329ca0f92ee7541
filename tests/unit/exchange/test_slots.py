"""A worker with two slots: what it has drawn and pushed stays in order while an exchange is under way."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.types import Push
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.transport import message as wire
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.fake import Fault
from lightning_async.transport.message import Message
from tests.harness import Exchange

pytestmark = pytest.mark.timeout(30)
OTHER = 1


class Slots:
    """A worker whose two slots end in sessions in threads of their own, and another that pushes behind its back."""

    def __init__(
        self, barrier: StalenessBarrier | None = None, in_background: bool = True, fault: Fault | None = None
    ) -> None:
        self.exchange = Exchange([2], tickets=10, barrier=barrier)
        self.exchange.ledger.draw(OTHER)
        self.served = [self.exchange.serve(0, slot, fault) for slot in (0, 1)]
        for one in self.served:
            one.channel.serves_any_thread = in_background
        self.worker = self.exchange.worker(0, *[one.channel for one in self.served])

    def other_pulls(self, worker: int = OTHER) -> None:
        assert self.exchange.holder.try_pull(worker, torch.empty(2)) == 0

    def other_pushes(self, worker: int = OTHER) -> None:
        assert self.exchange.holder.try_push(Push(worker, 0, 0, [torch.ones(2)], ())) is not None

    def batch(self) -> list[int]:
        tickets = list(self.worker.draw())
        self.worker.begin_batch(samples=1)
        self.exchange.parameters[0][0].grad = torch.ones(2)
        return tickets

    def close(self) -> None:
        self.worker.close()
        assert [one.ended() for one in self.served] == [None, None]


both_ways = pytest.mark.parametrize("in_background", [True, False], ids=["in the background", "by the training thread"])


@both_ways
def test_every_batch_is_covered_by_the_push_of_its_own_gradient(in_background: bool) -> None:
    slots = Slots(in_background=in_background)
    drawn = []
    for _ in range(5):
        drawn.append(tuple(slots.batch()))
        slots.worker.step(0)
    slots.worker.stop_dispatch()
    slots.worker.finish_segment()

    assert slots.exchange.covered[0] == drawn
    assert slots.exchange.holder.version == 5
    slots.close()


@both_ways
def test_a_hand_out_that_is_closed_leaves_no_ticket_behind(in_background: bool) -> None:
    slots = Slots(in_background=in_background)
    for _ in range(2):
        slots.batch()
        slots.worker.step(0)

    slots.worker.stop_dispatch()

    assert not slots.worker.draw()
    slots.worker.finish_segment()
    assert slots.exchange.ledger.leased(0) == 0
    # The two batches that were pushed, and what is left for the next segment: all but them and the other rank's.
    assert slots.exchange.ledger.progress() == (2, 7)
    slots.close()


@both_ways
def test_a_batch_without_a_gradient_is_reported_after_the_push_of_an_older_one(in_background: bool) -> None:
    slots = Slots(StalenessBarrier(2), in_background)
    slots.other_pulls()
    # Somebody else's update: from now on the other rank's version is the oldest.
    slots.other_pulls(2)
    slots.other_pushes(2)
    slots.batch()
    slots.worker.step(0)
    second = slots.batch()
    slots.worker.step(0)
    third = slots.batch()
    # The second push waits at the barrier until the other rank's gradient has been applied.
    threading.Timer(0.2, slots.other_pushes).start()

    slots.worker.skip()

    assert slots.exchange.covered[0][-1] == tuple(second)
    assert (third[0], third[0] + 1) == (second[0] + 1, slots.exchange.ledger.applied()[-1][1])
    slots.close()


def test_the_next_batch_begins_while_a_payload_is_on_its_way() -> None:
    taken = threading.Event()

    def slow_network(message: Message) -> None:
        if isinstance(message, wire.Push):
            assert taken.wait(20.0)

    slots = Slots(fault=slow_network)
    slots.batch()
    slots.worker.step(0)
    slots.batch()
    version_before = slots.exchange.holder.version
    taken.set()
    slots.worker.step(0)
    slots.worker.finish_segment()

    assert version_before == 0
    assert slots.exchange.holder.version == 2
    slots.close()


def test_a_lost_connection_that_is_found_in_the_background_names_the_culprit() -> None:
    def lost(message: Message) -> None:
        if isinstance(message, wire.Push):
            slots.exchange.latch.trip(RunFailure(OTHER, "its process was killed by SIGKILL"))
            raise ChannelClosedError("connection closed")

    slots = Slots(fault=lost)
    slots.batch()
    slots.worker.step(0)

    with pytest.raises(WorkerFailedError, match="rank 1 failed: its process was killed by SIGKILL"):
        slots.worker.finish_segment()
