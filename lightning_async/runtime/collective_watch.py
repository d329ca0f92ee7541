"""Notices that ranks wait for one another in collectives that do not belong together.

A hook that only some ranks run may call a collective: under DDP and here that rank waits for ever, and the others wait
for it somewhere else. Each rank looks at its own training thread from time to time and tells rank 0, along the
heartbeats, which collective it has been in for too long. When all ranks are in one, and not all in the same, none of
them will ever return. Collectives that the host does not wait in, as NCCL's, are not seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import NamedTuple

from lightning_async.runtime.failure import RunFailure
from lightning_async.runtime.threads import frame_of

__all__ = ["CollectiveWatch", "Waiting", "judge"]

_TORCHS = "torch.distributed.distributed_c10d"
_MEETINGS = ("lightning_async.runtime.meeting", "lightning_async.runtime.meeting_host")
# Two ranks wait in unlike calls for one transfer; or nothing is waited for.
_NOT_SEEN = frozenset(
    ("send", "recv", "send_object_list", "recv_object_list", "batch_isend_irecv", "destroy_process_group")
)
# What stands between a strategy's collective and the code that has called it.
_PASSING_ON = (
    "lightning_async.strategies.collectives",
    "lightning_async.loops.tensor_sync",
    "lightning.fabric.utilities.distributed",
)
_PASSING_ON_PACKAGES = ("lightning.pytorch.strategies.", "lightning_utilities.")
_LIBRARIES = ("lightning", "lightning_async")
# What a meeting waits in.
_WAITING = ("multiprocessing", "selectors", "socket", "lightning_async")


class Waiting(NamedTuple):
    """The collective that a rank waits in.

    Attributes:
        call: which one; the same on all ranks where they wait for each other rightly.
        by_user: whether user code has called it.
        place: the code that has called it.
    """

    call: str
    by_user: bool
    place: str

    def __str__(self) -> str:
        return f"{self.call} ({self.place})" if self.by_user else f"the strategy's own exchange ({self.place})"

    def encode(self) -> str:
        """As text that `decode` reads."""
        return "\n".join((self.call, "user" if self.by_user else "", self.place))

    @classmethod
    def decode(cls, text: str) -> Waiting | None:
        """What `encode` wrote; None for text that is nothing of the kind."""
        parts = text.split("\n")
        return cls(parts[0], bool(parts[1]), parts[2]) if len(parts) == 3 else None


class CollectiveWatch:
    """One rank's look at the thread that has made it, and on rank 0 what the others have said of theirs.

    Args:
        rank: this rank.
        ranks: tells the ranks in the run.
        patience_s: seconds in one call after which it is told.
    """

    def __init__(self, rank: int, ranks: Callable[[], Collection[int]], patience_s: float) -> None:
        self._rank = rank
        self._ranks = ranks
        self._patience_s = patience_s
        self._thread = threading.get_ident()
        # The frame itself: as long as it is kept no other call's has its identity.
        self._frame: FrameType | None = None
        self._since = 0.0
        self._waiting: dict[int, Waiting] = {}

    def look(self) -> str:
        """What this rank is to tell: the collective that it has been in for longer than is to be expected."""
        waiting = None
        found = _find_collective(frame_of(self._thread))
        if found is not self._frame:
            self._frame, self._since = found, time.monotonic()
        elif found is not None and time.monotonic() - self._since >= self._patience_s:
            waiting = _describe(found)
        self._note(self._rank, waiting)
        return "" if waiting is None else waiting.encode()

    def hear(self, rank: int, text: str) -> None:
        """Notes what another rank has told."""
        self._note(rank, Waiting.decode(text))

    def failure(self) -> RunFailure | None:
        """The failure, if all ranks wait and cannot come to an end."""
        waiting = {rank: self._waiting[rank] for rank in self._ranks() if rank in self._waiting}
        return judge(waiting) if len(waiting) == len(self._ranks()) else None

    def _note(self, rank: int, waiting: Waiting | None) -> None:
        if waiting is None:
            self._waiting.pop(rank, None)
        else:
            self._waiting[rank] = waiting


def judge(waiting: Mapping[int, Waiting]) -> RunFailure | None:
    """The failure of ranks that all wait, or None if they are in the same collective and may only be slow.

    Examples:
        >>> own = Waiting("all_gather_object", False, "segments.py:100")
        >>> mine = Waiting("torch.distributed.barrier", True, "train.py:7")
        >>> print(judge({0: mine, 1: own}))
        rank 0 failed: it waits in torch.distributed.barrier (train.py:7), which not all ranks call: rank 1 waits in \
the strategy's own exchange (segments.py:100). Call a collective on every rank, in the same order
        >>> judge({0: own, 1: own})
    """
    if len({(one.call, one.by_user) for one in waiting.values()}) < 2:
        return None
    ranks = sorted(waiting)
    rank = next((rank for rank in ranks if waiting[rank].by_user), ranks[0])
    others = "; ".join(f"rank {other} waits in {waiting[other]}" for other in ranks if other != rank)
    return RunFailure(
        rank,
        f"it waits in {waiting[rank]}, which not all ranks call: {others}. Call a collective on every rank, in the "
        "same order",
    )


def _outwards(frame: FrameType | None) -> Iterator[tuple[str, FrameType]]:
    while frame is not None:
        yield str(frame.f_globals.get("__name__", "")), frame
        frame = frame.f_back


def _find_collective(innermost: FrameType | None) -> FrameType | None:
    """The frame of the collective that a thread is in: the outermost of torch's on the way to where it is.

    Or of a meeting by way of rank 0, which waits in the standard library.
    """
    found = None
    for module, frame in _outwards(innermost):
        if module in _MEETINGS and not frame.f_code.co_name.startswith("_"):
            return frame
        if module.partition(".")[0] != "torch":
            if found is None and module.partition(".")[0] in _WAITING:
                continue
            break
        if module == _TORCHS and not frame.f_code.co_name.startswith("_"):
            found = frame
    return None if found is None or found.f_code.co_name in _NOT_SEEN else found


def _describe(collective: FrameType) -> Waiting:
    by_meeting = collective.f_globals.get("__name__") in _MEETINGS
    call = "a meeting of the strategy's" if by_meeting else f"torch.distributed.{collective.f_code.co_name}"
    for module, frame in _outwards(collective.f_back):
        passed_on = module in _PASSING_ON or module.startswith(_PASSING_ON_PACKAGES)
        if module.partition(".")[0] == "torch" or passed_on:
            continue
        by_user = module.partition(".")[0] not in _LIBRARIES
        return Waiting(call, by_user, f"{frame.f_code.co_filename}:{frame.f_lineno}")
    return Waiting(call, True, "unknown")
