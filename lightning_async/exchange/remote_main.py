"""What runs in the holder's own process: one `HolderService`, and rank 0's calls to it.

Started by `remote_service.py`.
"""

from __future__ import annotations

import ctypes
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
from typing import Any

import torch

from lightning_async.exchange.service import Held, HolderService
from lightning_async.exchange.shared_payload import Parcel, unpack
from lightning_async.holder.holder import Update
from lightning_async.holder.rebuild import assemble
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.heartbeat import Lifelines
from lightning_async.runtime.listener import FrontDoor
from lightning_async.transport.connection import ControlConnection

__all__ = ["Desk", "News", "main"]

log = logging.getLogger(__name__)

# Rank 0 takes the news of many updates at once, which costs its training less than each of them by itself.
_NEWS_EVERY_S = 0.05
# Calls that are not the service's own: what they take or return is large.
_BY_PARCEL = (
    "begin",
    "serve",
    "adopt",
    "adopt_states",
    "optimizer_state",
    "take_adapted",
    "snapshot",
    "forget",
    "restore",
)
# Of linux/prctl.h.
_PR_SET_PDEATHSIG = 1


class News:
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
                # No gradients, which are large; the hyper-parameters are mostly one and the same tuple.
                tuple(push._replace(gradients=())),
                (update.version, update.staleness, update.applied, update.parked_s, update.at_ns),
                tickets,
            )
        )
        self._any.set()

    def note_refused(self) -> None:
        """Keeps that a connection or a request was refused."""
        self._notes.append(None)
        self._any.set()

    def tell(self) -> None:
        """Sends what there is."""
        with self.sending:
            self._any.clear()
            notes = []
            while self._notes:
                notes.append(self._notes.popleft())
            if notes:
                self._send(("news", 0, notes))

    def keep_telling(self) -> None:
        """Tells every now and then, for as long as there is somebody to tell."""
        try:
            while True:
                self._any.wait()
                time.sleep(_NEWS_EVERY_S)
                self.tell()
        except OSError:
            # Rank 0 is gone; the main thread sees that too.
            return


class Desk:
    """Answers rank 0's calls.

    Args:
        news: tells rank 0 of updates.
        lifeline: rank 0's end is watched by it.
    """

    def __init__(self, news: News, lifeline: socket.socket) -> None:
        self._news = news
        self._lifeline = lifeline
        self._latch = FailureLatch()
        self._door: FrontDoor | None = None
        self._service: HolderService | None = None
        self._parcel: Parcel | None = None

    def begin(self, timeout_s: float, host: str, world_size: int) -> str:
        """Ties the lifeline and opens the door; returns its address."""
        lifelines = Lifelines(0, self._latch, timeout_s, lambda rank: "its process is gone")
        lifelines.add(0, ControlConnection(self._lifeline))
        # Rank 0's door takes the ranks' lifelines.
        self._door = FrontDoor(host, world_size, None)
        self._door.rank_0_rings = True
        return self._door.address.as_json()

    def serve(self, parcel: str) -> None:
        """Holds what the parcel says, and serves workers; the predecessor was closed.

        Raises:
            ValueError: if the optimizers cannot be rebuilt here.
        """
        dtype, parts, options, world_size, version, origins, states = _unpack_held(parcel)
        torch.set_default_dtype(dtype)
        optimizers = [assemble(kind, attributes) for kind, attributes in parts]
        held = Held(optimizers, options, world_size, version, origins, states)
        self._service = HolderService(
            held, self._latch, self._door, self._news.note, self._news.note_refused, predecessor=self._service
        )

    def adopt(self, parcel: str) -> None:
        """See `Service.adopt`."""
        self.service.adopt(unpack(parcel))

    def adopt_states(self, parcel: str) -> None:
        """See `Service.adopt_states`."""
        self.service.adopt_states(unpack(parcel))

    def optimizer_state(self, index: int) -> str:
        """See `Service.optimizer_state`; returns the address of a parcel, as `snapshot` does."""
        return self._keep(self.service.optimizer_state(index))

    def take_adapted(self) -> str:
        """See `Service.take_adapted`; returns the address of a parcel, as `snapshot` does."""
        return self._keep(self.service.take_adapted())

    def snapshot(self) -> str:
        """See `Service.snapshot`; returns the address of a parcel, which lasts until `forget`."""
        return self._keep(self.service.snapshot())

    def _keep(self, value: Any) -> str:
        self.forget()
        self._parcel = Parcel(value)
        return self._parcel.address

    def forget(self) -> None:
        """Lets go of the last snapshot's parcel."""
        if self._parcel is not None:
            self._parcel.close()
            self._parcel = None

    def restore(self, version: int, parcel: str) -> bool:
        """See `Service.restore`."""
        return self.service.restore(version, unpack(parcel))

    @property
    def service(self) -> HolderService:
        """What rank 0 is served by."""
        assert self._service is not None
        return self._service

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Does what rank 0 asks for."""
        return getattr(self if name in _BY_PARCEL else self.service, name)(*arguments)


def main(control: int, lifeline: int, rank_0: int) -> None:
    """Serves until rank 0 says that it is over, or is gone.

    Args:
        control: descriptor of the connection that calls come by.
        lifeline: descriptor of the lifeline's socket.
        rank_0: rank 0's process id.
    """
    _end_with_parent()
    if os.getppid() != rank_0:
        os._exit(1)
    torch.set_num_threads(1)
    connection = Connection(control)
    news = News(connection.send)
    desk = Desk(news, socket.socket(fileno=lifeline))
    try:
        connection.send(("ready", 0, None))
        threading.Thread(target=news.keep_telling, name="news", daemon=True).start()
        while True:
            name, number, arguments = connection.recv()
            if name == "end":
                break
            _answer(desk, news, connection, name, number, arguments)
    except (EOFError, OSError) as error:
        log.debug("rank 0 is gone: %s", error)
    sys.stderr.flush()
    # Threads may be in the middle of Gloo's code, and would abort the process on its way out.
    os._exit(0)


def _end_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends, even if it is stopped then.

    The end of the connection would not do: whoever rank 0 has forked has its end of it too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _answer(desk: Desk, news: News, connection: Connection, name: str, number: int, arguments: tuple[Any, ...]) -> None:
    try:
        kind, value = "answer", desk.answer(name, arguments)
    except Exception as error:
        kind, value = "error", _portable(error)
    with news.sending:
        news.tell()
        connection.send((kind, number, value))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent."""
    try:
        same: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return same


def _unpack_held(parcel: str) -> Any:
    try:
        return unpack(parcel)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f'holder="process" cannot rebuild the optimizer in the holder\'s process: {error}. Define it in a module '
            'that can be imported, or take holder="thread"'
        ) from error
