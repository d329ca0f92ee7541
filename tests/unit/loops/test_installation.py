"""What is put in place in a trainer is taken away again, whole, whatever happens in between."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar, WeightAveraging
from torchmetrics import Metric

from lightning_async import RunStats
from lightning_async.loops import installation
from lightning_async.loops.epoch_loop import AsyncEpochLoop
from lightning_async.loops.installation import InstalledLoops, install
from lightning_async.loops.phase import Phase

# In the order in which `install` makes them.
STEPS = (
    "set_until_closed",
    "become_until_closed",
    "show_all_ranks",
    "save_by_clock",
    "average_by_clock",
    "_note_signals",
    "begin_from_snapshot",
    "MetricSync",
    "InstalledLoops",
)


def make_trainer(folder: Path) -> Trainer:
    callbacks = [TQDMProgressBar(), ModelCheckpoint(every_n_train_steps=3), WeightAveraging()]
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, logger=False, callbacks=callbacks)


def put_in_place(trainer: Trainer) -> InstalledLoops:
    signals: Any = object()
    collectives: Any = object()
    snapshots: Any = object()
    return install(trainer, "async", collectives, Phase(), signals, lambda: RunStats(1), lambda count: None, snapshots)


def state_of(trainer: Trainer) -> list[Any]:
    """Classes and attributes of all that is changed."""
    fit_loop: Any = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    untyped: Any = trainer
    connectors = [untyped._signal_connector, untyped._checkpoint_connector]
    owners = [fit_loop, epoch_loop, epoch_loop.automatic_optimization, *connectors, *untyped.callbacks]
    return [Metric.sync, *[(type(owner), copy.copy(vars(owner))) for owner in owners]]


def test_what_is_installed_is_removed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = state_of(trainer)

    loops = put_in_place(trainer)
    assert isinstance(trainer.fit_loop.epoch_loop, AsyncEpochLoop)
    changed = [was != now for was, now in zip(before, state_of(trainer), strict=True)]
    loops.remove()
    loops.remove()

    assert all(changed[:8])
    assert state_of(trainer) == before


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_in_the_middle_leaves_lightning_untouched(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    before = state_of(trainer)
    own = getattr(installation, step)
    calls = iter(range(100))

    def fail_in_the_middle(*arguments: Any, **named: Any) -> Any:
        # Of the steps that are made several times the second one fails.
        if step.endswith("until_closed") and next(calls) == 0:
            return own(*arguments, **named)
        raise MemoryError(step)

    monkeypatch.setattr(installation, step, fail_in_the_middle)

    with pytest.raises(MemoryError, match=step):
        put_in_place(trainer)

    assert state_of(trainer) == before
