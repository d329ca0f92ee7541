"""The ranks of a command, found from outside: by what they have announced, and by the environment they started with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_async.runtime.whereabouts import ranks_announced

__all__ = ["RankProcess", "descendants", "find_ranks", "parents"]

_PROC = Path("/proc")
# Of torchrun and Lightning's script launcher, of SLURM.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class RankProcess:
    """The process of a rank.

    Args:
        rank: the rank.
        pid: its process.
        started: when, in ticks since the machine did: another process with this id is another one.
    """

    rank: int
    pid: int
    started: int

    def send(self, number: signal.Signals) -> bool:
        """Sends a signal, unless the process has ended; returns whether it was sent."""
        found = _status(self.pid)
        if found is None or found.started != self.started:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


@dataclass(frozen=True, slots=True)
class _Status:
    parent: int
    started: int


def find_ranks(root: int, announced_in: Path) -> list[RankProcess]:
    """The living ranks that a command has started, in rising order; those of one rank by age.

    Args:
        root: the command's process.
        announced_in: where ranks of this package's strategies say who they are.
    """
    statuses = dict(_statuses())
    inside = descendants(root, {pid: status.parent for pid, status in statuses.items()}) | {root}
    announced = {pid: rank for pid, rank in ranks_announced(announced_in).items() if pid in inside}
    ranks = announced or {pid: rank for pid in inside if (rank := _rank_by_environment(pid)) is not None}
    if not announced:
        # What a rank has started has its environment, too.
        ranks = {pid: rank for pid, rank in ranks.items() if statuses[pid].parent not in ranks}
    found = [RankProcess(rank, pid, statuses[pid].started) for pid, rank in ranks.items()]
    return sorted(found, key=lambda one: (one.rank, one.started))


def descendants(root: int, parents: Mapping[int, int]) -> set[int]:
    """The processes below one.

    Args:
        root: the one.
        parents: of each process its parent.

    Examples:
        >>> sorted(descendants(1, {2: 1, 3: 2, 4: 9}))
        [2, 3]
    """
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    left = [root]
    while left:
        for child in children.get(left.pop(), []):
            if child not in found:
                found.add(child)
                left.append(child)
    return found


def parents() -> dict[int, int]:
    """Of each living process its parent."""
    return {pid: status.parent for pid, status in _statuses()}


def _statuses() -> Iterator[tuple[int, _Status]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (status := _status(int(entry.name))) is not None:
            yield int(entry.name), status


def _status(pid: int) -> _Status | None:
    """What is known of a living process; None of one that has ended."""
    try:
        # The name before it may have blanks and brackets.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else _Status(parent=int(fields[1]), started=int(fields[19]))


def _rank_by_environment(pid: int) -> int | None:
    try:
        content = (_PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return None
    variables = dict(pair.partition("=")[::2] for pair in content.split("\0"))
    for name in _RANK_VARIABLES:
        if variables.get(name, "").isdigit():
            return int(variables[name])
    return None
