"""Progress bars that show the whole run. By themselves they show rank 0's batches, which may be more than its share.

A bar's hooks are wrapped while a fit runs: it is told the number of batches that all ranks have finished, divided by
the number of ranks, and its metrics tell what asynchrony does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_async.loops.last_batch import LastBatch
from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.trainer_state import within_epoch
from lightning_async.monitoring.diagnosis import slow_ranks
from lightning_async.monitoring.stats import RunStats

__all__ = ["BarMetrics", "bar_position", "end_live_bars", "say", "show_all_ranks", "show_progress"]

# Numbers that change faster cannot be read.
_REFRESH_S = 0.5
_FIRST_AFTER_S = 0.1
_STEPS_TO_JUDGE = 5


class BarMetrics:
    """What a bar says of the ranks: updates a second and staleness of the last half second, and who is slow.

    Args:
        stats: tells the run's statistics.
    """

    def __init__(self, stats: Callable[[], RunStats]) -> None:
        self._stats = stats
        self._shown: dict[str, str] = {}
        self._seconds, self._updates, self._ages = 0.0, 0, 0

    def current(self) -> Mapping[str, str]:
        """The metrics by name; empty until there is something to tell."""
        stats = self._stats()
        seconds = stats.seconds_so_far() - self._seconds
        updates = stats.updates - self._updates
        if updates > 0 and seconds >= (_REFRESH_S if self._shown else _FIRST_AFTER_S):
            ages = sum(age * count for age, count in stats.counts()["staleness"].items())
            self._shown = {
                "staleness": f"{(ages - self._ages) / updates:.1f}",
                **_slow(stats),
                "upd/s": f"{updates / seconds:.0f}" if updates >= 10 * seconds else f"{updates / seconds:.2g}",
            }
            self._seconds, self._updates, self._ages = self._seconds + seconds, self._updates + updates, ages
        return self._shown


def _slow(stats: RunStats) -> dict[str, str]:
    steps = [stats.step_seconds(rank) for rank in stats.updates_by_rank]
    slow = slow_ranks([own if len(own) >= _STEPS_TO_JUDGE else [] for own in steps])
    if not slow:
        return {}
    rank, factor = max(slow.items(), key=lambda item: item[1])
    others = f"+{len(slow) - 1}" if len(slow) > 1 else ""
    return {"slow": f"rank{rank}{others} {factor:.1f}x"}


def bar_position(previous: int, now: int, every: int, total: float) -> int:
    """The batch count to tell a bar that refreshes at multiples of ``every`` and at ``total``.

    The count may pass a multiple without standing at it.

    Examples:
        >>> [bar_position(previous, now, 5, total=17) for previous, now in [(3, 4), (4, 7), (7, 8), (8, 16), (13, 17)]]
        [4, 5, 8, 15, 17]
    """
    passed = now // every * every
    return passed if passed > previous and now < total else now


def show_all_ranks(trainer: Trainer, stats: Callable[[], RunStats], undo: ExitStack) -> None:
    """Makes the trainer's progress bars show what all ranks have done.

    Args:
        trainer: the trainer.
        stats: tells the run's statistics.
        undo: gives the bars their own hooks again.
    """
    for bar in _bars(trainer):
        _wrap(bar, stats, undo)


def show_progress(trainer: Trainer) -> None:
    """Brings rank 0's bars up to date when all ranks have met: others may have finished the last batches."""
    if not trainer.is_global_zero:
        return
    with within_epoch(trainer):
        for bar in _bars(trainer):
            hook: Any = vars(bar)["on_train_batch_end"]
            hook.catch_up(trainer)


def end_live_bars(trainer: Trainer) -> None:
    """Ends what redraws itself, so that what is printed next stands under the bar's last state.

    Rich's bar would stay until the trainer's teardown and move under every line that is printed before.
    """
    for bar in _bars(trainer):
        if isinstance(bar, RichProgressBar) and bar.progress is not None:
            bar.progress.stop()


def say(trainer: Trainer, line: str) -> None:
    """Prints a line in the middle of a fit, on rank 0, above a progress bar if there is one.

    Args:
        trainer: the trainer.
        line: without its end.
    """
    if not trainer.is_global_zero:
        return
    for bar in _bars(trainer):
        if isinstance(bar, RichProgressBar) and bar.progress is not None:
            bar.progress.console.print(line, markup=False, highlight=False)
            return
        if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.print(line)
            return
    rank_zero_info(line)


def _bars(trainer: Trainer) -> list[ProgressBar]:
    # `trainer.callbacks` is set by a connector.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ProgressBar)]


def _wrap(bar: ProgressBar, stats: Callable[[], RunStats], undo: ExitStack) -> None:
    show, tell = bar.on_train_batch_end, bar.get_metrics
    metrics = BarMetrics(stats)
    last = LastBatch(bar)
    shown = 0

    def on_train_batch_end(
        trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        nonlocal shown
        if not trainer.is_global_zero:
            return
        last.keep(outputs, batch, batch_idx)
        done: int = trainer.fit_loop.epoch_loop.batches_of_all_ranks  # type: ignore[attr-defined]
        previous, shown = (shown if shown <= done else 0), done
        if done > 0:
            every = bar.refresh_rate if isinstance(bar, TQDMProgressBar) else 1
            position = bar_position(previous, done, max(1, every), trainer.num_training_batches)
            show(trainer, pl_module, outputs, batch, position - 1)

    def get_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        # First, since a narrow terminal cuts off what comes last.
        shown = metrics.current() if trainer.is_global_zero else {}
        return {**shown, **tell(trainer, pl_module)}

    def catch_up(trainer: Trainer) -> None:
        done: int = trainer.fit_loop.epoch_loop.batches_of_all_ranks  # type: ignore[attr-defined]
        if done != shown:
            last.show(on_train_batch_end, trainer, trainer.lightning_module)

    on_train_batch_end.catch_up = catch_up  # type: ignore[attr-defined]  # for `show_progress`
    set_until_closed(undo, bar, "on_train_batch_end", on_train_batch_end)
    set_until_closed(undo, bar, "get_metrics", get_metrics)
