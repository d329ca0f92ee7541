"""What a run's conclusions are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_async.monitoring.cpu_use import CpuUse

__all__ = ["RunFacts"]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the rules look at.

    Args:
        max_staleness: the bound; None if there was none.
        on_stale: what kept it, ``"wait"`` or ``"drop"``.
        shared: whether fast ranks took more batches.
        train_seconds: length of training, validation not counted.
        updates: gradients applied.
        dropped: gradients discarded.
        steps: for each rank the seconds of some of its steps.
        wait_seconds: for each rank: spent in push and pull.
        parked_seconds: for each rank: the part of it in which the barrier held its gradient back.
        gradients_per_update: gradients that made a version.
        all_reduce_s: seconds that an all-reduce of the parameters takes; 0.0 if that was not measured.
        cpu: for each rank what it used of its host; empty if that is not known.
        gain_measured: how many times as long lock step takes, as "auto" has measured it there; None if it has not.
        apart_from: the version from which on the ranks did not wait for each other.
        evicted: ranks that were lost, in that order.
        joined: ranks that have joined since the run began, in that order.
        rejected: for each rank that has some, the number of its gradients that were not finite.
    """

    max_staleness: int | None
    on_stale: str
    shared: bool
    train_seconds: float
    updates: int
    dropped: int
    steps: Sequence[Sequence[float]]
    wait_seconds: Sequence[float]
    parked_seconds: Sequence[float]
    gradients_per_update: int = 1
    all_reduce_s: float = 0.0
    cpu: Sequence[CpuUse] = ()
    gain_measured: float | None = None
    apart_from: int = 0
    evicted: Sequence[int] = ()
    joined: Sequence[int] = ()
    rejected: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, configuration: Mapping[str, Any], stats: Mapping[str, Any], steps: Sequence[Sequence[float]]
    ) -> RunFacts:
        """From the strategy's ``configuration`` and its ``stats.as_dict()``."""
        # What the ranks waited for each other until "auto" had chosen was the price of measuring.
        chosen = configuration.get("auto") or {}
        before = chosen.get("waited_seconds") or [0.0] * len(steps)
        if chosen.get("gradients") == len(steps):
            before = [0.0] * len(steps)
        waited = stats["wait_seconds_by_rank"].values()
        hosts, cores, used = (stats[f"{name}_by_rank"].values() for name in ("host", "cores", "cores_used"))
        cpu = [CpuUse(*use) for use in zip(hosts, cores, used, strict=True)]
        return cls(
            max_staleness=configuration["max_staleness"],
            on_stale=configuration["on_stale"],
            shared=configuration["batches"] == "shared",
            train_seconds=stats["train_seconds"],
            updates=stats["updates"],
            dropped=stats["dropped"],
            steps=steps,
            wait_seconds=[max(0.0, all_of_it - own) for all_of_it, own in zip(waited, before, strict=True)],
            parked_seconds=list(stats["parked_seconds_by_rank"].values()),
            gradients_per_update=configuration["gradients_per_update"],
            all_reduce_s=stats["all_reduce_seconds"],
            cpu=cpu if all(use.cores > 0 for use in cpu) else (),
            gain_measured=chosen.get("gain"),
            apart_from=chosen.get("version", 0),
            # Records of before have none.
            evicted=stats.get("evicted", ()),
            joined=stats.get("joined", ()),
            rejected={rank: count for rank, count in stats["rejected_by_rank"].items() if count},
        )

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.steps)

    @property
    def parked_fraction(self) -> float:
        """Part of the workers' time in which the barrier held a gradient back."""
        return min(1.0, sum(self.parked_seconds) / max(self.train_seconds * self.ranks, 1e-12))

    @property
    def exchange_fraction(self) -> float:
        """Part of the workers' time that went into handing in gradients and getting parameters, the barrier apart."""
        waited = sum(self.wait_seconds) - sum(self.parked_seconds)
        return min(1.0, max(0.0, waited) / max(self.train_seconds * self.ranks, 1e-12))

    @property
    def places(self) -> int | None:
        """How many ranks the bound lets compute at a time at most; None if it bounds nothing."""
        return None if self.max_staleness is None else (self.max_staleness + 1) * self.gradients_per_update

    @property
    def in_lock_step(self) -> bool:
        """Whether each version was made of a gradient of every rank, as under DDP."""
        return self.max_staleness == 0 and self.gradients_per_update == self.ranks > 1

    def shared_cores(self) -> list[tuple[int, int]]:
        """Of each host that has fewer cores than ranks: the number of ranks and of cores."""
        hosts: dict[str, list[CpuUse]] = {}
        for use in self.cpu:
            hosts.setdefault(use.host, []).append(use)
        counted = [(len(uses), max(use.cores for use in uses)) for uses in hosts.values()]
        return [(ranks, cores) for ranks, cores in counted if ranks > cores]
