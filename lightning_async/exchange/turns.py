"""How a worker's pushes and its batches take turns: one after the other, or overlapped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.drawn_tickets import DrawnTickets
from lightning_async.exchange.param_views import ParameterViews
from lightning_async.exchange.slot import Observation, Slot
from lightning_async.holder.layout import FlatLayout
from lightning_async.runtime.threads import Errands
from lightning_async.transport.base import Buffers
from lightning_async.transport.message import Push

__all__ = ["OverlappedTurns", "SerialTurns", "Turns"]

# How long a thread that exchanges a payload may take to see that its channel is closed.
_EXCHANGE_ENDS_S = 1.0


class Turns(Protocol):
    """Which slot a batch is computed with, and when its answer is taken.

    Attributes:
        slots: the worker's slots.
        version: version of the parameters that the module holds.
    """

    slots: Sequence[Slot]
    version: int

    @property
    def slot(self) -> Slot:
        """The slot that the next gradient goes out by."""

    def gather(self, index: int) -> list[bool]:
        """Brings one optimizer's gradients to where they are sent from; tells which of its parameters have one."""

    def make_way(self) -> None:
        """Takes what must have been answered before the next push goes out."""

    def push(self, message: Push) -> bool:
        """Sends a push of what was gathered, and installs the parameters of the next turn.

        Returns:
            False if the push was dropped as too stale, or rejected; True if that is not known yet.
        """

    def settle(self) -> None:
        """Takes all answers that are due."""

    def pull(self) -> None:
        """Installs the holder's parameters in the module, for every slot that holds none."""

    def install(self, index: int | None = None) -> None:
        """Makes the parameters that this turn's slot has read the module's own; those of one optimizer, if told."""

    def close(self) -> None:
        """Closes the channels, and gives the parameters storage of their own."""


class SerialTurns(Turns):
    """One slot: a step waits for its answer.

    Args:
        slot: the slot.
        tickets: where tickets go that an answer brings.
        owned: for each optimizer its parameters.
        layout: where each parameter lies.
        observation: told of installing.
        alone: whether a step changes the parameters of its optimizer alone.
    """

    def __init__(
        self,
        slot: Slot,
        tickets: DrawnTickets,
        owned: Sequence[Sequence[Tensor]],
        layout: FlatLayout,
        observation: Observation,
        alone: bool,
    ) -> None:
        self.slots = (slot,)
        self.version = 0
        self._slot = slot
        self._tickets = tickets
        self._views = ParameterViews(owned, layout, slot.channel.buffers)
        self._observation = observation
        self._alone = alone

    @property
    @override
    def slot(self) -> Slot:
        return self._slot

    @override
    def gather(self, index: int) -> list[bool]:
        return self._views.gather(index)

    @override
    def make_way(self) -> None:
        return

    @override
    def push(self, message: Push) -> bool:
        self._slot.push(message)
        applied = _settle(self._slot, self._tickets)
        self.install(message.optimizer if self._alone else None)
        return applied

    @override
    def settle(self) -> None:
        _settle(self._slot, self._tickets)

    @override
    def pull(self) -> None:
        if not self._slot.reading:
            self._slot.pull()
        self.install()

    @override
    def install(self, index: int | None = None) -> None:
        started = time.monotonic_ns()
        self._views.install(index)
        self.version = self._slot.version
        self._observation.tell_span("pull", started)

    @override
    def close(self) -> None:
        self._slot.close()
        self._views.release()


class OverlappedTurns(Turns):
    """Two slots that take turns.

    While the holder works on the push of one, this rank computes the next batch at the parameters that the other read
    one step earlier; payloads that travel do so in a thread of their own meanwhile, where the channel allows that. To
    the holder and its barrier each slot is a reader of its own, so the version that a gradient was computed at is the
    one that counts. The slot that read first always pushes first: else the barrier could hold its push back for the
    sake of the other one, which waits for this very answer.

    Args:
        slots: the two slots.
        tickets: where tickets go that an answer brings.
        owned: for each optimizer its parameters.
        layout: where each parameter lies.
        observation: told of installing.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        tickets: DrawnTickets,
        owned: Sequence[Sequence[Tensor]],
        layout: FlatLayout,
        observation: Observation,
    ) -> None:
        self.slots = tuple(slots)
        self.version = 0
        self._turn = 0
        self._tickets = tickets
        self._observation = observation
        # A buffer of the module's own, so that the slot that is not computed with can be filled meanwhile.
        buffers = self.slots[0].channel.buffers
        self._module_buffer = torch.empty_like(buffers.parameters)
        own = Buffers(buffers.gradient, self._module_buffer)
        self._views = ParameterViews(owned, layout, own, moves_gradients=False)
        # It sends one push after the other, and is there from the beginning: where memory is short no thread starts.
        self._exchanges = Errands("exchange")
        self._exchanges.start()

    @property
    @override
    def slot(self) -> Slot:
        return self.slots[self._turn]

    @override
    def gather(self, index: int) -> list[bool]:
        return self._views.gather(index, self.slot.gradients[index])

    @override
    def make_way(self) -> None:
        # The answer has come while this batch was computed. One push at a time keeps a worker's pushes in order.
        _settle(self.slots[1 - self._turn], self._tickets)

    @override
    def push(self, message: Push) -> bool:
        slot = self.slot
        slot.push(message, self._exchanges if slot.channel.serves_any_thread else None)
        self._turn = 1 - self._turn
        if self.slot.reading:
            self.install()
        return True

    @override
    def settle(self) -> None:
        for slot in self.slots:
            _settle(slot, self._tickets)

    @override
    def pull(self) -> None:
        for slot in self.slots:
            if not slot.reading:
                slot.pull()
        self._turn = min(range(len(self.slots)), key=lambda index: self.slots[index].version)
        self.install()

    @override
    def install(self, index: int | None = None) -> None:
        started = time.monotonic_ns()
        self._module_buffer.copy_(self.slot.channel.buffers.parameters)
        self._views.install(index)
        self.version = self.slot.version
        self._observation.tell_span("pull", started)

    @override
    def close(self) -> None:
        for slot in self.slots:
            slot.close()
        self._exchanges.close(_EXCHANGE_ENDS_S)
        self._views.release()


def _settle(slot: Slot, tickets: DrawnTickets) -> bool:
    """Takes a slot's answer, if one is due; False if its push was not applied."""
    answer = slot.take_answer()
    if answer is None:
        return True
    if answer.tickets is not None:
        tickets.add_answer(answer.tickets)
    return answer.applied
