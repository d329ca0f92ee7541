"""Copies beside the computation: a stream of its own for what moves between a GPU and the host.

Knows nothing of channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["CudaSideStream", "ImmediateStream", "SideStream", "side_stream"]


class SideStream(ABC):
    """A queue of copies that runs beside what the calling thread computes."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy behind everything that the calling thread has queued on the device so far."""

    @abstractmethod
    def join(self) -> None:
        """Lets what the calling thread queues from here on wait for the copies; the thread itself does not wait."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the copies have been made."""


class ImmediateStream(SideStream):
    """For devices without streams of their own: every copy has been made when `copy` returns."""

    @override
    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    @override
    def join(self) -> None:
        return

    @override
    def synchronize(self) -> None:
        return


class CudaSideStream(SideStream):
    """A CUDA stream, and the events that order it with the calling thread's.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._device = device
        self._stream = cuda.Stream(device)
        # A thread that waits for it sleeps; otherwise CUDA may let it spin, and rank 0 needs its cores.
        self._done = cuda.Event(blocking=True)

    @override
    def copy(self, target: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    @override
    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @override
    def synchronize(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


def side_stream(device: torch.device) -> SideStream:
    """A stream for copies to and from ``device``."""
    return CudaSideStream(device) if device.type == "cuda" else ImmediateStream()
