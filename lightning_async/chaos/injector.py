"""The callback that lets faults strike: in the module's methods, in the exchange, and where the ranks meet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_async.chaos.fault import PLACES, Counter, Fault
from lightning_async.exchange import engine
from lightning_async.runtime.meeting import Meeting, MeetingGuest
from lightning_async.strategies.strategy import AsyncStrategy
from lightning_async.transport.base import Channel
from lightning_async.transport.message import Draw, Message, Parameters, Push

__all__ = ["FaultInjector"]

_COLLECTIVES = ("all_gather", "all_reduce", "barrier", "broadcast", "all_gather_object")


class FaultInjector(Callback):
    """Lets faults strike the ranks that they are meant for, for tests of how a run bears them.

    Methods are replaced on the objects of one fit, in the rank's own process: one injector serves every way of starting
    ranks. A rank without a fault is left as it is. With another strategy than this package's, faults of the
    LightningModule's methods strike; the other places do not exist there.

    Args:
        faults: what goes wrong.

    Examples:
        ::

            strategy = AsyncAMSGradStrategy(on_worker_failure="continue")
            callbacks = [FaultInjector([Fault(rank=2, step=20, kind="kill", place="mid-push")])]
            Trainer(strategy=strategy, devices=4, callbacks=callbacks).fit(module)
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        self._counters: dict[str, Counter] = {}
        self._armed_worker: object = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        ours = isinstance(strategy, AsyncStrategy)
        rank, incarnation = trainer.global_rank, 0
        if ours:
            rank, incarnation = strategy.worker_rank, strategy.membership.incarnation
        mine = [fault for fault in self.faults if (fault.rank, fault.incarnation) == (rank, incarnation)]
        places = dict.fromkeys(fault.place for fault in mine)
        self._counters = {place: Counter([fault for fault in mine if fault.place == place]) for place in places}
        self._pass("setup")
        if "compute" in self._counters:
            pl_module.training_step = self._before("compute", pl_module.training_step)  # type: ignore[method-assign]
        for place in self._counters.keys() - PLACES.keys():
            setattr(pl_module, place, self._before(place, getattr(pl_module, place)))
        if ours:
            self._arm(strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._arm_worker(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where user code has changed the optimizers it is another one.
        self._arm_worker(trainer)

    def _pass(self, place: str) -> None:
        if (counter := self._counters.get(place)) is not None:
            counter.pass_by()

    def _before(self, place: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which passes ``place`` before each call."""

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._pass(place)
            return method(*args, **kwargs)

        return wrapper

    def _after(self, place: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which passes ``place`` after each call."""

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._pass(place)
            return result

        return wrapper

    # --- where the ranks meet, and how one comes in -------------------------------------------------------------------

    def _arm(self, strategy: Any) -> None:
        if self._counters.keys() & {"meeting", "met"}:
            if strategy.meeting is not None:
                self._arm_meeting(strategy.meeting)
            meet_by = strategy.meet_by

            def arming(meeting: Meeting | None, *args: Any, **kwargs: Any) -> None:
                if meeting is not None:
                    self._arm_meeting(meeting)
                meet_by(meeting, *args, **kwargs)

            strategy.meet_by = arming
        if "group" in self._counters:
            strategy._reform = self._before("group", strategy._reform)
        if "collective" in self._counters:
            for name in _COLLECTIVES:
                setattr(dist, name, self._before("collective", getattr(dist, name)))
        request = strategy.membership.joining
        if request is not None and "handshake" in self._counters:
            self._pass("handshake")
            dialling: Any = engine
            dialling.dial = self._after("handshake", dialling.dial)
            request.fetch_state = self._after("handshake", request.fetch_state)
            request.come_in = self._after("handshake", request.come_in)

    def _arm_meeting(self, meeting: Meeting) -> None:
        if isinstance(meeting, MeetingGuest) and "met" in self._counters:
            connection: Any = meeting._connection
            connection.send_encoded = self._after("met", connection.send_encoded)
        if "meeting" in self._counters:
            meeting.gather = self._before("meeting", meeting.gather)  # type: ignore[method-assign]

    # --- the exchange -------------------------------------------------------------------------------------------------

    def _arm_worker(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if not self._counters or not isinstance(strategy, AsyncStrategy) or strategy.engine is None:
            return
        worker = strategy.worker
        if worker is not self._armed_worker:
            self._armed_worker = worker
            for channel in worker.channels:
                self._arm_channel(channel)

    def _arm_channel(self, channel: Channel) -> None:
        untyped: Any = channel
        send, receive = channel.send, channel.receive
        if "mid-push" in self._counters and (control := getattr(channel, "_control", None)) is not None:
            self._arm_control(control)

        def sending(message: Message, payload: Any = None) -> None:
            if isinstance(message, Push):
                self._pass("push")
            send(message, payload)
            if isinstance(message, Draw):
                self._pass("draw")
            elif isinstance(message, Push):
                self._pass("parked")

        def receiving() -> Message:
            message = receive()
            if isinstance(message, Parameters):
                self._pass("mid-pull")
            return message

        untyped.send, untyped.receive = sending, receiving

    def _arm_control(self, control: Any) -> None:
        say, say_with_payload = control.send, control.send_payload

        def announcing(message: Message) -> None:
            say(message)
            if isinstance(message, Push):
                self._pass("mid-push")

        def announcing_with_payload(message: Message | None, payload: memoryview, *rest: Any) -> None:
            if not isinstance(message, Push):
                say_with_payload(message, payload, *rest)
                return
            half = len(payload) // 2
            say_with_payload(message, payload[:half], *rest)
            self._pass("mid-push")
            say_with_payload(None, payload[half:], *rest)

        control.send, control.send_payload = announcing, announcing_with_payload
