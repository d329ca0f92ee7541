"""How many batches user code takes for an optimizer step, as far as it has shown. Pure; used by `manual.py`.

Under manual optimization the steps are user code's affair: it may step in each batch, accumulate over four
(``(batch_idx + 1) % 4 == 0``) or step two optimizers in each. The hand-out of batches must know, so that batches that
make one update go to one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Rhythm", "Seen", "usual_group"]


class Seen(NamedTuple):
    """What a rank has seen of user code's rhythm.

    Args:
        groups: number of batches for a step -> how often there were so many.
        steps: the most steps that a batch has made and that the trainer counts.
    """

    groups: dict[int, int]
    steps: int


class Rhythm:
    """Notes a rank's batches and steps.

    Examples:
        >>> rhythm = Rhythm()
        >>> for batch_idx in range(8):
        ...     rhythm.begin_batch()
        ...     if (batch_idx + 1) % 4 == 0:
        ...         rhythm.step()
        >>> rhythm.seen.groups, rhythm.open_batches
        ({4: 2}, 0)
    """

    def __init__(self) -> None:
        self._groups: Counter[int] = Counter()
        self._most_steps = 1
        self._steps = 0
        self.open_batches = 0

    def begin_batch(self) -> None:
        """Notes that a batch begins."""
        self.open_batches += 1
        self._steps = 0

    def step(self, counted: int = 1) -> None:
        """Notes a step.

        Args:
            counted: by how many steps the trainer's count is ahead of the last one here.
        """
        if self.open_batches:
            self._groups[self.open_batches] += 1
            self.open_batches = 0
        self._steps += counted
        self._most_steps = max(self._most_steps, self._steps)

    def drop_open(self) -> None:
        """Forgets batches that no step was made for: their rank has met the others."""
        self.open_batches = 0

    @property
    def has_stepped(self) -> bool:
        """Whether there was a step."""
        return bool(self._groups)

    @property
    def seen(self) -> Seen:
        """What this rank has seen."""
        return Seen(dict(self._groups), self._most_steps)


def usual_group(ranks: Iterable[Seen]) -> int | None:
    """The number of batches that most steps were made for; the larger of two; None if there was no step.

    A step that user code leaves out now and then, because a gradient is not finite for instance, makes two batches of
    one step and no rhythm.

    Examples:
        >>> usual_group([Seen({1: 1, 4: 7}, 1), Seen({4: 2}, 1)]), usual_group([Seen({}, 1)])
        (4, None)
    """
    groups: Counter[int] = Counter()
    for rank in ranks:
        groups.update(rank.groups)
    return max(groups, key=lambda batches: (groups[batches], batches), default=None)
