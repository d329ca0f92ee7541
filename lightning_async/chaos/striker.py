"""Strikes the ranks of a running command now and then."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from lightning_async.chaos.processes import RankProcess, find_ranks
from lightning_async.runtime.whereabouts import is_training, ranks_announced

__all__ = ["SIGNALS", "Strike", "Striker"]

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "sigterm": signal.SIGTERM}
"""What a strike sends."""

_LOOK_S = 0.1


class Strike(NamedTuple):
    """What was struck.

    Attributes:
        at_s: when, by the monotonic clock.
        kind: with what; see `SIGNALS`.
        rank: which rank.
        pid: its process.
    """

    at_s: float
    kind: str
    rank: int
    pid: int


class Striker:
    """Sends a signal to a random rank of a command every so often.

    Args:
        root: the command's process.
        announced_in: where its ranks say who they are.
        every_s: seconds between two strikes, and before the first, counted from when the ranks train.
        kinds: one of these each time; see `SIGNALS`.
        ranks: which ranks may be struck; None for all but rank 0.
        seed: of what is drawn.
        until_s: seconds from when the ranks train after which nothing more is struck; None for no end.
        say: prints a line.

    Attributes:
        strikes: what was struck so far.
    """

    def __init__(
        self,
        root: int,
        announced_in: Path,
        every_s: float,
        kinds: Collection[str] = ("kill",),
        ranks: Collection[int] | None = None,
        seed: int = 0,
        until_s: float | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        self.strikes: list[Strike] = []
        self._root = root
        self._announced_in = announced_in
        self._every_s = every_s
        self._kinds = sorted(kinds)
        self._ranks = ranks
        self._dice = random.Random(seed)
        self._until_s = until_s
        self._say = say
        self._stopped: list[RankProcess] = []

    def run(self, is_over: Callable[[float], bool]) -> None:
        """Strikes until the command is over.

        Args:
            is_over: waits for as many seconds as it is given, and tells whether the command is over.
        """
        while not self._has_begun():
            if is_over(_LOOK_S):
                return
        began = time.monotonic()
        count = 1
        while self._until_s is None or count * self._every_s <= self._until_s:
            if is_over(max(0.0, began + count * self._every_s - time.monotonic())):
                return
            self._strike(time.monotonic() - began)
            count += 1
        self._say(f"no more strikes; {len(self.strikes)} in {self._until_s:g} s")

    def end_stopped(self) -> None:
        """Kills what was stopped and is still there, which would never end."""
        for process in self._stopped:
            process.send(signal.SIGKILL)

    def _has_begun(self) -> bool:
        """Whether the ranks train; of a command whose ranks do not say so, whether there are any."""
        if ranks_announced(self._announced_in):
            return is_training(self._announced_in)
        return bool(find_ranks(self._root, self._announced_in))

    def _strike(self, at_s: float) -> None:
        kind = self._dice.choice(self._kinds)
        found = find_ranks(self._root, self._announced_in)
        # Those that were stopped are out already.
        stopped = {(process.pid, process.started) for process in self._stopped}
        targets = [one for one in found if self._may_strike(one.rank) and (one.pid, one.started) not in stopped]
        if not targets:
            self._say(f"{at_s:.1f} s: nothing to strike; there is rank {_listed({one.rank for one in found})}")
            return
        target = self._dice.choice(targets)
        if target.send(SIGNALS[kind]):
            if kind == "stop":
                self._stopped.append(target)
            self.strikes.append(Strike(time.monotonic(), kind, target.rank, target.pid))
            self._say(f"{at_s:.1f} s: {SIGNALS[kind].name} to rank {target.rank} (process {target.pid})")

    def _may_strike(self, rank: int) -> bool:
        return rank != 0 if self._ranks is None else rank in self._ranks


def _listed(ranks: Collection[int]) -> str:
    return ", ".join(map(str, sorted(ranks))) or "none"
