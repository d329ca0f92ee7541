"""The worker: a rank's side of the exchange: draws tickets, pushes gradients, installs fresh parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from lightning_async.exchange.drawn_tickets import DrawnTickets
from lightning_async.exchange.slot import Observation, RequestRefusedError, Slot
from lightning_async.exchange.turns import OverlappedTurns, SerialTurns, Turns
from lightning_async.holder.finite import all_finite
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.layout import FlatLayout, exchanged_parameters
from lightning_async.holder.tally import Tally
from lightning_async.runtime.failure import FailureLatch
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.message import Ack, Close, Draw, Push, Release, Skip, Tickets

__all__ = ["RequestRefusedError", "Worker"]


class Worker:
    """One rank's view of the holder.

    Fresh parameters install at a step boundary only, while this rank waits for them: writing them while a forward or
    backward runs would silently falsify the gradient.

    With one channel a step waits for its answer (`SerialTurns`). With two, the slots take turns (`OverlappedTurns`).

    Args:
        rank: this rank.
        channels: the worker's end of its channel, or of two.
        layout: where each parameter lies.
        optimizers: the module's optimizers, in the layout's order; read for gradients and hyperparameters.
        latch: the run's failure latch.
        alone: whether it is the holder's only worker, so that a step changes the parameters of its optimizer alone.
        tickets: those that the worker has which this one takes the place of.
        looks_for_nonfinite: whether it looks for NaN and infinity in each gradient, for the holder to reject.
    """

    def __init__(
        self,
        rank: int,
        channels: Channel | Sequence[Channel],
        layout: FlatLayout,
        optimizers: Sequence[torch.optim.Optimizer],
        latch: FailureLatch,
        alone: bool = False,
        tickets: DrawnTickets | None = None,
        looks_for_nonfinite: bool = False,
    ) -> None:
        self.rank = rank
        self.tickets = tickets or DrawnTickets()
        self._latch = latch
        self._looks_for_nonfinite = looks_for_nonfinite
        self._hyperparams = [HyperparamReader(optimizer, HyperparamLayout(optimizer)) for optimizer in optimizers]
        self._observation = Observation()
        self._samples = 0
        self._last_wait_s = 0.0
        # With several optimizers a batch has several pushes, and only its last would have to ask.
        self._draws_with_push = len(optimizers) == 1
        owned = [exchanged_parameters(optimizer) for optimizer in optimizers]
        slots = [
            Slot(rank, channel, layout, len(optimizers), latch, self._observation)
            for channel in ([channels] if isinstance(channels, Channel) else channels)
        ]
        self._turns: Turns
        if len(slots) == 1:
            self._turns = SerialTurns(slots[0], self.tickets, owned, layout, self._observation, alone)
        else:
            self._turns = OverlappedTurns(slots, self.tickets, owned, layout, self._observation)

    @property
    def version(self) -> int:
        """Version of the parameters that the module holds."""
        return self._turns.version

    @version.setter
    def version(self, version: int) -> None:
        self._turns.version = version

    @property
    def channels(self) -> list[Channel]:
        """The worker's ends of its channels, one for each slot."""
        return [slot.channel for slot in self._turns.slots]

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has waited for the holder."""
        return self._observation.waited_s

    @property
    def on_span(self) -> Callable[[str, int, int], None] | None:
        """Called with what this rank did from when to when; see `Observation`."""
        return self._observation.on_span

    @on_span.setter
    def on_span(self, on_span: Callable[[str, int, int], None] | None) -> None:
        self._observation.on_span = on_span

    @property
    def tally(self) -> Tally | None:
        """What is counted besides updates, if anything is; see `Observation`."""
        return self._observation.tally

    @tally.setter
    def tally(self, tally: Tally | None) -> None:
        self._observation.tally = tally

    @property
    def has_unreported_batches(self) -> bool:
        """Whether batches were computed since the last push."""
        return self.tickets.has_unreported

    def begin_epoch(self) -> None:
        """Forgets the tickets that are left of an epoch that has ended early, as the ledger does."""
        self.tickets.begin_epoch()

    def draw(self) -> range:
        """Draws the next tickets; empty if this rank's segment is over."""
        if not self.tickets.waiting:
            self._turns.settle()
        tickets = self.tickets.hand_on()
        if tickets is not None:
            return tickets
        drawn = self._draw()
        self.tickets.add(drawn)
        slots = self._turns.slots
        if drawn and len(slots) > 1 and not any(slot.reading for slot in slots):
            # One for each slot; from here on every answer brings the next.
            self.tickets.add(self._draw())
        return self.tickets.hand_on() or range(0)

    def release(self, tickets: int, stream_over: bool) -> None:
        """Gives back the newest ``tickets`` that were drawn, which there are no batches for.

        Args:
            tickets: how many.
            stream_over: this rank's own stream, or loader, has ended: it draws nothing more in this epoch.
        """
        self._turns.settle()
        self._release(self.tickets.give_back(tickets), stream_over)

    def stop_dispatch(self) -> None:
        """Ends the segment for every rank once the batches that are being computed are done."""
        # More may come with an answer.
        self._turns.settle()
        self._release_waiting()
        self._turns.slot.request(Close(self.rank), Ack)

    def begin_batch(self, samples: int) -> None:
        """Notes that a batch is being computed; pulls parameters first if this rank holds none."""
        self._latch.check()
        if not self._turns.slot.reading:
            self.pull()
        self.tickets.begin_batch()
        self._samples += samples

    def leave_out(self, tickets: int) -> None:
        """Notes batches that the loader has left out: they count as done."""
        self.tickets.leave_out(tickets)

    def pull(self) -> None:
        """Installs the holder's parameters, once the barrier lets this rank read."""
        self._turns.settle()
        self._turns.pull()

    def step(self, index: int) -> bool:
        """Pushes the gradients of one optimizer and installs the parameters that come back.

        Args:
            index: the optimizer.

        Returns:
            False if the holder dropped the push as too stale or rejected it, or if no parameter has a gradient. With
            two slots that is not known yet, and a push that was sent counts as applied.

        Raises:
            WorkerFailedError: if the run has failed.
        """
        started = time.perf_counter()
        turns = self._turns
        present = turns.gather(index)
        if not any(present):
            return False
        turns.make_way()
        push = self._push_of(index, present)
        self._latch.check()
        applied = turns.push(push)
        self._last_wait_s = time.perf_counter() - started
        self._observation.waited_s += self._last_wait_s
        return applied

    def finish_segment(self) -> None:
        """Leaves the barrier: this rank computes nothing for a while."""
        self._turns.settle()
        self.skip()
        for slot in self._turns.slots:
            slot.finish()
        # They came with the answer to a push that ended the segment, after another rank had given them back.
        self._release_waiting()
        self.tickets.finish_segment()

    def skip(self) -> None:
        """Reports batches that gave no gradient, and gives the parameters back that nothing will be pushed for."""
        if self.tickets.has_unreported or (self.tally is not None and self.tally.has_news):
            # The oldest batches are reported first, and a push that the barrier holds back has older ones.
            self._turns.settle()
            self._turns.slot.request(Skip(self.rank, self.tickets.report(), self._observation.counts()), Ack)
            self._samples = 0
        self._turns.slot.leave()

    def settle(self) -> None:
        """Waits for the answers to what was pushed."""
        self._turns.settle()

    def refresh(self) -> None:
        """Installs the holder's parameters, past the barrier; for the synchronous phase."""
        self._turns.slot.refresh()
        self._turns.install()

    def close(self) -> None:
        """Says goodbye and closes the channel."""
        try:
            for slot in self._turns.slots:
                slot.say_goodbye()
        except ChannelClosedError:
            # The run has failed and everyone knows; there is nobody to say goodbye to.
            return
        finally:
            self._turns.close()

    def _draw(self) -> range:
        return self._turns.slot.request(Draw(self.rank), Tickets).tickets

    def _push_of(self, index: int, present: Sequence[bool]) -> Push:
        slot = self._turns.slot
        payload = slot.payloads[index]
        finite = not self._looks_for_nonfinite or all_finite(payload, slot.gradients[index], present)
        push = Push(
            self.rank,
            index,
            slot.version,
            self.tickets.report(),
            self._samples,
            self._last_wait_s,
            self._draws_with_push and self.tickets.waiting < len(self._turns.slots),
            payload.dtype,
            payload.nbytes,
            self._hyperparams[index].packed(),
            pack_bitmap(present),
            self._observation.counts(),
            finite,
        )
        self._samples = 0
        return push

    def _release(self, tickets: Sequence[range], stream_over: bool) -> None:
        self._turns.slot.request(Release(self.rank, tuple(tickets), stream_over), Ack)

    def _release_waiting(self) -> None:
        """Gives back what came with an answer and was not handed on."""
        waiting = self.tickets.give_back_waiting()
        if waiting:
            self._release(waiting, stream_over=False)
