"""How many batches user code takes for an optimizer step, as far as it has shown.

Under manual optimization the steps are user code's affair: it may step in each batch, accumulate over four
(``(batch_idx + 1) % 4 == 0``) or step two optimizers in each. The dispatch of batches must know, so that batches that
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
        groups: batches from one step to the next -> how often there were so many.
        first_groups: the same of batches up to a segment's first step, which may be a part of a group.
        steps: the most steps that a batch has made and that the trainer counts.
    """

    groups: dict[int, int]
    first_groups: dict[int, int]
    steps: int


class Rhythm:
    """Notes a rank's batches and steps.

    Examples:
        >>> rhythm = Rhythm()
        >>> for batch_idx in range(8):
        ...     rhythm.begin_batch()
        ...     if (batch_idx + 1) % 4 == 0:
        ...         rhythm.step()
        >>> rhythm.seen.groups, rhythm.seen.first_groups, rhythm.open_batches
        ({4: 1}, {4: 1}, 0)

    Attributes:
        counted: steps so far, as the trainer counts them.
        open_batches: batches since the last step.
    """

    def __init__(self) -> None:
        self._groups: Counter[int] = Counter()
        self._first_groups: Counter[int] = Counter()
        self._follows_step = False
        self._most_steps = 1
        self._steps = 0
        self.counted = 0
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
            (self._groups if self._follows_step else self._first_groups)[self.open_batches] += 1
            self.open_batches = 0
        self._follows_step = True
        self._steps += counted
        self.counted += counted
        self._most_steps = max(self._most_steps, self._steps)

    def end_segment(self) -> None:
        """Forgets batches that no step was made for: their rank has met the others."""
        self.open_batches = 0
        self._follows_step = False

    @property
    def is_shown(self) -> bool:
        """Whether it is known how many batches make a step.

        A step in the first batch says nothing yet: user code may step in each batch, or in the first of four.
        """
        return bool(self._groups) or any(batches > 1 for batches in self._first_groups)

    @property
    def seen(self) -> Seen:
        """What this rank has seen."""
        return Seen(dict(self._groups), dict(self._first_groups), self._most_steps)


def usual_group(ranks: Iterable[Seen]) -> int | None:
    """The number of batches that most steps were made for; the larger of two; None if there was no step.

    A step that user code leaves out now and then, because a gradient is not finite for instance, makes two batches of
    one step and no rhythm.

    Examples:
        >>> usual_group([Seen({1: 1, 4: 7}, {2: 9}, 1), Seen({4: 2}, {}, 1)]), usual_group([Seen({}, {3: 1}, 1)])
        (4, 3)
    """
    ranks = [*ranks]
    groups: Counter[int] = Counter()
    for rank in ranks:
        groups.update(rank.groups)
    if not groups:
        for rank in ranks:
            groups.update(rank.first_groups)
    return max(groups, key=lambda batches: (groups[batches], batches), default=None)
