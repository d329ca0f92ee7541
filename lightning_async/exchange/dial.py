"""The dial between DDP and the paper's method, and what "auto" makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from lightning_async.exchange import auto
from lightning_async.exchange.auto import Choice
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.monitoring.stats import RunStats
from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.momentum import momentum_rule
from lightning_async.policies.registry import describe_policy, make_policy

__all__ = ["Dial", "GradientsPerUpdate", "RunDial", "policy_and_momentum"]

# The strategy's argument `gradients_per_update`.
GradientsPerUpdate: TypeAlias = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Dial:
    """How many gradients make an update, and what is done with their age, as the user has asked.

    Args:
        gradients_per_update: a number, or ``"auto"``.
        staleness_policy: a policy, a name, or None for ``"plain"``, or ``"from_ddp"`` where ``"auto"`` has chosen not
            to wait for all ranks.

    Raises:
        ValueError: if the number is none.
    """

    gradients_per_update: GradientsPerUpdate
    staleness_policy: str | StalenessPolicy | None

    def __post_init__(self) -> None:
        count: object = self.gradients_per_update
        if count != "auto" and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f'gradients_per_update must be an int of at least 1 or "auto", not {count!r}.')

    @property
    def policy(self) -> str | StalenessPolicy:
        """What is done with a gradient because of its age, before anything is measured."""
        return "plain" if self.staleness_policy is None else self.staleness_policy

    def is_measured(self, workers: int, optimizers: int) -> bool:
        """Whether step times decide how many gradients make an update.

        Args:
            workers: number of ranks, N.
            optimizers: their number; with several each gradient is an update.
        """
        return self.gradients_per_update == "auto" and workers > 1 and optimizers == 1

    def possible(self, asked: ExchangeOptions, workers: int) -> list[ExchangeOptions]:
        """What may come into force, as `options` takes it."""
        choices = [None, Choice(-(-workers // 2), 1.0, (0.0,) * workers)]
        return [self.options(asked, workers, choice=choice) for choice in choices]

    def options(
        self, asked: ExchangeOptions, workers: int, optimizers: int = 1, choice: Choice | None = None
    ) -> ExchangeOptions:
        """What is in force.

        Lock step is a gradient of each rank at the same parameters. It keeps any bound, so the user's stays for what
        comes after it.

        Args:
            asked: the strategy's arguments.
            workers: number of ranks, N.
            optimizers: their number.
            choice: what ``"auto"`` has chosen; None before that.

        Examples:
            >>> dial, asked = Dial("auto", None), ExchangeOptions(max_staleness=8)
            >>> def shown(options):
            ...     return options.gradients_per_update, options.max_staleness, options.staleness_policy
            >>> shown(dial.options(asked, 4)), shown(dial.options(asked, 4, choice=Choice(2, 3.2, (1, 1, 1, 4))))
            ((4, 0, 'plain'), (2, 8, 'from_ddp'))
            >>> shown(dial.options(asked, 4, optimizers=2)), shown(Dial(3, None).options(asked, 4))
            ((1, 8, 'from_ddp'), (3, 8, 'plain'))
        """
        asked = replace(asked, staleness_policy=self.policy)
        if self.gradients_per_update != "auto":
            return replace(asked, gradients_per_update=self.gradients_per_update)
        gradients = workers if choice is None else choice.gradients
        if not self.is_measured(workers, optimizers):
            gradients = 1
        elif choice is None or choice.waits_for_all:
            # With two gradients of each rank under way, one of them is of the version before.
            bound = 1 if asked.overlap else 0
            return replace(asked, gradients_per_update=gradients, max_staleness=bound, on_stale="wait")
        policy = self.staleness_policy or "from_ddp"
        return replace(asked, gradients_per_update=gradients, staleness_policy=policy)


class RunDial:
    """The dial of one fit: what was asked for, what was measured, what was chosen; the same on every rank.

    Args:
        dial: what was asked for.
        asked: the strategy's other arguments.
        workers: number of ranks, N.
        stats: tells what was measured in this fit; on rank 0.
        optimizers: tells their number.

    Attributes:
        choice: what ``"auto"`` has chosen; None before that, and where there is nothing to choose.
        rounds: steps of each rank that were measured by the last time that the ranks have met.

    Examples:
        >>> run = RunDial(Dial("auto", None), ExchangeOptions(), 4, stats=lambda: RunStats(4))
        >>> run.steps_to_measure, run.options.gradients_per_update
        (24, 4)
        >>> run.load({"auto": {"measured": [[0.02] * 31] * 3 + [[0.08] * 31]}})
        >>> run.choice = run.choose()
        >>> run.steps_to_measure, run.options.gradients_per_update
        (None, 2)
        >>> print(run.notice)
        gradients_per_update="auto": 2 gradients an update for 4 ranks, whose steps take 20, 20, 20 and 80 ms: an \
estimated 3.2 times as fast as in lock step; staleness_policy=from_ddp, so that learning rate and momentum can be \
those of DDP.
    """

    def __init__(
        self,
        dial: Dial,
        asked: ExchangeOptions,
        workers: int,
        stats: Callable[[], RunStats],
        optimizers: Callable[[], int] = lambda: 1,
    ) -> None:
        self._dial = dial
        self._asked = asked
        self._workers = workers
        self._stats = stats
        self._optimizers = optimizers
        self.choice: Choice | None = None
        self.rounds = 0
        # What a run that this one goes on from has measured.
        self._before: Sequence[Sequence[float]] = [()] * workers

    @property
    def options(self) -> ExchangeOptions:
        """What is in force."""
        return self._dial.options(self._asked, self._workers, self._optimizers(), self.choice)

    @property
    def steps_to_measure(self) -> int | None:
        """After how many steps of each rank the ranks are to meet, so that `choose` can be asked; None for never."""
        if self.choice is not None or not self._is_measured:
            return None
        # The first of a segment is not timed.
        return max(2, auto.WARM_UP_STEPS - self.rounds)

    @property
    def _is_measured(self) -> bool:
        return self._dial.is_measured(self._workers, self._optimizers())

    def choose(self, update_s: float | None = None) -> Choice | None:
        """What is to be chosen, by what was measured; see `auto.choose`.

        Args:
            update_s: seconds that the holder works on a gradient; None takes what was measured.
        """
        stats = self._stats()
        update_s = stats.seconds_an_update if update_s is None else update_s
        measured = self._measured_of_living
        chosen = auto.choose(measured, update_s, stats.busiest_host)
        self.rounds = min(map(len, measured))
        waited = tuple(stats.wait_seconds_by_rank.values())
        return None if chosen is None else chosen._replace(waited_seconds=waited)

    def begin_at(self, version: int) -> None:
        """Notes the version that the choice holds from."""
        assert self.choice is not None
        self.choice = self.choice._replace(version=version)

    @property
    def described(self) -> dict[str, Any]:
        """What "auto" has chosen, and why, ready for JSON; empty if nothing was left to it."""
        if self._dial.gradients_per_update != "auto":
            return {}
        why = "step times are measured; each update is made of a gradient of each rank, as under DDP"
        if self.steps_to_measure is None:
            why = "nothing to choose with one rank" if self._workers == 1 else self._reason
        return {"auto": {"why": why, **({} if self.choice is None else self.choice._asdict())}}

    @property
    def requested(self) -> dict[str, Any]:
        """What the user has asked for where something else is in force."""
        if self._dial.gradients_per_update != "auto":
            return {}
        options, names = self.options, ("max_staleness", "on_stale")
        changed = {name: getattr(self._asked, name) for name in names}
        return {"gradients_per_update": "auto"} | {
            name: value for name, value in changed.items() if value != getattr(options, name)
        }

    @property
    def notice(self) -> str | None:
        """What "auto" has chosen and why, in a line; None if nothing was left to it, or there is nothing to say yet."""
        if self._dial.gradients_per_update != "auto" or self._workers == 1 or self.steps_to_measure is not None:
            return None
        return f'gradients_per_update="auto": {self._reason}.'

    @property
    def _reason(self) -> str:
        options, ranks = self.options, f"{self._workers} ranks"
        policy = f"staleness_policy={describe_policy(options.staleness_policy)}"
        if self._dial.staleness_policy is None:
            policy += ", so that learning rate and momentum can be those of DDP"
        if self.choice is None:
            return f"1 gradient an update for {ranks}, since there are several optimizers; {policy}"
        seconds = f"whose steps take {_listed(self.choice.step_seconds)}"
        if self.choice.waits_for_all:
            return (
                f"as under DDP, each update is made of a gradient of each of {ranks}, {seconds}: without waiting they "
                f"would be an estimated {self.choice.gain:.2f} times as fast, and less than {auto.LEAST_GAIN:g} is "
                "not worth it"
            )
        number = f"{options.gradients_per_update} gradient{'s' if options.gradients_per_update > 1 else ''}"
        gain = f"an estimated {self.choice.gain:.1f} times as fast as in lock step"
        return f"{number} an update for {ranks}, {seconds}: {gain}; {policy}"

    @property
    def unfinished(self) -> str | None:
        """What is to be said at the end of a fit that was too short for a choice; None of others."""
        if self.steps_to_measure is None:
            return None
        return (
            f'gradients_per_update="auto": the fit was over before {auto.WARM_UP_STEPS} steps of each rank were '
            "measured, so every update was made of a gradient of each rank, as under DDP."
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the choice or, before that, what was measured; empty if nothing was left to it."""
        if not self._is_measured:
            return {}
        return {"auto": {"measured": self._measured} if self.choice is None else self.choice._asdict()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `state` has returned, unless that was a run of another number of ranks."""
        noted: Mapping[str, Any] = saved.get("auto", {})
        self.choice, self._before = None, [()] * self._workers
        if not self._is_measured:
            return
        if "gradients" in noted and len(noted["step_seconds"]) == self._workers:
            # What was waited before is not in this fit's statistics.
            self.choice = Choice(
                noted["gradients"], noted["gain"], tuple(noted["step_seconds"]), version=noted["version"]
            )
        elif len(noted.get("measured", ())) == self._workers:
            self._before = noted["measured"]

    @property
    def _measured(self) -> list[list[float]]:
        """For each rank the seconds of its steps so far, if they are known here."""
        stats = self._stats()
        return [[*before, *stats.step_seconds(rank)] for rank, before in enumerate(self._before)]

    @property
    def _measured_of_living(self) -> list[list[float]]:
        """The same of the ranks in the run."""
        stats = self._stats()
        return [steps for rank, steps in enumerate(self._measured) if stats.is_in_run(rank)]


def _listed(seconds: Sequence[float]) -> str:
    """Step times in words.

    Examples:
        >>> _listed([0.02, 0.0204, 0.08]), _listed([1.5, 6.0]), _listed([0.5] * 6 + [2.0])
        ('20, 20 and 80 ms', '1.5 and 6.0 s', '0.5 to 2.0 s')
    """
    unit, factor = ("s", 1.0) if max(seconds) >= 1.0 else ("ms", 1e3)
    many = len(seconds) > 6
    values = (min(seconds), max(seconds)) if many else seconds
    shown = [f"{factor * one:.{0 if factor * one >= 10 else 1}f}" for one in values]
    if many:
        return f"{shown[0]} to {shown[1]} {unit}"
    return f"{', '.join(shown[:-1])} and {shown[-1]} {unit}"


def policy_and_momentum(
    options: ExchangeOptions, optimizers: Sequence[torch.optim.Optimizer], workers: int
) -> tuple[StalenessPolicy, Callable[[float], float] | None]:
    """What a holder does with ages, and what becomes of its momentum, told of a run.

    Args:
        options: the run's.
        optimizers: the module's.
        workers: number of ranks, N.

    Raises:
        ValueError: if the policy refuses an optimizer.
    """
    # A copy: another fit begins with what the user has given, not with what this one has learned.
    policy = copy.deepcopy(make_policy(options.staleness_policy))
    policy.bind(workers, options.gradients_per_update)
    for optimizer in optimizers:
        policy.check(optimizer)
    return policy, momentum_rule(options.momentum_correction, workers, options.gradients_per_update)
