"""What a user should know of a run before it has begun, where it is not what it seems."""

from __future__ import annotations

__all__ = ["start_notices"]


def start_notices(ranks: int, ranks_of_host: int, cores: int) -> list[str]:
    """Lines for the start of a fit.

    Args:
        ranks: of the run.
        ranks_of_host: those of them on rank 0's host.
        cores: that the ranks of the host may use.

    Examples:
        >>> start_notices(4, 4, cores=8)
        []
        >>> start_notices(4, 4, cores=2)
        ['4 ranks on 2 cores: the ranks take turns, and each is slower than it would be alone.']
        >>> start_notices(1, 1, cores=8)
        ['Nothing is asynchronous with one rank: pass devices=4, for instance, to train with four.']
    """
    if ranks == 1:
        return ["Nothing is asynchronous with one rank: pass devices=4, for instance, to train with four."]
    if ranks_of_host > cores:
        number = f"{cores} core{'s' if cores > 1 else ''}"
        return [f"{ranks_of_host} ranks on {number}: the ranks take turns, and each is slower than it would be alone."]
    return []
