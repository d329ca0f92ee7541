"""How far several runs are: a bar for all of them and a line for each that is under way."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from typing_extensions import Self

from lightning_async.cli.compare.runner import Job, Outcome
from lightning_async.monitoring.tables import printable

__all__ = ["RunsDisplay"]


class RunsDisplay:
    """Shows how many runs are done, how far the running ones are, and how each has ended.

    The bars are on stderr and in a terminal only; a line for each run that has ended goes to stdout.

    Args:
        runs: their number.
        describe: what to say of the result of a run that has ended well; may be nothing.
    """

    def __init__(self, runs: int, describe: Callable[[Job], str] = lambda job: "") -> None:
        self._describe = describe
        self._all = _Bar("runs", runs)
        self._running: dict[str, _Bar] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in [*self._running.values(), self._all]:
            bar.close()

    def started(self, job: Job) -> None:
        """Shows the run, which starts."""
        self._running[job.name] = _Bar(job.name)

    def progressed(self, job: Job, record: Mapping[str, Any]) -> None:
        """Shows how many epochs of the run are done."""
        evaluations, epochs = record.get("evaluations"), record.get("max_epochs")
        if evaluations:
            self._running[job.name].show(evaluations[-1]["epoch"], epochs if epochs and epochs > 0 else None, "epochs")

    def waiting(self) -> None:
        """Lets the clocks go on."""
        for bar in [*self._running.values(), self._all]:
            bar.tick()

    def ended(self, outcome: Outcome) -> None:
        """Says how the run has ended."""
        if outcome.job.name in self._running:
            self._running.pop(outcome.job.name).close()
        self._all.add_one()
        self.say(self._sentence(outcome))

    def say(self, text: str) -> None:
        """Prints, over the bars."""
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()

    def _sentence(self, outcome: Outcome) -> str:
        if outcome.failure:
            return f"✗ {outcome.job.name}: {outcome.failure}"
        seconds = f"{outcome.seconds:.0f} s" if outcome.seconds else "was finished"
        return ", ".join(filter(None, [f"✓ {outcome.job.name}: {seconds}", self._describe(outcome.job)]))


class _Bar:
    """A line that says how much is done; a bar too where the total is known. In a terminal only."""

    def __init__(self, name: str, total: int | None = None) -> None:
        self._name = name
        self._done = 0.0
        self._ticked_s = time.monotonic()
        # disable=None: not where stderr is no terminal.
        looks: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "bar_format": "{desc} {elapsed}"}
        self._bar: Any = tqdm(desc=name, total=total, leave=False, **looks)
        self.show(0, total)

    def show(self, done: float, total: int | None, unit: str = "") -> None:
        self._done = done
        so_far = f"{done:.3g} of {total} {unit}" if total else f"{done:.3g} {unit}" if unit else "starts"
        self._bar.desc = f"{self._name}: {so_far}".rstrip()
        self._bar.total, self._bar.n = total, done
        if total:
            self._bar.bar_format = "{desc} |{bar:24}| {elapsed}"
        self._bar.refresh()

    def add_one(self) -> None:
        self.show(self._done + 1, self._bar.total)

    def tick(self) -> None:
        now_s = time.monotonic()
        if now_s - self._ticked_s >= 1.0:
            self._ticked_s = now_s
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
