"""Where the holder lives: rank 0's host, or rank 0's GPU with a stream of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.holder import Holder
from lightning_async.holder.types import Push, Snapshot, Update
from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.devices import DeviceFacts
from lightning_async.transport.message import Message
from lightning_async.transport.shm import SharedSegment
from lightning_async.transport.staged import on_device

__all__ = ["CudaHolderStream", "DeviceHolder", "HolderPlacement", "HolderStream"]


class HolderStream(Protocol):
    """A device's queue that only the holder uses, so that nothing of the holder's waits for rank 0's training."""

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """What the calling thread queues in this context goes into the holder's stream.

        The thread first waits until what it has queued before has been computed: otherwise that stream would have to,
        and with it every other worker. What it queues afterwards comes after the holder's work.
        """


class CudaHolderStream(HolderStream):
    """A CUDA stream as a `HolderStream`.

    Args:
        device: rank 0's GPU.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._device = device
        self._stream = cuda.Stream(device)

    @contextlib.contextmanager
    @override
    def entered(self) -> Iterator[None]:
        caller = torch.cuda.current_stream(self._device)
        if caller == self._stream:
            yield
            return
        cuda: Any = torch.cuda
        # A blocking event lets the thread sleep instead of spin.
        ready = cuda.Event(blocking=True)
        ready.record(caller)
        ready.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)


class DeviceHolder(Holder):
    """A holder on a GPU: buffers and optimizer states are there, its work has a stream of its own, snapshots copied.

    Args:
        stream: the holder's own.
        arguments: see `Holder`; the initial values are on the GPU.
    """

    def __init__(self, stream: HolderStream, *arguments: Any, **more: Any) -> None:
        self._stream = stream
        with stream.entered():
            super().__init__(*arguments, **more)

    @override
    def try_pull(self, worker: int, out: Tensor, slot: int = 0) -> int | None:
        with self._stream.entered():
            return super().try_pull(worker, out, slot)

    @override
    def try_push(
        self, push: Push, parked_s: float = 0.0, reads_next: Callable[[], bool] = lambda: False
    ) -> Update | None:
        with self._stream.entered():
            return super().try_push(push, parked_s, reads_next)

    @override
    def adjust(self, *arguments: Any) -> None:
        with self._stream.entered():
            super().adjust(*arguments)

    @override
    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        with self._stream.entered():
            super().load_parameters(parameters)

    @override
    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        with self._stream.entered():
            super().load_states(states)

    @override
    def optimizer_state(self, index: int) -> StateByPlace:
        """A copy of what one optimizer keeps, in host memory."""
        with self._stream.entered():
            state: StateByPlace = _on_host(super().optimizer_state(index))
            return state

    @override
    def take_adapted(self) -> list[list[dict[str, Any]]]:
        with self._stream.entered():
            adapted: list[list[dict[str, Any]]] = _on_host(super().take_adapted())
            return adapted

    @override
    def read(self, out: Tensor) -> int:
        with self._stream.entered():
            return super().read(out)

    @override
    def snapshot(self, applied: Callable[[], Sequence[tuple[int, int]]] = tuple) -> Snapshot:
        """Parameters and optimizer states of one version, in host memory, so that they load anywhere."""
        with self._stream.entered():
            taken = super().snapshot(applied)
            return dataclasses.replace(
                taken,
                parameters=taken.parameters.cpu(),
                optimizer_states=_on_host(taken.optimizer_states),
                adapted=_on_host(taken.adapted),
                gathered=taken.gathered and taken.gathered.to(torch.device("cpu")),
            )

    @override
    def complete_version(self) -> bool:
        with self._stream.entered():
            return super().complete_version()

    @override
    def restore(
        self,
        version: int,
        optimizer_states: Sequence[Mapping[str, Any]],
        gathered: Gathered | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> bool:
        with self._stream.entered():
            if gathered is not None:
                gathered = gathered.to(self._flat.device)
            return super().restore(version, optimizer_states, gathered, policy)


class HolderPlacement:
    """The device of the holder, and what its sessions need to work there.

    Args:
        device: of the holder's buffers.
        facts: what rank 0 says of its GPU if the holder is there; None otherwise.
        stream: the holder's own; made here if the device is a CUDA device.

    Attributes:
        needs_memory: the option for which each worker must share memory with rank 0; empty if none does.
    """

    needs_memory = ""

    def __init__(
        self, device: torch.device | None = None, facts: DeviceFacts = None, stream: HolderStream | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self.facts = facts
        self._stream = stream or (CudaHolderStream(self.device) if self.device.type == "cuda" else None)

    def make_holder(self, *arguments: Any, **more: Any) -> Holder:
        """A holder here; see `Holder` for the arguments, of which the initial values are on this device."""
        return Holder(*arguments, **more) if self._stream is None else DeviceHolder(self._stream, *arguments, **more)

    def bind_thread(self) -> None:
        """To be called first in each thread that serves a worker.

        Such a thread would otherwise begin on the first GPU and on the stream that rank 0 trains on.
        """
        if self.device.type == "cuda":
            cuda: Any = torch.cuda
            cuda.set_device(self.device)
            cuda.set_stream(cuda.Stream(self.device))

    def buffers(self, numel: int, dtype: torch.dtype) -> Buffers:
        """Zeroed buffers on this device."""
        return Buffers.allocate(numel, dtype, self.device)

    def stage(self, channel: Channel, worker: int) -> Channel:
        """The session's end of a worker's channel with its buffers on this device."""
        return on_device(channel, self.device)

    def attach(self, worker: int, slot: int, segment: SharedSegment) -> None:
        """Told of the memory of a worker's slot before the worker is served, while the segment can be attached."""

    def deliver(self, channel: Channel, message: Message, parameters: Tensor) -> None:
        """Sends a worker the message that announces parameters, and the parameters, once they are complete."""
        channel.send(message, parameters)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(item) for item in value)
    return value
