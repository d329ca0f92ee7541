"""A training run on two hosts whose ranks are forks of the test process: with nothing to import, they start at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer

from benchmarks.network import HostThread
from tests.faults.train import Run, train
from tests.hosts.network import Link
from tests.launch import _kill_session, _run_child, _wait_until_gone

__all__ = ["Line", "TwoHosts"]

_POLL_S = 0.05


class Line(NamedTuple):
    """What a host has printed.

    Attributes:
        at_s: when, in seconds of the monotonic clock.
        host: which one, "a" or "b".
        text: the line.
    """

    at_s: float
    host: str
    text: str


class TwoHosts(threading.Thread):
    """Trains with as many ranks on each host of a link, until told to stop; notes when which host prints what.

    Args:
        link: between the hosts.
        run: what each host trains, with ``run.ranks`` ranks of its own.
        folder: where the hosts print to.
    """

    def __init__(self, link: Link, run: Run, folder: Path) -> None:
        super().__init__(daemon=True)
        self.lines: list[Line] = []
        self._folder = folder
        self._hosts = {"a": link.a, "b": link.b}
        self._over = threading.Event()
        trainer = {"num_nodes": 2, "max_epochs": -1} | run.trainer
        run = Run(**(vars(run) | {"trainer": trainer, "strategy": {"start_method": "fork"} | run.strategy}))
        self._sessions = {name: self._fork(name, host, run) for name, host in self._hosts.items()}
        self.ended_at_s: dict[str, float] = {}
        self.status: dict[str, int] = {}
        self.start()

    def _fork(self, name: str, host: HostThread, run: Run) -> int:
        place = self._folder / name
        place.mkdir()

        def script(folder: Path) -> None:
            host.enter()
            os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
            # Its name is that of this machine, whose addresses it does not have.
            os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "NODE_RANK": "0" if name == "a" else "1"}
            train(run, folder, [_Progress(self._folder / "stop")])

        if (pid := os.fork()) == 0:
            _run_child(script, place, place / "output.txt")
        return pid

    def run(self) -> None:
        read = dict.fromkeys(self._hosts, 0)
        while not self._over.wait(_POLL_S):
            now = time.monotonic()
            for name, session in self._sessions.items():
                text = self.output(name)
                whole = text[read[name] : text.rfind("\n") + 1]
                read[name] += len(whole)
                self.lines += [Line(now, name, line) for line in whole.splitlines()]
                if name not in self.status and (ended := os.waitpid(session, os.WNOHANG))[0]:
                    self.status[name], self.ended_at_s[name] = os.waitstatus_to_exitcode(ended[1]), now

    def output(self, name: str) -> str:
        """All that a host has printed."""
        path = self._folder / name / "output.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def first(self, text: str, host: str = "ab", after_s: float = 0.0) -> Line | None:
        """The first line with ``text``."""
        return next(
            (line for line in self.lines if text in line.text and line.host in host and line.at_s > after_s), None
        )

    def wait_for(self, condition: Callable[[], Any], timeout_s: float) -> Any:
        """What the condition gives once it is true; fails with all that was printed if it does not become so."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not after {timeout_s:g} s\n{self.output('a')}\n{self.output('b')}"
            time.sleep(_POLL_S)
        return value

    def wait_for_progress(self, timeout_s: float = 30.0) -> None:
        """Returns when rank 0 has trained for two more epochs."""
        now = time.monotonic()
        self.wait_for(
            lambda: sum(line.at_s > now and line.text.startswith("epoch ") for line in self.lines) >= 2, timeout_s
        )

    def stop(self) -> None:
        """Asks the run to end after its epoch."""
        (self._folder / "stop").touch()

    def close(self) -> None:
        """Ends what is left; fails if that is anything but what was not told to end."""
        self._over.set()
        self.join()
        left = {name: _wait_until_gone(self._sessions[name], 3.0) for name in self.status}
        for session in self._sessions.values():
            _kill_session(session)
        assert not any(left.values()), left


class _Progress(Callback):
    def __init__(self, stop: Path) -> None:
        self._stop = stop

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch} of {trainer.world_size} ranks", flush=True)
        if self._stop.exists():
            trainer.should_stop = True
