r"""The staleness bound: pure rules, which `policies.py` applies.

A worker that was given the parameters of version :math:`r` and has not been answered since is
*outstanding*. Its update must be applied while the holder's version :math:`k` is at most
:math:`r + \tau`, where :math:`\tau` is ``max_staleness``, and every applied update takes one version. An
outstanding update is therefore a unit job with the deadline :math:`r + \tau`, and the question whether all
of them can still be applied in time is single-machine scheduling, which earliest deadline first solves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

__all__ = [
    "MaxStaleness",
    "admissible",
    "check_bound",
    "feasible",
    "is_stale",
    "readable",
    "resolve_max_staleness",
]

AUTO_STALENESS_PER_RANK = 4

# The `max_staleness` of a run, as its user gives it.
MaxStaleness: TypeAlias = int | Literal["auto"] | None


def feasible(reads: Iterable[int], version: int, max_staleness: int | None) -> bool:
    r"""Whether every outstanding update can still be applied within the bound.

    With the versions read sorted, :math:`r_0 \le r_1 \le \dots`, this is
    :math:`k + i \le r_i + \tau` for every :math:`i`: the jobs are taken in the order of their deadlines,
    and the :math:`i`-th of them is applied at version :math:`k + i`. If that order misses a deadline, every
    order does: exchanging two neighbours that are out of deadline order never makes a job late.

    Args:
        reads: versions read by the workers that are outstanding, in any order.
        version: the holder's version :math:`k`, at which the next update would be applied.
        max_staleness: the bound :math:`\tau`; None bounds nothing.

    Returns:
        True if some order applies all of them in time.

    Examples:
        >>> feasible([3, 5, 4], version=5, max_staleness=2)
        True
        >>> feasible([3, 3], version=5, max_staleness=2)
        False
        >>> feasible([0, 0, 0], version=99, max_staleness=None)
        True
    """
    if max_staleness is None:
        return True
    return all(needed <= read for needed, read in enumerate(sorted(reads), version - max_staleness))


def admissible(rest: Iterable[int], version: int, max_staleness: int | None) -> bool:
    r"""Whether one more update keeps every other outstanding update within the bound.

    The update takes version :math:`k`, so the others have to fit into the versions from :math:`k + 1` on.

    Args:
        rest: versions read by the *other* workers that are outstanding.
        version: the holder's version :math:`k` before the update.
        max_staleness: the bound :math:`\tau`; None bounds nothing.

    Returns:
        True if the update may be applied now.

    Examples:
        >>> admissible([4], version=5, max_staleness=2)
        True
        >>> admissible([4, 4], version=5, max_staleness=2)
        False
    """
    return feasible(rest, version + 1, max_staleness)


def readable(reads: Iterable[int], version: int, max_staleness: int | None) -> bool:
    r"""Whether one more worker may be given the parameters of the present version.

    The new reader has the latest deadline of all, :math:`k + \tau`. Where the outstanding set is feasible
    already, it stays so exactly while it has at most :math:`\tau` members before the newcomer.

    Args:
        reads: versions read by the workers that are outstanding.
        version: the holder's version :math:`k`, which the newcomer would read.
        max_staleness: the bound :math:`\tau`; None bounds nothing.

    Returns:
        True if the set with the newcomer is feasible.

    Examples:
        >>> readable([], version=7, max_staleness=0)
        True
        >>> readable([7], version=7, max_staleness=0)
        False
        >>> readable([6, 7], version=7, max_staleness=2)
        True
    """
    return feasible([*reads, version], version, max_staleness)


def is_stale(version_read: int, version: int, max_staleness: int | None) -> bool:
    r"""Whether an update that arrives now is past the bound: :math:`k - r > \tau`.

    Args:
        version_read: the version :math:`r` that the gradient was computed at.
        version: the holder's version :math:`k`.
        max_staleness: the bound :math:`\tau`; None bounds nothing.

    Returns:
        True if ``on_stale="drop"`` discards it.

    Examples:
        >>> is_stale(3, version=5, max_staleness=2), is_stale(2, version=5, max_staleness=2)
        (False, True)
    """
    return max_staleness is not None and version - version_read > max_staleness


def resolve_max_staleness(value: MaxStaleness, world_size: int) -> int | None:
    """Turns the ``max_staleness`` argument into a bound.

    Args:
        value: a bound in updates, ``"auto"`` for four updates a rank, or None for no bound.
        world_size: number of ranks.

    Returns:
        The bound in updates, or None.

    Raises:
        ValueError: if the value is none of these.

    Examples:
        >>> resolve_max_staleness("auto", world_size=8)
        32
        >>> resolve_max_staleness(0, world_size=8), resolve_max_staleness(None, world_size=8)
        (0, None)
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}.")
    if value == "auto":
        return AUTO_STALENESS_PER_RANK * world_size
    check_bound(value)
    return value


def check_bound(max_staleness: object) -> None:
    """Refuses what is no bound.

    Raises:
        ValueError: if it is none.
    """
    if max_staleness is None:
        return
    if isinstance(max_staleness, bool) or not isinstance(max_staleness, int) or max_staleness < 0:
        raise ValueError(f"max_staleness must be an integer of at least 0, 'auto' or None, not {max_staleness!r}.")
