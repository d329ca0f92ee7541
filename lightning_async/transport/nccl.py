"""The NCCL data channel: payloads from GPU to GPU, over a communicator of two ranks that belongs to this worker alone.

NCCL has no tags and no any-source, a communicator must not be used by two threads, both sides must issue matching
operations in the same order, and a side whose peer has died waits for ever unless the communicator is aborted. So each
communicator has one thread that issues everything (`NcclExecutor`), both sides post a payload only behind its message,
a thread that waits has a deadline and watches the control connection, and after any error the communicator is aborted
and not used again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Message
from lightning_async.transport.readiness import say_ready, wait_until_ready

__all__ = [
    "CONNECT_TIMEOUT_S",
    "HOLDER_SIDE",
    "WORKER_SIDE",
    "Communicator",
    "NcclChannel",
    "NcclCommunicator",
    "NcclExecutor",
    "nccl_communicator",
]

HOLDER_SIDE, WORKER_SIDE = 0, 1
CONNECT_TIMEOUT_S = 60.0
# A payload is posted by both sides within a round trip of its message, so its deadline is that of a slow network.
_PAYLOAD_BASE_S = 10.0
_SLOWEST_BYTES_PER_S = 10e6
# How often a thread that waits for a payload looks whether its peer is still there.
_LOOK_S = 0.1
# How long an aborted communicator's call may take to return.
_ABORT_S = 5.0
# Held by the thread that has changed the environment for a moment.
_ENVIRONMENT = threading.Lock()
_OWN_ENVIRONMENT = {
    # By default the watchdog ends the whole process when one communicator is lost, which here is the loss of one
    # worker, and is dealt with elsewhere.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # That sends and receives follow one another is what is wanted here.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
}


class Communicator(Protocol):
    """Two ranks that send to and receive from each other, in the order in which both issue it.

    `mark` and `abort` may be called from any thread, everything else from one thread only.
    """

    def mark(self) -> Any:
        """What the calling thread has queued on the device so far, for `send` and `recv` to come after."""

    def connect(self) -> None:
        """Waits for the other side; nothing else may be called before."""

    def send(self, tensor: Tensor, after: Any) -> None:
        """Queues a send behind a mark."""

    def recv(self, tensor: Tensor, after: Any) -> None:
        """Queues a receive behind a mark."""

    def synchronize(self) -> None:
        """Waits until everything queued has ended."""

    def abort(self) -> None:
        """Ends everything that is queued or waits; the communicator cannot be used again. Idempotent."""


class NcclCommunicator(Communicator):
    """`Communicator` over torch's ``ProcessGroupNCCL``, built directly, without ``init_process_group``.

    Args:
        store: where the two sides find each other; shared by all workers.
        name: unique name of this worker's incarnation.
        side: 0 or 1.
        device: this side's GPU.
    """

    def __init__(self, store: Store, name: str, side: int, device: torch.device) -> None:
        self._store = PrefixStore(name, store)
        self._store.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
        self._side = side
        self._device = device
        self._group: Any = None
        self._stream: Any = None
        self._lock = threading.Lock()
        self._aborted = False

    @override
    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    @override
    def connect(self) -> None:
        # Which device and stream are current is a matter of the thread, and this one is the communicator's own.
        torch.cuda.set_device(self._device)
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(self._device)
        torch.cuda.set_stream(self._stream)
        # Known to torch only where it was built with NCCL.
        nccl: Any = torch.distributed.ProcessGroupNCCL
        options = nccl.Options(is_high_priority_stream=True)
        # Later than every deadline here: torch's own watchdog must not be the first to act.
        options._timeout = timedelta(hours=1)
        with self._lock:
            if self._aborted:
                raise ChannelClosedError("the communicator was aborted")
            with _own_environment():
                self._group = nccl(self._store, self._side, 2, options)
        self._group.eager_connect_single_device(self._device)
        # Some versions of torch make another communicator for the first message between two ranks.
        greeting = torch.full((1,), float(self._side), device=self._device)
        for sender in (0, 1):
            post = self._group.send if sender == self._side else self._group.recv
            post([greeting if sender == self._side else torch.empty_like(greeting)], 1 - self._side, 0).wait()
        self.synchronize()

    @override
    def send(self, tensor: Tensor, after: Any) -> None:
        self._stream.wait_event(after)
        self._group.send([tensor], 1 - self._side, 0).wait()

    @override
    def recv(self, tensor: Tensor, after: Any) -> None:
        self._stream.wait_event(after)
        self._group.recv([tensor], 1 - self._side, 0).wait()

    @override
    def synchronize(self) -> None:
        # The group's `wait` has only made this stream wait. A blocking event lets the thread sleep instead of spin.
        cuda: Any = torch.cuda
        done = cuda.Event(blocking=True)
        done.record(self._stream)
        done.synchronize()

    @override
    def abort(self) -> None:
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            group = self._group
        if group is not None:
            group.abort()


def nccl_communicator(store: Store, name: str, side: int, device: torch.device) -> Communicator:
    """A communicator that is not connected yet; see `NcclCommunicator`."""
    return NcclCommunicator(store, name, side, device)


class NcclExecutor:
    """A communicator and the one thread that issues its operations.

    Args:
        communicator: not connected yet; owned from here on.
        name: of the thread.
    """

    def __init__(self, communicator: Communicator, name: str) -> None:
        self._communicator = communicator
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], concurrent.futures.Future[None]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._issue, name=name, daemon=True)
        self._thread.start()

    def connect(self, timeout_s: float, peer_has_left: Callable[[], bool]) -> None:
        """Connects the communicator.

        Raises:
            ChannelClosedError: if that fails or the peer does not come in time; the executor is of no use then.
        """
        try:
            self._run(self._communicator.connect, timeout_s, peer_has_left)
        except ChannelClosedError:
            # Whoever is next must not connect while this thread does.
            self._thread.join(_ABORT_S)
            raise

    def send(self, payload: Tensor, peer_has_left: Callable[[], bool]) -> None:
        """Sends a payload behind what the calling thread has queued on the device; returns when it is taken.

        Raises:
            ChannelClosedError: if the peer leaves or does not take it in time.
        """
        self._transfer(self._communicator.send, payload, peer_has_left)

    def receive(self, out: Tensor, peer_has_left: Callable[[], bool]) -> None:
        """Receives a payload behind what the calling thread has queued on the device; returns when it is there.

        Raises:
            ChannelClosedError: if the peer leaves or does not deliver in time.
        """
        self._transfer(self._communicator.recv, out, peer_has_left)

    def abort(self) -> None:
        """Ends whatever is under way, in any thread, and the issuing thread; idempotent."""
        with self._lock:
            if self._aborted.is_set():
                return
            self._aborted.set()
        self._jobs.put(None)
        self._communicator.abort()

    def _transfer(self, post: Callable[[Tensor, Any], None], tensor: Tensor, peer_has_left: Callable[[], bool]) -> None:
        after = self._communicator.mark()

        def job() -> None:
            post(tensor, after)
            self._communicator.synchronize()

        self._run(job, _PAYLOAD_BASE_S + tensor.nbytes / _SLOWEST_BYTES_PER_S, peer_has_left)

    def _run(self, job: Callable[[], None], timeout_s: float, peer_has_left: Callable[[], bool]) -> None:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            if self._aborted.is_set():
                raise ChannelClosedError("channel closed")
            self._jobs.put((job, future))
        deadline = time.monotonic() + timeout_s
        problem = ""
        while not problem:
            done, _ = concurrent.futures.wait([future], timeout=min(_LOOK_S, max(0.0, deadline - time.monotonic())))
            if done:
                problem = self._end(future)
                if not problem:
                    return
            elif peer_has_left():
                problem = "the peer is gone"
            elif self._aborted.is_set():
                problem = "channel closed"
            elif time.monotonic() >= deadline:
                problem = f"the peer did not answer within {timeout_s:.0f} s"
        self.abort()
        raise ChannelClosedError(f"NCCL: {problem}")

    def _end(self, future: concurrent.futures.Future[None]) -> str:
        error = future.exception()
        if error is not None:
            return str(error) or repr(error)
        # What was under way when the communicator was aborted ends as if it had succeeded.
        return "channel closed" if self._aborted.is_set() else ""

    def _issue(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                job()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)


class NcclChannel(Channel):
    """Messages over the control connection, payloads over a communicator of two ranks.

    Args:
        control: the connected control connection; owned from here on.
        buffers: this side's buffers, on its GPU.
        executor: connected; owned from here on.
        side: `HOLDER_SIDE` or `WORKER_SIDE`.
        late_reader: the worker may compute a batch before it takes its parameters: they are posted when it says that
            it is ready, or the send would occupy the GPU meanwhile and miss its deadline; both sides must say the same.
    """

    def __init__(
        self,
        control: ControlConnection,
        buffers: Buffers,
        executor: NcclExecutor,
        side: int = HOLDER_SIDE,
        late_reader: bool = False,
    ) -> None:
        super().__init__(buffers)
        self._control = control
        self._executor = executor
        self._side = side
        self._late_reader = late_reader

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        self._control.send(message)
        if payload is None:
            return
        if self._late_reader and self._side == HOLDER_SIDE:
            wait_until_ready(self._control)
        self._executor.send(payload, self._control.peer_has_left)

    @override
    def receive(self) -> Message:
        return self._control.receive()

    @override
    def receive_payload(self, out: Tensor) -> None:
        if self._late_reader and self._side == WORKER_SIDE:
            say_ready(self._control)
        self._executor.receive(out, self._control.peer_has_left)

    @override
    def close(self) -> None:
        self._control.shutdown()
        self._executor.abort()
        self._control.close()


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    # A process group reads these once, when it is made.
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in _OWN_ENVIRONMENT}
        os.environ.update(_OWN_ENVIRONMENT)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
