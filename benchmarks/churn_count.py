"""What the events of a run with deaths come to: pure functions of what its processes have told."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from benchmarks.churn_runs import Event
from lightning_async.chaos.striker import Strike

__all__ = ["Counted", "Found", "Life", "count_async", "count_ddp", "count_torchft", "lives_of"]


class Life(NamedTuple):
    """One worker, from its first batch to its death.

    Args:
        rank: which rank it is.
        ready_s: when it had imported everything.
        begins_s: when it begins its first batch.
        ends_s: when it was killed, or the measurement ended.
    """

    rank: int
    ready_s: float
    begins_s: float
    ends_s: float


class Counted(NamedTuple):
    """What has come of a run.

    Args:
        batches: that count, in the time that was measured.
        by_rank: when each rank's batches were completed, where each has its own pace.
        lost: samples of complete epochs that do not count.
        repeated: samples of complete epochs that count more than once, and how often more.
        epochs: complete epochs.
        stops: when epochs were complete, where the ranks meet then.
    """

    batches: int
    by_rank: Mapping[int, Sequence[float]]
    lost: int
    repeated: int
    epochs: int
    stops: Sequence[float] = ()


class Found(NamedTuple):
    """What is said of a run.

    Args:
        kills: how many workers were killed.
        batches_per_second: that count.
        of_living: as a fraction of what the living could do by their own rates.
        of_all: as a fraction of what all ranks could do if none ever died.
        longest_gap_steps: the longest time between two completed batches of one worker that lives on, in steps.
        at_stops_steps: the same where the ranks meet between the two, at the end of an epoch; 0 if that is not known.
        first_gradient_s: from a death to the first batch of the replacement that counts; each.
        after_imports_s: the same from when the replacement has imported everything.
        lost: see `Counted`.
        repeated: see `Counted`.
        epochs: see `Counted`.
    """

    kills: int
    batches_per_second: float
    of_living: float
    of_all: float
    longest_gap_steps: float
    at_stops_steps: float
    first_gradient_s: list[float]
    after_imports_s: list[float]
    lost: int
    repeated: int
    epochs: int

    @classmethod
    def of(
        cls,
        counted: Counted,
        lives: Sequence[Life],
        strikes: Sequence[Strike],
        began: float,
        ended: float,
        alone: float,
        step_s: float,
        ranks: int,
    ) -> Found:
        """Of a run that was measured from ``began`` to ``ended``, whose ranks complete ``alone`` batches/s alone."""
        lived = sum(max(0.0, min(life.ends_s, ended) - max(life.begins_s, began)) for life in lives)
        waits, after = [], []
        for strike in strikes:
            heirs = [life for life in lives if life.rank == strike.rank and life.begins_s > strike.at_s]
            heir = min(heirs, key=lambda life: life.begins_s, default=None)
            first = None if heir is None else _first(counted.by_rank.get(heir.rank, ()), heir)
            if heir is not None and first is not None:
                waits.append(first - strike.at_s)
                after.append(first - max(heir.ready_s, strike.at_s))
        gaps = [
            (later - earlier, any(earlier <= stop <= later for stop in counted.stops))
            for life in lives
            for earlier, later in _neighbours([at for at in counted.by_rank.get(life.rank, ()) if _within(at, life)])
            if began <= earlier and later <= ended
        ]
        return cls(
            kills=len(strikes),
            batches_per_second=counted.batches / (ended - began),
            of_living=counted.batches / (lived * alone),
            of_all=counted.batches / ((ended - began) * ranks * alone),
            longest_gap_steps=max((gap for gap, meets in gaps if not meets), default=0.0) / step_s,
            at_stops_steps=max((gap for gap, meets in gaps if meets), default=0.0) / step_s,
            first_gradient_s=waits,
            after_imports_s=after,
            lost=counted.lost,
            repeated=counted.repeated,
            epochs=counted.epochs,
        )

    def row(self, name: str) -> str:
        """A line of the table."""
        waits = " ".join(f"{_typical(values):>6}" for values in (self.first_gradient_s, self.after_imports_s))
        samples = f"{self.lost} / {self.repeated} in {self.epochs} epochs"
        return (
            f"{name:<20}  {self.kills:>5}  {self.batches_per_second:>9.2f}  {self.of_living:>6.3f}  {self.of_all:>6.3f}"
            f"  {self.longest_gap_steps:>5.1f} {self.at_stops_steps:>5.1f}  {waits:>15}  {samples}"
        )


def lives_of(events: Sequence[Event], deaths: Mapping[int, float], ended: float) -> list[Life]:
    """The workers of a run.

    Args:
        events: what its processes have told.
        deaths: when each process was killed that was.
        ended: when the measurement ended.
    """
    last = {event["pid"]: event["at_s"] for event in events}
    begins = [event for event in events if event["what"] == "begins"]
    found = []
    for event in begins:
        pid, rank, at_s = event["pid"], event["rank"], event["at_s"]
        # torchrun ends the others with the one that was killed.
        replaced = any(other["rank"] == rank and other["at_s"] > at_s for other in begins)
        found.append(Life(rank, event["ready_s"], at_s, deaths.get(pid, last[pid] if replaced else ended)))
    return found


def count_async(events: Sequence[Event], samples: int, began: float, ended: float) -> Counted:
    """Of async_amsgrad: what rank 0's holder has applied."""
    by_rank: dict[int, list[float]] = defaultdict(list)
    tickets: list[int] = []
    stops: list[float] = []
    batches = 0
    for event in events:
        if event["what"] == "update" and event["applied"]:
            by_rank[event["rank"]].append(event["at_s"])
            tickets += event["tickets"]
            if len(tickets) // samples > len(stops):
                stops.append(event["at_s"])
            batches += len(event["tickets"]) * (began <= event["at_s"] <= ended)
    epochs = len(tickets) // samples
    lost = repeated = 0
    for epoch in range(epochs):
        missing, twice = _compared(tickets[epoch * samples : (epoch + 1) * samples], samples)
        lost, repeated = lost + missing, repeated + twice
    return Counted(batches, by_rank, lost, repeated, epochs, stops)


def count_ddp(events: Sequence[Event], samples: int, began: float, ended: float) -> Counted:
    """Of DDP: the steps that no later start has begun anew from a checkpoint."""
    # Each start's processes have begun with the same step, which is where its checkpoint was.
    first = {event["pid"]: (event["at_s"], event["step"]) for event in events if event["what"] == "begins"}
    starts = sorted({step: at for at, step in sorted(first.values(), reverse=True)}.items(), key=lambda one: one[1])
    by_rank: dict[int, list[float]] = defaultdict(list)
    kept: dict[int, list[int]] = defaultdict(list)
    ranks = {event["pid"]: event["rank"] for event in events if event["what"] == "begins"}
    batches = 0
    for event in events:
        if event["what"] != "step" or event["pid"] not in first:
            continue
        discarded = any(step < event["step"] for step, at in starts if at > event["at_s"])
        if not discarded:
            by_rank[ranks[event["pid"]]].append(event["at_s"])
            kept[event["epoch"]] += event["samples"]
            batches += began <= event["at_s"] <= ended
    complete = sorted(kept)[:-1]
    compared = [_compared(kept[epoch], samples) for epoch in complete]
    return Counted(batches, by_rank, sum(one for one, _ in compared), sum(two for _, two in compared), len(complete))


def count_torchft(events: Sequence[Event], samples: int, began: float, ended: float) -> Counted:
    """Of torchft: the steps that were committed; a replica that comes back begins its samples anew."""
    by_rank: dict[int, list[float]] = defaultdict(list)
    counts: Counter[int] = Counter()
    batches = 0
    for event in events:
        if event["what"] == "committed":
            by_rank[event["rank"]].append(event["at_s"])
            counts.update(event["samples"])
            batches += len(event["samples"]) * (began <= event["at_s"] <= ended)
    # Replicas have no epoch in common: a run has as many as its batches would make.
    epochs = sum(counts.values()) // samples
    lost = sum(max(0, epochs - counts[sample]) for sample in range(samples))
    repeated = sum(max(0, counts[sample] - epochs - 1) for sample in range(samples))
    return Counted(batches, by_rank, lost, repeated, epochs)


def _compared(seen: Sequence[int], samples: int) -> tuple[int, int]:
    """How many samples of an epoch are missing, and how often one is there once more than it is to be.

    Examples:
        >>> _compared([0, 1, 1, 3], 4)
        (1, 1)
    """
    counts = Counter(seen)
    return samples - len(counts), sum(count - 1 for count in counts.values())


def _within(at: float, life: Life) -> bool:
    return life.begins_s <= at <= life.ends_s


def _first(times: Sequence[float], life: Life) -> float | None:
    return min((at for at in times if _within(at, life)), default=None)


def _neighbours(times: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(times))


def _typical(values: Sequence[float]) -> str:
    return f"{median(values):.1f} s" if values else "-"
