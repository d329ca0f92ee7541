"""A process of its own for what serves the workers, as rank 0 sees it: ``holder="process"``.

Rank 0's training and the updates then share neither an interpreter nor a process, and rank 0's own worker comes in by
the listener like the others. `remote_main.py` is what runs there.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.child_process import APART, START_TIMEOUT_S, ChildProcess, check_policy_can_travel
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.server import OnLost
from lightning_async.exchange.service import HolderSpec, Service, UpdateObserver
from lightning_async.exchange.shared_payload import SharedPayload, unpack
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.rebuild import dismantle
from lightning_async.holder.types import Push, Snapshot, Update
from lightning_async.policies.registry import make_policy
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.handshake import Address

__all__ = ["HolderProcess", "HolderProcessError"]

log = logging.getLogger(__name__)

_ANSWER_LASTS_S = 0.05


class HolderProcessError(RuntimeError):
    """The holder's process could not be started."""


class HolderProcess(Service):
    """Holder, ledger and server in a process of their own; a `Service`, once it was told what to hold.

    The process begins to import when this is made, and ends with `end` or with this process, however that ends. That it
    ends or stops by itself is a failure of rank 0.

    Args:
        start_timeout_s: seconds that it may take to start.
        forks: see `ChildProcess`.
    """

    def __init__(self, start_timeout_s: float = START_TIMEOUT_S, forks: bool = False) -> None:
        self._start_timeout_s = start_timeout_s
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._sender = 0
        self._waiting: dict[int, queue.SimpleQueue[tuple[str, Any]]] = {}
        self._latch: FailureLatch | None = None
        self._address: Address | None = None
        self._unfinished, self._unfinished_until = 0, 0.0
        self._on_update: UpdateObserver = lambda update, tickets: None
        self._on_refused: Callable[[], None] = lambda: None
        self._on_lost: OnLost | None = None
        self._saves = False
        self._child = ChildProcess(
            "lightning_async.exchange.remote_main", "its holder process", self._take_message, self._wake, forks=forks
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def address(self) -> Address | None:
        """Where workers come in."""
        return self._address

    def serve(
        self,
        spec: HolderSpec,
        address: Address,
        latch: FailureLatch,
        on_update: UpdateObserver,
        on_refused: Callable[[], None],
        on_lost: OnLost | None = None,
    ) -> HolderProcess:
        """Has it hold, in the place of what it held before, and serve workers.

        Args:
            spec: what to hold.
            address: of rank 0's own listener.
            latch: the run's failure latch.
            on_update: called in a thread of this process with each update, some milliseconds after it, without
                its gradients, and with the tickets that it covers; all that were answered have been told when one of
                the calls below returns.
            on_refused: called when a connection or a request is refused.
            on_lost: told which worker's connection was lost, and how; None where that ends the run.

        Raises:
            ValueError: if an optimizer cannot be sent to another process.
            HolderProcessError: if the process does not start.
        """
        self._on_update, self._on_refused, self._on_lost = on_update, on_refused, on_lost
        with _payload_of(spec) as shared_payload:
            if self._latch is None:
                self._begin(spec, address, latch)
            self._call("serve", shared_payload.address, on_lost is not None)
        return self

    @override
    def begin_epoch(self, tickets: range, block: int = 1, applied: Iterable[tuple[int, int]] = ()) -> None:
        self._unfinished_until = 0.0
        self._call("begin_epoch", tickets, block, tuple(applied))

    @override
    def evict(self, worker: int) -> int:
        return int(self._call("evict", worker))

    @override
    def let_in(self, worker: int) -> None:
        self._call("let_in", worker)

    @override
    def admit(self, worker: int) -> None:
        self._call("admit", worker)

    @override
    def regroup(self, block: int, equal_shares: bool) -> None:
        self._call("regroup", block, equal_shares)

    @override
    def open(self, tickets: int, ranks: Sequence[int] | None = None) -> None:
        self._call("open", tickets, ranks)

    @override
    def progress(self) -> tuple[int, int]:
        self._unfinished_until = 0.0
        applied, left = self._call("progress")
        return applied, left

    @override
    def unfinished(self) -> int:
        # Asked by progress bars for every batch, so the answer may be a little old.
        now = time.monotonic()
        if now >= self._unfinished_until:
            self._unfinished = int(self._call("unfinished"))
            self._unfinished_until = now + _ANSWER_LASTS_S
        return self._unfinished

    @override
    def settle(self) -> None:
        self._call("settle")

    @override
    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        with SharedPayload([[parameter.detach() for parameter in owned] for owned in parameters]) as shared_payload:
            self._call("load_parameters", shared_payload.address)

    @override
    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        if any(state is not None for state in states):
            with SharedPayload([None if state is None else dict(state) for state in states]) as shared_payload:
                self._call("load_states", shared_payload.address)

    @override
    def optimizer_state(self, index: int) -> StateByPlace:
        state: StateByPlace = self._take("optimizer_state", index)
        return state

    @override
    def take_adapted(self) -> list[list[dict[str, Any]]]:
        adapted: list[list[dict[str, Any]]] = self._take("take_adapted")
        return adapted

    @override
    def snapshot(self) -> Snapshot:
        snapshot: Snapshot = self._take("snapshot")
        return snapshot

    @override
    def complete_version(self) -> bool:
        return bool(self._call("complete_version"))

    @override
    def restore(
        self,
        version: int,
        optimizer_states: Sequence[Mapping[str, Any]],
        gathered: Gathered | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> bool:
        with SharedPayload((list(optimizer_states), gathered, policy)) as shared_payload:
            return bool(self._call("restore", version, shared_payload.address))

    @override
    def adjust(self, options: ExchangeOptions) -> None:
        self._call("adjust", options)

    @override
    def set_counts(self, counts: Sequence[int]) -> None:
        self._call("set_counts", tuple(counts))

    @override
    def save_on_loss(self, snapshot: str, segment: str) -> bool:
        self._saves = bool(self._call("save_on_loss", snapshot, segment))
        return self._saves

    @override
    def expect_snapshot(self, segment: str) -> None:
        self._call("expect_snapshot", segment)

    @override
    def note_saved(self, segment: str) -> None:
        self._call("note_saved", segment)

    @override
    def close(self) -> None:
        # The process stays, for a successor of what it spec.
        if self._latch is not None and self._latch.failure is None:
            try:
                self._call("close")
            except WorkerFailedError as error:
                # The process that was to be waited for is gone.
                log.debug("not closed in order: %s", error)

    def end(self) -> None:
        """Ends the process; idempotent."""
        self._child.end(("end", next(self._numbers), ()))

    def _begin(self, spec: HolderSpec, address: Address, latch: FailureLatch) -> None:
        if (trouble := self._child.wait_until_ready(self._start_timeout_s)) is not None:
            raise HolderProcessError(
                f'{trouble}; what it printed stands above. holder="thread" does without a process of its own'
            )
        timeout_s = spec.options.worker_timeout_s
        self._latch = latch
        self._child.watch(latch, timeout_s)
        latch.subscribe(lambda failure: self._wake())
        latch.subscribe(self._leave_state)
        self._address = Address.from_json(
            self._call("begin", replace(address, timeout_s=timeout_s).as_json(), spec.world_size)
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._latch is not None, "nothing is held yet"
        if self._child.is_read_here:
            raise RuntimeError(f"an observer of the updates may not call {name}: its own thread takes the answers")
        number = next(self._numbers)
        answers = self._waiting[number] = queue.SimpleQueue()
        try:
            if self._child.is_gone:
                self._raise_failure()
            try:
                self._send((name, number, arguments))
            except OSError:
                self._raise_failure()
            self._latch.check()
            kind, value = answers.get()
        finally:
            del self._waiting[number]
        if kind == "woken":
            self._raise_failure()
        if kind == "error":
            raise value
        return value

    def _take(self, name: str, *arguments: Any) -> Any:
        """Calls what answers with a shared payload; returns its value."""
        value = unpack(self._call(name, *arguments))
        self._call("forget")
        return value

    def _send(self, request: tuple[str, int, tuple[Any, ...]]) -> None:
        if self._sender == threading.get_ident():
            raise RuntimeError(
                f"{request[0]} was asked of the holder's process while this thread was asking for something else, "
                "which a signal's handler has interrupted. Let the handler set a flag, read in on_train_batch_end"
            )
        with self._sending:
            self._sender = threading.get_ident()
            try:
                self._child.send(request)
            finally:
                self._sender = 0

    def _raise_failure(self) -> None:
        """Raises what is known of the run's end."""
        assert self._latch is not None
        self._latch.explain_loss(
            lambda: RunFailure(0, self._child.describe_end() or "its holder process no longer answers", lost=True)
        )
        self._latch.check()

    def _leave_state(self, failure: RunFailure) -> None:
        """The run ends, and this process with it; an error of user code's would come again from what is held."""
        if self._saves and failure.rank != 0 and not failure.traced:
            with self._sending:
                self._child.let_end(("leave", next(self._numbers), ()))

    def _wake(self) -> None:
        for answers in list(self._waiting.values()):
            answers.put(("woken", None))

    def _take_message(self, message: tuple[str, int, Any]) -> None:
        kind, number, value = message
        if kind == "updates":
            self._tell(value)
        elif kind == "lost" and self._on_lost is not None:
            # It asks for an eviction, whose answer comes by this thread.
            threading.Thread(target=self._on_lost, args=value, name="lost", daemon=True).start()
        elif (answers := self._waiting.get(number)) is not None:
            answers.put((kind, value))

    def _tell(self, news: Sequence[tuple[Any, ...] | None]) -> None:
        try:
            for note in news:
                if note is None:
                    self._on_refused()
                    continue
                push, update, tickets = note
                self._on_update(Update(Push(*push), *update), tickets)
        except Exception as error:
            # An observer's; its user must not be left to believe that nothing has happened.
            log.error("the news of an update could not be told", exc_info=error)
            if self._latch is not None:
                self._latch.trip(RunFailure(0, f"an observer of the updates failed: {error!r}"))


def _payload_of(spec: HolderSpec) -> SharedPayload:
    check_policy_can_travel(make_policy(spec.options.staleness_policy), *APART)
    kinds = [type(optimizer) for optimizer in spec.optimizers]
    try:
        if any(kind.__module__ == "__main__" for kind in kinds):
            raise pickle.PicklingError("it is defined in the script itself, which is not run there")
        parts = [dismantle(optimizer) for optimizer in spec.optimizers]
        states = [None if state is None else dict(state) for state in spec.states]
        how = (spec.options, spec.world_size, spec.version, spec.origins, states)
        return SharedPayload((torch.get_default_dtype(), parts, *how))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        names = " and ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f'holder="process" sends the optimizer to another process, and {names} cannot go there: {error}. '
            'Define it in a module that can be imported, or take holder="thread"'
        ) from error
