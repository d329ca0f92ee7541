"""What a run's "auto" became, beside what was asked for, in a form that machines read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.policies.momentum import implicit_momentum
from lightning_async.policies.registry import describe_policy

__all__ = ["BatchSource", "Resolved", "describe_run"]

BatchSource = Literal["shared order", "stream per rank"]


@dataclass(frozen=True)
class Resolved:
    """What the ranks found when they met.

    Args:
        transports: of each rank, how its gradients travel.
        holder_device: where the holder is, ``"cpu"`` or ``"cuda"``.
        batch_source: whether all ranks draw from one order of batches, or each has a stream of its own.
        holder_threads: how many threads the holder may have; on rank 0, what its host allows.
    """

    transports: Sequence[str]
    holder_device: str
    batch_source: BatchSource
    holder_threads: int = 1


def describe_run(strategy: str, ranks: int, options: ExchangeOptions, resolved: Resolved | None) -> dict[str, Any]:
    """How a run exchanges gradients, ready for JSON.

    Args:
        strategy: name of the strategy's class.
        ranks: their number.
        options: what was asked for.
        resolved: what became of it; None before the first epoch, when "auto" is still "auto".

    Examples:
        >>> resolved = Resolved(("in process", "shm", "tcp"), "cpu", "shared order")
        >>> run = describe_run("AsyncStrategy", 3, ExchangeOptions(holder_device="cpu"), resolved)
        >>> run["transport"], run["transport_by_rank"], run["max_staleness"]
        ('shm, tcp', ['in process', 'shm', 'tcp'], 12)
        >>> run["requested"]
        {'max_staleness': 'auto', 'transport': 'auto', 'holder_threads': 'auto'}
    """
    asked: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    asked["staleness_policy"] = describe_policy(options.staleness_policy)
    bound = resolve_max_staleness(options.max_staleness, ranks, options.gradients_per_update)
    found: dict[str, Any] = {"max_staleness": bound}
    if options.momentum_correction == "auto":
        found["implicit_momentum"] = round(implicit_momentum(ranks, options.gradients_per_update), 4)
    if resolved is not None:
        # Rank 0's own gradients mostly travel nowhere.
        kinds = dict.fromkeys(kind for kind in resolved.transports if kind != "in process")
        found |= {
            "transport": ", ".join(kinds) or "in process",
            "transport_by_rank": list(resolved.transports),
            "holder_device": resolved.holder_device,
            "holder_threads": resolved.holder_threads,
            "batch_source": resolved.batch_source,
        }
    requested = {name: value for name, value in asked.items() if value == "auto" and found.get(name, value) != value}
    return {"strategy": strategy, "ranks": ranks, **asked, **found, "requested": requested}
