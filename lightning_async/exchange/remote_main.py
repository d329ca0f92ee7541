"""What runs in the holder's own process: one `HolderService`, and rank 0's calls to it.

Started by `remote_service.py`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lightning_async.exchange.child_process import READY
from lightning_async.exchange.last_state import LastState
from lightning_async.exchange.leaving import Leaving
from lightning_async.exchange.local_service import HolderService
from lightning_async.exchange.service import HolderSpec
from lightning_async.exchange.shared_payload import SharedPayload, unpack
from lightning_async.holder.rebuild import assemble
from lightning_async.holder.types import Update
from lightning_async.runtime.failure import FailureLatch, say
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.prctl import signal_at_parents_end
from lightning_async.transport.connection import ControlConnection

__all__ = ["RpcServer", "UpdateBuffer", "main"]

log = logging.getLogger(__name__)

# Rank 0 takes the news of many updates at once, which costs its training less than each of them by itself.
_NEWS_EVERY_S = 0.05
# Calls that are not the service's own: what they take or return is large, or they are about this process.
_CALLS_OF_ITS_OWN = (
    "begin",
    "serve",
    "load_parameters",
    "load_states",
    "optimizer_state",
    "take_adapted",
    "snapshot",
    "forget",
    "restore",
    "save_on_loss",
    "expect_snapshot",
    "note_saved",
)
# After these what is held is no more the state that the last snapshots of the run go with.
_BEGINS_ANEW = (
    "serve",
    "begin_epoch",
    "regroup",
    "open",
    "load_parameters",
    "load_states",
    "set_counts",
    "restore",
    "adjust",
)
_LOOK_S = 0.2
# Longer than any disk takes to write what is held.
_LAST_WRITE_S = 120.0


class UpdateBuffer:
    """Tells rank 0 of updates, many at a time.

    Args:
        send: takes what is to be told; called by one thread at a time.
    """

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send
        self._notes: deque[Any] = deque()
        self._any = threading.Event()
        self.sending = threading.RLock()

    def note(self, update: Update, tickets: tuple[int, ...]) -> None:
        """Keeps an update for the next telling; called under the holder's lock."""
        push = update.push
        self._notes.append(
            (
                # No gradients, which are large; the hyperparameters are mostly one and the same tuple.
                tuple(push._replace(gradients=(), flat=None)),
                (
                    *(update.version, update.staleness, update.applied, update.parked_s),
                    *(update.at_ns, update.took_ns, update.rejected),
                ),
                tickets,
            )
        )
        self._any.set()

    def note_refused(self) -> None:
        """Keeps that a connection or a request was refused."""
        self._notes.append(None)
        self._any.set()

    def tell_lost(self, worker: int, reason: str) -> None:
        """Sends that a worker's connection was lost."""
        with self.sending:
            self._send(("lost", 0, (worker, reason)))

    def tell(self) -> None:
        """Sends what there is."""
        with self.sending:
            self._any.clear()
            notes = []
            while self._notes:
                notes.append(self._notes.popleft())
            if notes:
                self._send(("updates", 0, notes))

    def keep_telling(self) -> None:
        """Tells every now and then, for as long as rank 0 is there."""
        try:
            while True:
                self._any.wait()
                time.sleep(_NEWS_EVERY_S)
                self.tell()
        except OSError:
            # Rank 0 is gone; the main thread sees that too.
            return


class RpcServer:
    """Answers rank 0's calls.

    Args:
        buffer: tells rank 0 of updates.
        heartbeat: rank 0's end is watched by it.
    """

    def __init__(self, buffer: UpdateBuffer, heartbeat: socket.socket) -> None:
        self._buffer = buffer
        self._heartbeat = heartbeat
        self._latch = FailureLatch()
        self._listener: Listener | None = None
        self._service: HolderService | None = None
        self._shared_payload: SharedPayload | None = None
        self.leaving = Leaving(self._last_state)

    def begin(self, rank_0s: str, world_size: int) -> str:
        """Begins to give signs of life and opens a listener beside rank 0's, of the same run; returns its address."""
        address = Address.from_json(rank_0s)
        timeout_s = address.timeout_s
        heartbeats = Heartbeats(0, self._latch, timeout_s, lambda rank: "its process is gone")
        heartbeats.add(0, ControlConnection(self._heartbeat))
        # Rank 0's listener takes the ranks' heartbeats.
        self._listener = Listener(address.host, world_size, None, timeout_s, address.token)
        self._listener.admits_rank_0 = True
        return self._listener.address.as_json()

    def serve(self, shared_payload: str, goes_on: bool = False) -> None:
        """Holds what the shared payload says, and serves workers; the predecessor was closed.

        Raises:
            ValueError: if the optimizers cannot be rebuilt here.
        """
        dtype, parts, options, world_size, version, origins, states = _unpack_held(shared_payload)
        torch.set_default_dtype(dtype)
        optimizers = [assemble(kind, attributes) for kind, attributes in parts]
        spec = HolderSpec(optimizers, options, world_size, version, origins, states)
        self._service = HolderService(
            spec,
            self._latch,
            self._listener,
            self._buffer.note,
            self._buffer.note_refused,
            predecessor=self._service,
            on_lost=self._buffer.tell_lost if goes_on else None,
        )

    def load_parameters(self, shared_payload: str) -> None:
        """Takes over the parameters in a shared payload."""
        self.service.load_parameters(unpack(shared_payload))

    def load_states(self, shared_payload: str) -> None:
        """Takes over the optimizer states in a shared payload."""
        self.service.load_states(unpack(shared_payload))

    def save_on_loss(self, snapshot: str, segment: str) -> bool:
        """Has what is held left beside ``snapshot`` if rank 0 is lost."""
        # Rank 0's end is not this process's any more, which looks for it itself; also if it is stopped then.
        signal_at_parents_end(signal.SIGCONT)
        self.leaving.begin_segment(Path(snapshot), segment)
        return True

    def expect_snapshot(self, segment: str) -> None:
        """The segment's snapshot is being written."""
        self.leaving.expect_snapshot(segment)

    def note_saved(self, segment: str) -> None:
        """The segment's snapshot is on the disk."""
        self.leaving.note_saved(segment)

    def _last_state(self, segment: str) -> LastState:
        service = self.service
        snapshot = service.snapshot()
        views = [service.layout.views(snapshot.parameters, index) for index in range(len(snapshot.adapted))]
        return LastState.of(segment, snapshot, views)

    def optimizer_state(self, index: int) -> str:
        """One optimizer's state, as the address of a shared payload, which lasts until `forget`."""
        return self._keep(self.service.optimizer_state(index))

    def take_adapted(self) -> str:
        """What steps have changed in the param groups, as the address of a shared payload."""
        return self._keep(self.service.take_adapted())

    def snapshot(self) -> str:
        """A snapshot, as the address of a shared payload, which lasts until `forget`."""
        return self._keep(self.service.snapshot())

    def _keep(self, value: Any) -> str:
        self.forget()
        self._shared_payload = SharedPayload(value)
        return self._shared_payload.address

    def forget(self) -> None:
        """Lets go of the last snapshot's shared_payload."""
        if self._shared_payload is not None:
            self._shared_payload.close()
            self._shared_payload = None

    def restore(self, version: int, shared_payload: str) -> bool:
        """Loads the version, and what is in a shared payload: optimizer states, gathered gradients, policy."""
        return self.service.restore(version, *unpack(shared_payload))

    @property
    def service(self) -> HolderService:
        """What rank 0 is served by."""
        assert self._service is not None
        return self._service

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Does what rank 0 asks for."""
        if name in _BEGINS_ANEW:
            self.leaving.end_segment()
        return getattr(self if name in _CALLS_OF_ITS_OWN else self.service, name)(*arguments)


def main(control: int, heartbeat: int) -> None:
    """Serves until rank 0 says that it is over, or is gone.

    Args:
        control: descriptor of the connection that calls come by.
        heartbeat: descriptor of the heartbeat's socket.
    """
    torch.set_num_threads(1)
    connection = Connection(control)
    buffer = UpdateBuffer(connection.send)
    rpc_server, rank_0 = RpcServer(buffer, socket.socket(fileno=heartbeat)), os.getppid()
    try:
        connection.send(READY)
        threading.Thread(target=buffer.keep_telling, name="updates", daemon=True).start()
        while True:
            while not connection.poll(_LOOK_S):
                # What rank 0 has forked has its end of the connection, too, which may then stay open.
                if os.getppid() != rank_0:
                    raise EOFError("its process is gone")
            name, number, arguments = connection.recv()
            if name == "end":
                rpc_server.leaving.release()
                break
            if name == "leave":
                _leave_state(rpc_server)
                break
            _answer(rpc_server, buffer, connection, name, number, arguments)
    except (EOFError, OSError) as error:
        log.debug("rank 0 is gone: %s", error)
        _leave_state(rpc_server)
    sys.stderr.flush()
    # Threads may be in the middle of torch's code, and would abort the process on its way out.
    os._exit(0)


def _leave_state(rpc_server: RpcServer) -> None:
    # Nobody would end this process if its disk does not answer.
    threading.Thread(target=_exit_late, name="exit", daemon=True).start()
    try:
        rpc_server.leaving.write()
    except Exception as error:
        # Snapshots of the run are what is left: half an update, say, is nothing to go on with.
        say(0, f"what the holder's process had is not left for the job's next start: {error!r}")


def _exit_late() -> None:
    time.sleep(_LAST_WRITE_S)
    os._exit(1)


def _answer(
    rpc_server: RpcServer,
    buffer: UpdateBuffer,
    connection: Connection,
    name: str,
    number: int,
    arguments: tuple[Any, ...],
) -> None:
    try:
        kind, value = "answer", rpc_server.answer(name, arguments)
    except Exception as error:
        kind, value = "error", _portable(error)
    with buffer.sending:
        buffer.tell()
        connection.send((kind, number, value))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent."""
    try:
        same: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return same


def _unpack_held(shared_payload: str) -> Any:
    try:
        return unpack(shared_payload)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f'holder="process" cannot rebuild the optimizer or the staleness policy in the holder\'s process: {error}. '
            'Define it in a module that can be imported, or take holder="thread"'
        ) from error
