"""Pushes of several workers that wait at once, for a holder that takes them in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from lightning_async.exchange.fence import EvictedError
from lightning_async.exchange.session import Arrived, Session
from lightning_async.holder.holder import Holder
from lightning_async.holder.types import Update
from lightning_async.runtime.failure import WorkerFailedError

__all__ = ["serve_together"]


def serve_together(
    holder: Holder, pushes: Sequence[tuple[Session, Arrived]]
) -> list[tuple[Session, Iterator[None] | EvictedError]]:
    """Has the holder apply pushes that wait, as many of them in one pass as it can.

    Args:
        holder: of all the sessions.
        pushes: in the order of their arrival, each slot of a worker once.

    Returns:
        Of each session what answers its push, to be gone through in this order as `Session.finish` says; or what keeps
        it out.
    """
    refused: list[tuple[Session, EvictedError]] = []
    admitted: list[tuple[Session, Arrived]] = []
    with ExitStack() as inside:
        entered = set()
        for session, arrived in pushes:
            try:
                # Both slots of a worker have one.
                if session.fence not in entered:
                    inside.enter_context(session.fence)
            except EvictedError as error:
                refused.append((session, error))
                continue
            entered.add(session.fence)
            admitted.append((session, arrived))
        done = _push(holder, admitted)
    left = [None] * (len(admitted) - len(done))
    answers = [
        (session, session.finish(arrived, answer))
        for (session, arrived), answer in zip(admitted, [*done, *left], strict=True)
    ]
    return [*refused, *answers]


def _push(holder: Holder, pushes: Sequence[tuple[Session, Arrived]]) -> list[tuple[Update, int | None]]:
    try:
        return holder.push_together([session.waiting(arrived) for session, arrived in pushes])
    except WorkerFailedError:
        # Each is told of it where it is served.
        return []
