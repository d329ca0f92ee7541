"""Communicators between threads that enforce NCCL's rules, and hang where NCCL would.

No tags, no any-source: the n-th operation of one side meets the n-th of the other, and they must be a send and a
receive of the same size and dtype. Connecting blocks until the other side comes, and a process connects one at a time.
One thread issues everything. A peer's end is not reported: only `abort` frees whoever waits, and then as if nothing had
happened, as CUDA does. Broken rules are kept in `Fabric.broken`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fabric", "FakeCommunicator"]


class Fabric:
    """What the fake communicators of one test share.

    Args:
        refuse: called with a communicator's name and side before it connects; raises to make that fail.

    Attributes:
        lingers_s: seconds until a call that was aborted returns.
    """

    def __init__(self, refuse: Callable[[str, int], None] = lambda name, side: None) -> None:
        self.refuse = refuse
        self.lingers_s = 0.0
        self.changed = threading.Condition()
        self.broken: list[str] = []
        # Names in the order in which the holder's side began to connect, and the order of everything that was posted.
        self.connected: list[str] = []
        self.posted: list[tuple[str, int, str]] = []
        self.connecting: set[str] = set()
        self.sides: dict[tuple[str, int], FakeCommunicator] = {}

    def communicator(self, store: Any, name: str, side: int, device: torch.device) -> FakeCommunicator:
        """Takes the place of `nccl_communicator`."""
        made = FakeCommunicator(self, name, side)
        with self.changed:
            if (name, side) in self.sides:
                self.broken.append(f"{name}: side {side} is made twice")
            self.sides[name, side] = made
        return made


class FakeCommunicator:
    """One side of a pair."""

    def __init__(self, fabric: Fabric, name: str, side: int) -> None:
        self._fabric = fabric
        self._name = name
        self._side = side
        self._threads: set[int] = set()
        self._ready = False
        self._used_marks: list[Any] = []
        self.aborted = False
        self.posted: list[tuple[str, Tensor]] = []
        self.finished = 0

    def mark(self) -> Any:
        return (threading.get_ident(), object())

    def connect(self) -> None:
        self._note_thread()
        fabric, key = self._fabric, f"side {self._side}"
        with fabric.changed:
            if self._side == 0:
                if fabric.connecting:
                    fabric.broken.append(f"{self._name} connects while {fabric.connecting} do")
                fabric.connecting.add(self._name)
                fabric.connected.append(self._name)
        try:
            fabric.refuse(self._name, self._side)
            with fabric.changed:
                self._ready = True
                fabric.changed.notify_all()
                fabric.changed.wait_for(lambda: self.aborted or (self._peer is not None and self._peer._ready))
                if self.aborted:
                    raise RuntimeError(f"{key}: the communicator was aborted")
        finally:
            if self.aborted:
                time.sleep(fabric.lingers_s)
            if self._side == 0:
                with fabric.changed:
                    fabric.connecting.discard(self._name)

    def send(self, tensor: Tensor, after: Any) -> None:
        self._post("send", tensor, after)

    def recv(self, tensor: Tensor, after: Any) -> None:
        self._post("recv", tensor, after)

    def synchronize(self) -> None:
        self._note_thread()
        with self._fabric.changed:
            while self.finished < len(self.posted) and not self.aborted:
                self._meet(self.finished)

    def abort(self) -> None:
        with self._fabric.changed:
            self.aborted = True
            self._fabric.changed.notify_all()

    @property
    def _peer(self) -> FakeCommunicator | None:
        return self._fabric.sides.get((self._name, 1 - self._side))

    def _post(self, kind: str, tensor: Tensor, after: Any) -> None:
        self._note_thread()
        with self._fabric.changed:
            if self.aborted:
                raise RuntimeError("the communicator was aborted")
            if not self._ready:
                self._break("is used before it is connected")
            if after in self._used_marks or after[0] in self._threads:
                self._break("is not told what the caller had queued")
            self._used_marks.append(after)
            self.posted.append((kind, tensor))
            self._fabric.posted.append((self._name, self._side, kind))
            self._fabric.changed.notify_all()

    def _meet(self, index: int) -> None:
        peer = self._peer
        assert peer is not None
        self._fabric.changed.wait_for(lambda: self.aborted or len(peer.posted) > index)
        if self.aborted:
            return
        (kind, mine), (other_kind, theirs) = self.posted[index], peer.posted[index]
        if {kind, other_kind} != {"send", "recv"} or mine.numel() != theirs.numel() or mine.dtype != theirs.dtype:
            self._break(f"operation {index}: {kind} of {mine.numel()} meets {other_kind} of {theirs.numel()}")
            self._fabric.changed.wait_for(lambda: self.aborted)
            return
        if kind == "recv":
            mine.copy_(theirs)
            self.finished = index + 1
            self._fabric.changed.notify_all()
        else:
            self._fabric.changed.wait_for(lambda: self.aborted or peer.finished > index)
            self.finished = index + 1

    def _note_thread(self) -> None:
        self._threads.add(threading.get_ident())
        if len(self._threads) > 1:
            self._break("is used by two threads")

    def _break(self, rule: str) -> None:
        self._fabric.broken.append(f"{self._name}, side {self._side}: {rule}")
