"""How long each step of each worker takes, in virtual time."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, Protocol, TypeAlias

from lightning_async.monitoring.record import RunRecord

__all__ = ["StepSpec", "StepTime", "StepTimes", "check_seconds"]

Distribution: TypeAlias = Literal["constant", "normal", "lognormal", "uniform", "exponential"]

# Distribution -> the largest spread with which no step (of a normal one: of a thousand, one) would be below zero.
_LARGEST_SPREAD = {
    "constant": 0.0,
    "normal": 1 / 3,
    "lognormal": math.inf,
    "uniform": 1 / math.sqrt(3),
    "exponential": 1.0,
}
_NORMAL = NormalDist()
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class _Steps(Protocol):
    """The steps of a worker."""

    @property
    def mean(self) -> float:
        """Their mean, in seconds."""

    def at(self, chance: float) -> float:
        """The step that a number drawn evenly from 0 to 1, both excluded, stands for."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """A distribution of step times.

    Args:
        mean: in seconds.
        spread: standard deviation as a part of the mean; ``"exponential"`` takes 1.0 by default.
        distribution: ``"constant"``; ``"normal"`` (spread at most 1/3, since no step is negative); ``"lognormal"``;
            ``"uniform"`` (at most 0.577); ``"exponential"``: a least time and an exponential one on top, with spread
            1.0 no least time.

    Raises:
        ValueError: if a number has no meaning.

    Examples:
        >>> steps = StepTime(2.0, spread=0.1, distribution="uniform")
        >>> round(steps.at(0.5), 6), round(steps.at(0.999999), 3)
        (2.0, 2.346)
    """

    mean: float
    spread: float | None = None
    distribution: Distribution = "constant"

    def __post_init__(self) -> None:
        if self.distribution not in _LARGEST_SPREAD:
            names = ", ".join(map(repr, _LARGEST_SPREAD))
            raise ValueError(f"The distribution of a step time is one of {names}, not {self.distribution!r}.")
        check_seconds("A step", self.mean)
        object.__setattr__(self, "mean", float(self.mean))
        if self.spread is None:
            if self.distribution not in ("constant", "exponential"):
                raise ValueError(f"A {self.distribution} step time needs a spread: standard deviation / mean.")
            object.__setattr__(self, "spread", _LARGEST_SPREAD[self.distribution])
        largest = _LARGEST_SPREAD[self.distribution]
        if not _is_number(self.spread) or not 0.0 <= float(self.spread or 0.0) <= largest:
            raise ValueError(
                f"The spread of a {self.distribution} step time, standard deviation / mean, is 0 to {largest:.3g}, not "
                f"{self.spread!r}. Take distribution='lognormal' for a larger one."
            )

    def at(self, chance: float) -> float:
        """The step that a number drawn evenly from 0 to 1, both excluded, stands for."""
        mean, spread = self.mean, self.spread or 0.0
        if spread == 0.0:
            return mean
        if self.distribution == "normal":
            return max(0.0, mean * (1.0 + spread * _NORMAL.inv_cdf(chance)))
        if self.distribution == "uniform":
            return mean * (1.0 + math.sqrt(3.0) * spread * (2.0 * chance - 1.0))
        if self.distribution == "exponential":
            return mean * (1.0 - spread - spread * math.log(chance))
        variance = math.log1p(spread * spread)
        return mean * math.exp(math.sqrt(variance) * _NORMAL.inv_cdf(chance) - variance / 2)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Steps of a rank of a run, each as likely as the others."""

    steps: Sequence[float]

    @property
    def mean(self) -> float:
        return sum(self.steps) / len(self.steps)

    def at(self, chance: float) -> float:
        """The step that a number drawn evenly from 0 to 1, both excluded, stands for."""
        return self.steps[int(chance * len(self.steps))]


# What describes the steps of a worker, and those of a cluster; see `StepTimes.of`.
WorkerSteps: TypeAlias = float | Mapping[str, Any] | StepTime
StepSpec: TypeAlias = WorkerSteps | Sequence[WorkerSteps | Sequence[float]] | str | os.PathLike[str]


class StepTimes:
    """Random step times that depend on seed, worker and number of the step only, so that a resumed run draws the same.

    Args:
        workers: the steps of each worker.
        seed: any whole number.

    Examples:
        >>> times = StepTimes.of([1, 1, {"mean": 4, "spread": 0.1, "distribution": "lognormal"}], seed=7)
        >>> times.workers, times.draw(0, 12), times.mean(2)
        (3, 1.0, 4.0)
        >>> times.draw(2, 0) == times.draw(2, 0) != times.draw(2, 1)
        True
        >>> StepTimes.of([1, 1, 1, 4], workers=100_000).workers
        100000
    """

    def __init__(self, workers: Sequence[_Steps], seed: int = 0) -> None:
        _check_seed(seed)
        self._of = workers
        self._key = _mix(seed)

    @classmethod
    def of(cls, spec: StepSpec, workers: int | None = None, seed: int = 0) -> StepTimes:
        """Step times of a cluster that is described in one of several ways.

        Args:
            spec: for each worker a number (seconds, always the same), a `StepTime`, a mapping of its arguments
                (``{"mean": 0.2, "spread": 0.1, "distribution": "lognormal"}``), or a list of seconds to draw from; one
                of these alone with ``workers``; or the path of a recorded run (its folder or its ``async_run.json``),
                whose ranks' steps are drawn from.
            workers: their number, if it is not that of ``spec``. Each of the given ones is then there as often as the
                others; those that cannot be divided evenly are drawn by the seed.
            seed: of the draws.

        Raises:
            ValueError: if the description has no meaning, or the recorded run has no steps of a rank.
            RecordError: if there is no record at the path.
        """
        _check_seed(seed)
        given = [_steps(one) for one in _each(spec)]
        if workers is None:
            if not _is_several(spec):
                raise ValueError(f"step_seconds={spec!r} describes one worker. Say how many with workers=N.")
            return cls(given, seed)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be an int of at least 1, not {workers!r}.")
        copies, rest = divmod(workers, len(given))
        # A text seeds through a hash: this has nothing to do with the draws of steps.
        chosen = sorted(random.Random(f"workers:{seed}").sample(range(len(given)), rest))
        return cls([*given * copies, *(given[index] for index in chosen)], seed)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self._of)

    def mean(self, worker: int) -> float:
        """Mean seconds of a worker's steps."""
        return self._of[worker].mean

    def draw(self, worker: int, number: int) -> float:
        """Seconds of a worker's step number ``number``."""
        # 52 bits and a half: neither 0 nor 1.
        chance = ((_mix(_mix(self._key + worker) + number) >> 12) + 0.5) * 2.0**-52
        return self._of[worker].at(chance)


def _mix(value: int) -> int:
    """The finalizer of SplitMix64: neighbouring numbers give numbers that have nothing to do with each other."""
    value = (value + _GOLDEN) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _is_several(spec: object) -> bool:
    return isinstance(spec, (str, os.PathLike)) or (isinstance(spec, Sequence) and not isinstance(spec, StepTime))


def _each(spec: Any) -> Sequence[Any]:
    if isinstance(spec, (str, os.PathLike)):
        return _recorded(Path(spec))
    if not _is_several(spec):
        return [spec]
    if not spec:
        raise ValueError("step_seconds is empty. Give the seconds of each worker's steps, as in [1.0, 1.0, 4.0].")
    return list(spec)


def _recorded(path: Path) -> Sequence[Sequence[float]]:
    steps = RunRecord.read(path).step_seconds
    if not steps:
        raise ValueError(
            f"The run at {path} was not trained by an asynchronous strategy: it has no steps of its ranks."
        )
    for rank, own in enumerate(steps):
        if not own:
            raise ValueError(f"The run at {path} has no steps of rank {rank}; take one of more batches.")
    return steps


def _steps(one: Any) -> _Steps:
    if isinstance(one, StepTime):
        return one
    if isinstance(one, Mapping):
        known = {field.name for field in dataclasses.fields(StepTime)}
        if "mean" not in one or one.keys() - known:
            raise ValueError(f"A step time has mean, spread and distribution; {dict(one)!r} is none.")
        return StepTime(**one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        if not one:
            raise ValueError("A worker's list of step seconds is empty.")
        for seconds in one:
            check_seconds("A step", seconds)
        return _Recorded(one)
    return StepTime(one)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_seconds(what: str, seconds: object) -> None:
    """Refuses what is no number of seconds.

    Raises:
        ValueError: if it is none.
    """
    if not _is_number(seconds) or not 0.0 <= seconds < math.inf:  # type: ignore[operator]
        raise ValueError(f"{what} takes a number of seconds of at least 0, not {seconds!r}.")


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, not {seed!r}.")
