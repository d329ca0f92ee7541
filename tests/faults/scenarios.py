"""Runs of the soak, each made of a seed: how many ranks train how, and where what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_async.chaos import Fault

__all__ = ["Scenario"]

# Where a rank of a run is struck that trains already, and up to which passage of the place.
_PLACES = {
    "draw": 3,
    "compute": 25,
    "push": 25,
    "mid-push": 25,
    "parked": 25,
    "mid-pull": 25,
    "meeting": 60,
    "met": 60,
    "group": 3,
    "collective": 40,
    "validation_step": 9,
    "on_validation_epoch_end": 3,
    "on_train_epoch_end": 3,
    "on_save_checkpoint": 3,
}
# Of a replacement, besides.
_PLACES_OF_JOINING = {"setup": 0, "handshake": 3}
# Where a rank is struck soon after it has begun, life after life: in training, and where the ranks meet.
_SOON = {"draw": 1, "compute": 6, "push": 6, "mid-push": 6, "mid-pull": 6, "setup": 0, "handshake": 2}
_WHERE_THEY_MEET = {
    "meeting": 6,
    "met": 6,
    "group": 0,
    "collective": 6,
    "validation_step": 2,
    "on_validation_epoch_end": 0,
    "on_train_epoch_end": 0,
}
_LIVES = 8


@dataclass(frozen=True)
class Scenario:
    """A run and what goes wrong in it.

    Args:
        seed: what it was made of.
        ranks: number of ranks.
        strategy: arguments of the strategy.
        epochs: number of epochs.
        tickets: batches of an epoch.
        validate_every: of the trainer's ``val_check_interval``.
        sleep_s: seconds that a step takes.
        faults: what goes wrong.
        backs_off: a lost rank is started again as late as it would be if it failed by itself.
    """

    seed: int
    ranks: int
    strategy: dict[str, Any]
    epochs: int
    tickets: int
    validate_every: float
    sleep_s: float
    faults: tuple[Fault, ...] = field(default=())
    backs_off: bool = True

    @property
    def ends(self) -> bool:
        """Whether the run is to end with an error: it cannot go on without rank 0."""
        return any(fault.rank == 0 for fault in self.faults)

    @classmethod
    def of(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        dice = random.Random(seed)
        ranks = dice.choice([2, 3, 3, 4, 5])
        stops = dice.random() < 0.15
        per_update = dice.choice([1, 1, 2])
        strategy: dict[str, Any] = {
            "start_method": "fork",
            "on_worker_failure": "continue",
            "transport": dice.choice(["shm", "tcp"]),
            "holder": dice.choice(["thread", "thread", "process"]),
            "batches": dice.choice(["shared", "shared", "sharded"]),
            "gradients_per_update": per_update,
            "max_staleness": dice.choice(["auto", 0, 1, ranks, None]),
            "max_restarts": dice.choice([0, 1, 3, 3]),
            "worker_timeout": 1.5 if stops else 600.0,
            "summary": False,
        }
        scenario = cls(
            seed=seed,
            ranks=ranks,
            strategy=strategy,
            epochs=dice.choice([2, 3, 4]),
            tickets=dice.choice([24, 40, 61]) * ranks // 2,
            validate_every=dice.choice([1.0, 1.0, 0.5]),
            sleep_s=dice.choice([0.002, 0.005, 0.01]),
            faults=_faults(dice, ranks, stops, strategy["max_restarts"]),
        )
        if strategy["max_restarts"] == 3 and not stops and not scenario.ends:
            return scenario._with_many_lives(dice)
        return scenario

    def _with_many_lives(self, dice: random.Random) -> Scenario:
        """The same, but longer, and each rank but for rank 0 dies again and again."""
        faults = [
            _fault_soon(dice, rank, incarnation) for rank in range(1, self.ranks) for incarnation in range(_LIVES)
        ]
        return replace(
            self,
            strategy=self.strategy | {"max_restarts": _LIVES + 1},
            epochs=4,
            tickets=60 * self.ranks,
            sleep_s=0.02,
            faults=tuple(faults),
            backs_off=False,
        )


def _fault_soon(dice: random.Random, rank: int, incarnation: int) -> Fault:
    places = _WHERE_THEY_MEET if dice.random() < 0.25 else _SOON
    place = dice.choice([place for place in places if incarnation or place not in _PLACES_OF_JOINING])
    return Fault(rank, dice.randint(0, places[place]), "kill", place, 0.0, incarnation)


def _faults(dice: random.Random, ranks: int, stops: bool, most_restarts: int) -> tuple[Fault, ...]:
    if dice.random() < 0.05:
        return (_fault(dice, 0, 0, False),)
    faults: list[Fault] = []
    for _ in range(dice.choice([1, 1, 2, 3])):
        rank = dice.randrange(1, ranks)
        # A replacement has somebody to replace.
        last = dice.choice([0, 0, 0, 1, 1, 2]) if most_restarts else 0
        faults += [_fault(dice, rank, incarnation, stops) for incarnation in range(last + 1)]
    if ranks > 2 and dice.random() < 0.3:
        # Several at once.
        first = faults[0]
        others = dice.sample([rank for rank in range(1, ranks) if rank != first.rank], dice.randint(1, ranks - 2))
        faults += [
            Fault(rank, first.step, first.kind, first.place, first.after_s, first.incarnation) for rank in others
        ]
    return tuple(faults)


def _fault(dice: random.Random, rank: int, incarnation: int, stops: bool) -> Fault:
    places = _PLACES | (_PLACES_OF_JOINING if incarnation else {})
    place = dice.choice([*places])
    kind = dice.choice(["kill", "stop", "pause"]) if stops else "kill"
    # Shorter and longer than the time-out.
    after_s = dice.choice([0.3, 2.5]) if kind == "pause" else dice.choice([0.0, 0.0, 0.05])
    return Fault(rank, dice.randint(0, places[place]), kind, place, after_s, incarnation)
