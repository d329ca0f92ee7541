r"""The staleness bound: pure rules, which `barrier_policies.py` applies.

A worker that was given the parameters of version :math:`r` and has not been answered since is
*outstanding*. Its gradient must be taken while the holder's version :math:`k` is at most
:math:`r + \tau`, where :math:`\tau` is ``max_staleness``. A version is made of :math:`K` gradients
(``gradients_per_update``): it has :math:`K` places, of which :math:`w` are filled. An outstanding gradient is
therefore a unit job with the deadline :math:`r + \tau`, and the question whether all of them can still be
taken in time is scheduling on :math:`K` places a version, which earliest deadline first solves.
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


def feasible(
    reads: Iterable[int], version: int, max_staleness: int | None, gradients_per_update: int = 1, filled: int = 0
) -> bool:
    r"""Whether every outstanding gradient can still be taken within the bound.

    With the versions read sorted, :math:`r_0 \le r_1 \le \dots`, this is
    :math:`k + \lfloor (w + i) / K \rfloor \le r_i + \tau` for every :math:`i`: the jobs are taken in the order
    of their deadlines, and the :math:`i`-th of them takes the :math:`(w + i)`-th place from version :math:`k` on. If
    that order misses a deadline, every order does: exchanging two neighbours that are out of deadline order never
    makes a job late.

    Args:
        reads: versions read by the workers that are outstanding, in any order.
        version: the holder's version :math:`k`, at which the next gradient would be taken.
        max_staleness: the bound :math:`\tau`; None bounds nothing.
        gradients_per_update: gradients that make a version, :math:`K`.
        filled: how many of them the present version has already, :math:`w < K`.

    Returns:
        True if some order takes all of them in time.

    Examples:
        >>> feasible([3, 5, 4], version=5, max_staleness=2)
        True
        >>> feasible([3, 3], version=5, max_staleness=2)
        False
        >>> feasible([0, 0, 0], version=99, max_staleness=None)
        True
        >>> feasible([5, 5, 5], version=5, max_staleness=0, gradients_per_update=4, filled=1)
        True
    """
    if max_staleness is None:
        return True
    oldest = version - max_staleness
    if gradients_per_update == 1:
        return all(needed <= read for needed, read in enumerate(sorted(reads), oldest))
    return all(oldest + (filled + i) // gradients_per_update <= read for i, read in enumerate(sorted(reads)))


def admissible(
    rest: Iterable[int], version: int, max_staleness: int | None, gradients_per_update: int = 1, filled: int = 0
) -> bool:
    r"""Whether one more gradient keeps every other outstanding gradient within the bound.

    It takes the next place, so the others have to fit into the places behind it.

    Args:
        rest: versions read by the *other* workers that are outstanding.
        version: the holder's version :math:`k` before it.
        max_staleness: the bound :math:`\tau`; None bounds nothing.
        gradients_per_update: gradients that make a version, :math:`K`.
        filled: how many of them the present version has already.

    Returns:
        True if the gradient may be taken now.

    Examples:
        >>> admissible([4], version=5, max_staleness=2)
        True
        >>> admissible([4, 4], version=5, max_staleness=2)
        False
    """
    made, filled = divmod(filled + 1, gradients_per_update)
    return feasible(rest, version + made, max_staleness, gradients_per_update, filled)


def readable(
    reads: Iterable[int], version: int, max_staleness: int | None, gradients_per_update: int = 1, filled: int = 0
) -> bool:
    r"""Whether one more worker may be given the parameters of the present version.

    The new reader has the latest deadline of all, :math:`k + \tau`. Where the outstanding set is feasible
    already, it stays so exactly while there is a place left for it: while fewer than :math:`(\tau + 1) K - w` are
    outstanding before the newcomer.

    Args:
        reads: versions read by the workers that are outstanding.
        version: the holder's version :math:`k`, which the newcomer would read.
        max_staleness: the bound :math:`\tau`; None bounds nothing.
        gradients_per_update: gradients that make a version, :math:`K`.
        filled: how many of them the present version has already, :math:`w`.

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
    return feasible([*reads, version], version, max_staleness, gradients_per_update, filled)


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


def resolve_max_staleness(value: MaxStaleness, world_size: int, gradients_per_update: int = 1) -> int | None:
    """Turns the ``max_staleness`` argument into a bound.

    Args:
        value: a bound in updates, ``"auto"`` for as many as four gradients a rank make, or None for no bound.
        world_size: number of ranks.
        gradients_per_update: gradients that make an update.

    Returns:
        The bound in updates, or None.

    Raises:
        ValueError: if the value is none of these.

    Examples:
        >>> resolve_max_staleness("auto", world_size=8), resolve_max_staleness("auto", 8, gradients_per_update=8)
        (32, 4)
        >>> resolve_max_staleness(0, world_size=8), resolve_max_staleness(None, world_size=8)
        (0, None)
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}.")
    if value == "auto":
        return -(-AUTO_STALENESS_PER_RANK * world_size // gradients_per_update)
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
