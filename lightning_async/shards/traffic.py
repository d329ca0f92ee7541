"""What shards that are spread over hosts leave to the busiest host's network: a rule without state."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["busiest_share"]


def busiest_share(shards: int, ranks_by_host: Sequence[float]) -> float:
    r"""Of a gradient's bytes how many pass the busiest host's interface in each direction, on average.

    A host with the part :math:`h` of the vector and the part :math:`r` of the gradients takes in, of others' gradients,
    what it holds, :math:`h (1 - r)`, and of the parameters for its own ranks what it does not hold,
    :math:`r (1 - h)`. As much goes out.

    Args:
        shards: their number; shard s is on host s modulo the number of hosts.
        ranks_by_host: for each host how many gradients come from there, in any unit; rank 0's host first.

    Examples:
        >>> [busiest_share(shards, [1, 1]) for shards in (1, 2)]
        [0.5, 0.5]
        >>> [busiest_share(shards, [1, 1, 1, 1]) for shards in (1, 2, 4)]
        [0.75, 0.5, 0.375]
    """
    hosts, total = len(ranks_by_host), sum(ranks_by_host)
    shares = []
    for host, ranks in enumerate(ranks_by_host):
        held = len(range(host, shards, hosts)) / shards
        own = ranks / total
        shares.append(held * (1 - own) + own * (1 - held))
    return max(shares)
