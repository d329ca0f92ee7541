"""What a run's numbers say in plain words: slow ranks, what the barrier cost, whether another bound would help.

Pure rules over `RunFacts`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from lightning_async.monitoring.lock_step import estimate
from lightning_async.monitoring.number_runs import runs_of
from lightning_async.monitoring.replay import free_bound
from lightning_async.monitoring.run_facts import RunFacts

__all__ = ["RunFacts", "conclusions", "diagnosis_line", "slow_ranks"]

SLOW_FACTOR = 1.5
_LITTLE_GAIN = 1.15
_COSTLY_BARRIER = 0.01
_COSTLY_EXCHANGE = 0.25
_NEEDED_STEPS = 5
# Ranks that are named one by one.
_NAMED = 4


def slow_ranks(steps: Sequence[Sequence[float]]) -> dict[int, float]:
    """Ranks whose median step takes at least 1.5 times that of the others, and how many times.

    Examples:
        >>> slow_ranks([[1.0, 1.0], [1.1, 0.9], [4.1, 4.1]])
        {2: 4.1}
        >>> slow_ranks([[1.0], [1.2]]), slow_ranks([[1.0], []])
        ({}, {})
    """
    medians = {rank: median(own) for rank, own in enumerate(steps) if own}
    slow = {}
    for rank, own in medians.items():
        others = [value for other, value in medians.items() if other != rank]
        if others and own >= SLOW_FACTOR * median(others) > 0.0:
            slow[rank] = own / median(others)
    return slow


def conclusions(facts: RunFacts) -> list[str]:
    """What to know of a run, the most important first; each a sentence without its full stop.

    Examples:
        >>> from lightning_async.monitoring.cpu_use import CpuUse
        >>> facts = RunFacts(8, "wait", True, train_seconds=100.0, updates=250, dropped=0,
        ...                  steps=[[1.0] * 20, [1.0] * 20, [4.0] * 20], wait_seconds=[0.1] * 3,
        ...                  parked_seconds=[0.0] * 3, all_reduce_s=0.001,
        ...                  cpu=[CpuUse("a", 8, 1.0)] * 3)
        >>> for sentence in conclusions(facts):
        ...     print(sentence)
        rank 2 takes 4.0x the median step of the others
        the barrier cost nothing
        in lock step the same batches would take an estimated 3.3x as long
    """
    if facts.rejected:
        spoiled = _rejections(facts.rejected)
        return [spoiled, *conclusions(dataclasses.replace(facts, rejected={}))]
    if facts.updates == 0:
        return ["no update was applied"]
    if facts.ranks == 1:
        return ["a single rank: there is nothing to wait for, and nothing is gained by not waiting"]
    if facts.evicted or facts.joined:
        # Another number of ranks at every time: what a bound or lock step would have done is not to be told from that.
        return [*_churn(facts), _measured(facts)]
    unknown = [rank for rank, own in enumerate(facts.steps) if len(own) < _NEEDED_STEPS]
    if len(unknown) == facts.ranks:
        return ["too few steps on each rank to say anything"]
    if unknown:
        # What another bound or lock step would have done depends on all of them.
        return [
            f"{_named(unknown)} made too few steps to tell how fast {'it is' if len(unknown) == 1 else 'they are'}",
            _measured(facts),
        ]
    slow = slow_ranks(facts.steps)
    found = [_slowness(slow)] if slow else []
    if facts.in_lock_step:
        # Ranks wait for each other by intent.
        part = f"{facts.exchange_fraction:.0%} of worker time went into that and the exchange"
        return [*found, f"each update waited for a gradient of every rank, as under DDP: {part}"]
    found.append(_bound(facts))
    crowded = [f"{ranks} ranks on {cores} cores" for ranks, cores in facts.shared_cores()]
    starved = facts.places is not None and facts.places < facts.ranks
    if facts.exchange_fraction >= _COSTLY_EXCHANGE and not starved:
        cause = (
            f"with {crowded[0]} a part of that is waiting for a core"
            if crowded
            else "rank 0 or the transport is the bottleneck, where larger batches, accumulate_grad_batches or fewer "
            "ranks help more than asynchrony"
        )
        found.append(
            f"handing in gradients and getting parameters took {facts.exchange_fraction:.0%} of worker time: {cause}"
        )
    found.append(_lock_step(facts, slow, crowded))
    return found


def _churn(facts: RunFacts) -> list[str]:
    """Who was lost and who came.

    Examples:
        >>> facts = RunFacts(8, "wait", True, 1.0, 9, 0, [[]] * 3, [], [], evicted=[2, 1, 2], joined=[2, 3])
        >>> _churn(facts)
        ['ranks 1 and 2 were lost (2 twice); rank 2 came back', 'rank 3 joined']
    """
    lost = sorted(set(facts.evicted))
    back = sorted(rank for rank in set(facts.joined) if rank in lost)
    new = sorted(set(facts.joined) - set(lost))
    told = []
    if lost:
        counts = Counter(facts.evicted)
        often = ", ".join(f"{rank} {_times(count)}" for rank, count in sorted(counts.items()) if count > 1)
        line = f"{_named(lost)} {'was' if len(lost) == 1 else 'were'} lost{f' ({often})' if often else ''}"
        if back == lost:
            told.append(f"{line} and came back")
        else:
            told.append(f"{line}; {_named(back)} came back" if back else f"{line}, and the others went on")
    if new:
        told.append(f"{_named(new)} joined")
    return told


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def _lock_step(facts: RunFacts, slow: Mapping[int, float], crowded: Sequence[str]) -> str:
    """What lock step would have taken, where that can be told."""
    if facts.gain_measured is not None:
        # The run itself is partly one in lock step.
        return (
            f"up to version {facts.apart_from} the ranks were measured in lock step, in which the rest would take an "
            f"estimated {facts.gain_measured:.1f}x as long"
        )
    lock_step = estimate(facts)
    if not lock_step.known:
        if not facts.cpu or not facts.all_reduce_s:
            return "what lock step would take is not known, since the run ended before its ranks met"
        where = f", with {crowded[0]}" if crowded else ""
        return f"ranks wait for cores{where}, so what lock step would take cannot be told from this run"
    gain = lock_step.factor
    among = f" ({crowded[0]})" if crowded else ""
    if gain >= _LITTLE_GAIN:
        return f"in lock step the same batches would take an estimated {gain:.1f}x as long{among}"
    if slow and not facts.shared:
        return (
            "with equal shares the slowest rank sets the pace, as in lock step: batches='shared' would let the others "
            "take over"
        )
    return (
        f"the ranks are about equally fast{among}: lock step would take an estimated {max(gain, 1.0):.2f}x as long, so "
        "asynchrony gains little here"
    )


def diagnosis_line(facts: RunFacts) -> str:
    """The conclusions in one line."""
    line = "; ".join(conclusions(facts))
    return f"{line[0].upper()}{line[1:]}."


def _named(ranks: Sequence[int]) -> str:
    """The ranks in words; ranges where there are many.

    Examples:
        >>> _named([3]), _named([1, 3]), _named([0, 2, 3, 4, 5, 9])
        ('rank 3', 'ranks 1 and 3', 'ranks 0, 2 to 5 and 9')
    """
    words = [
        word
        for run in runs_of(ranks)
        for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(rank) for rank in run])
    ]
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _rejections(counts: Mapping[int, int]) -> str:
    total = sum(counts.values())
    subject = "1 gradient was" if total == 1 else f"{total} gradients were"
    each = ", ".join(f"{count} of rank {rank}" for rank, count in list(counts.items())[:_NAMED])
    more = f" and {len(counts) - _NAMED} others" if len(counts) > _NAMED else ""
    return f"{subject} not finite (NaN or infinity) and not applied: {each}{more}"


def _slowness(slow: Mapping[int, float]) -> str:
    low, high = f"{min(slow.values()):.1f}", f"{max(slow.values()):.1f}"
    factor = f"{low}x" if low == high else f"{low} to {high}x"
    return f"{_named(list(slow))} take{'s' if len(slow) == 1 else ''} {factor} the median step of the others"


def _measured(facts: RunFacts) -> str:
    """What the bound cost, without a guess at what another one would."""
    if facts.max_staleness is None:
        return "no bound was set, so nothing waited for it"
    if facts.on_stale == "drop":
        part = facts.dropped / max(1, facts.dropped + facts.updates)
        return f"{part:.{0 if part >= _COSTLY_BARRIER else 1}%} of the gradients were dropped as too stale"
    cost = facts.parked_fraction
    if cost < 0.0005:
        return "the barrier cost nothing"
    return f"the barrier cost {cost:.{0 if cost >= _COSTLY_BARRIER else 1}%} of worker time"


def _bound(facts: RunFacts) -> str:
    bound, ranks, said = facts.max_staleness, facts.ranks, _measured(facts)
    if bound is None or facts.places is None:
        return said
    # The smallest that lets all ranks compute at a time.
    least = -(-ranks // facts.gradients_per_update) - 1
    if facts.on_stale == "drop":
        if facts.dropped < _COSTLY_BARRIER * (facts.dropped + facts.updates):
            return said
        free = _free(facts)
        return f"{said}; a bound of {free} would drop hardly any" if free > bound else said
    if bound < least:
        return (
            f"a bound of {bound} lets only {facts.places} of {ranks} ranks compute at a time; "
            f"a bound of {max(least, _free(facts))} would cost none"
        )
    cost, free = facts.parked_fraction, _free(facts)
    if cost >= _COSTLY_BARRIER:
        return f"{said}; a bound of {free} would cost none" if free > bound else said
    smaller = max(free, least)
    if 2 * smaller <= bound:
        return f"{said}; a bound of {smaller} would not cost more, and gradients would be fresher"
    return said


def _free(facts: RunFacts) -> int:
    return free_bound(facts.steps, gradients_per_update=facts.gradients_per_update)
