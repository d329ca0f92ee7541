"""The shared-memory channel: payloads stay where they are; only messages move.

For a worker on the holder's host.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.memory import AnonymousMemory, open_memory
from lightning_async.transport.message import Message

__all__ = ["SharedMemoryChannel", "SharedSegment", "host_identity"]

_ALIGNMENT_BYTES = 4096
# A round trip of a small model takes about as long; waking a process costs as much again.
_SPIN_S = 200e-6


def host_identity() -> str:
    """What two processes have in common if one can map the other's memory: kernel, process namespace and user.

    Empty where memory cannot be shared this way, so that nobody is on the same host.
    """
    if not hasattr(os, "memfd_create"):
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return f"{boot}:{namespace}:{os.getuid()}"


class SharedSegment:
    """Memory for one worker's two buffers that has no name, and so cannot outlive the processes that map it.

    Args:
        numel: size of each buffer.
        dtype: of the buffers.

    Raises:
        OSError: if the host has not enough memory left.
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._memory = AnonymousMemory(_segment_bytes(numel, dtype))
        try:
            self.buffers = _map(self._memory.descriptor, numel, dtype)
        except OSError:
            self.release()
            raise

    @property
    def address(self) -> str:
        """Where another process of this user attaches the segment, until `release`."""
        return self._memory.address

    def release(self) -> None:
        """Closes the way in; the mappings, and with them the memory, last as long as their tensors. Idempotent."""
        self._memory.close()

    @staticmethod
    def attach(address: str, numel: int, dtype: torch.dtype) -> Buffers:
        """Maps another process's segment.

        Raises:
            OSError: if it cannot be opened from here, or was released.
        """
        descriptor = open_memory(address, os.O_RDWR)
        try:
            return _map(descriptor, numel, dtype)
        finally:
            os.close(descriptor)


class SharedMemoryChannel(Channel):
    """Messages over the control connection; payloads are read where the other side wrote them.

    The message is the signal: the worker writes its gradient before PUSH and touches it again only after the
    answer; the holder writes the parameters before PARAMETERS and only while the worker waits for it. Both processes
    order their memory by the system calls that the message takes.

    Args:
        control: the connected control connection; owned from here on.
        buffers: the mapped segment.
    """

    def __init__(self, control: ControlConnection, buffers: Buffers) -> None:
        super().__init__(buffers)
        self._control = control

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        self._control.send(message)

    @override
    def receive(self) -> Message:
        # Only workers wait here, the holder's side is served by the reactor.
        return self._control.receive(spin_s=_SPIN_S)

    @override
    def receive_payload(self, out: Tensor) -> None:
        # It is there already.
        return

    @override
    def close(self) -> None:
        self._control.shutdown()
        self._control.close()


def _segment_bytes(numel: int, dtype: torch.dtype) -> int:
    return 2 * _padded(numel * dtype.itemsize)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _map(descriptor: int, numel: int, dtype: torch.dtype) -> Buffers:
    # Python's mmap would keep a descriptor for as long as the mapping lasts.
    size = _segment_bytes(numel, dtype) // dtype.itemsize
    try:
        whole = torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=dtype)
    except RuntimeError as error:
        raise OSError(f"the memory cannot be mapped: {error}") from error
    # Each with a storage of its own, and both keep the mapping alive.
    return Buffers(_part(whole, 0, numel), _part(whole, size // 2, numel))


def _part(whole: Tensor, start: int, numel: int) -> Tensor:
    part: Tensor = torch.from_dlpack(whole[start : start + numel])
    return part
