"""The processes of a host's ranks without any, and rank 0 of their run, for what waits for them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

from lightning_async.runtime.handshake import Address
from lightning_async.strategies.host_processes import HostProcesses
from lightning_async.strategies.mailbox import Mailbox
from tests.harness import Call, RankZero, eventually

__all__ = ["Host1", "Process"]


class Process:
    """A rank's process without one."""

    def __init__(self) -> None:
        self.exitcode: int | None = None
        self.sentinel, self._alive = os.pipe()

    def end(self, code: int) -> None:
        if self.exitcode is None:
            self.exitcode = code
            os.close(self._alive)

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        return

    def kill(self) -> None:
        self.end(-9)

    def close(self) -> None:
        self.end(0)
        os.close(self.sentinel)


class Host1:
    """What waits for ranks 2 and 3 of a run that goes on."""

    def __init__(self, folder: Path) -> None:
        self.rank_0 = RankZero(most=1)
        self.mailbox = Mailbox(multiprocessing.get_context("fork"))
        self.processes: list[Any] = [Process(), Process()]
        self.all: list[Process] = list(self.processes)
        self.started: list[tuple[int, Address]] = []
        files = [str(folder / f"error-{index}") for index in range(2)]
        host = HostProcesses(self.processes, files, 1, True, self._start)
        self.waiting = Call(lambda: host.wait(self.mailbox), "host-1")

    def _start(self, index: int, address: Address) -> Process:
        self.started.append((index, address))
        self.all.append(Process())
        return self.all[-1]

    def begin_training(self) -> None:
        self.mailbox.put(self.rank_0.address)
        assert eventually(lambda: self.rank_0.launchers._launchers)

    def restarted(self, index: int) -> Process:
        """The process that is started in the place of a rank's first; waits for it."""
        assert eventually(lambda: self.processes[index] is not self.all[index])
        process: Process = self.processes[index]
        return process

    def die(self, index: int, code: int = -9) -> None:
        self.processes[index].end(code)
        self.rank_0.lose(2 + index)

    def close(self) -> None:
        self.rank_0.close()
        for process in self.all:
            process.end(0)
        self.waiting.join(10.0)
        self.mailbox.close()
        for process in self.all:
            process.close()
