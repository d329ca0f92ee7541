"""User code's own signal handlers: a checkpoint that one saves is written when the batch is done, wherever it came."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_async import AsyncStrategy
from lightning_async.data.ledger import Ledger
from lightning_async.holder.types import HalfUpdatedError
from lightning_async.holder.update import FusedUpdate
from tests.harness import Exchange
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader

BATCHES = 24


def interrupt_once(owner: Any, name: str, at: int) -> None:
    """Has a signal come in the middle of a method, at its ``at``-th call in rank 0."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == at:
            signal.raise_signal(signal.SIGUSR1)
        return result

    setattr(owner, name, interrupted)


class InLock:
    """A lock, in which a signal comes once while it is held."""

    def __init__(self, lock: Any, at: int) -> None:
        self.lock, self.left = lock, at

    def __enter__(self) -> None:
        self.lock.__enter__()
        # Rank 0 serves the other ranks in threads, which no handler interrupts.
        self.left -= threading.current_thread() is threading.main_thread()
        if self.left == 0:
            self.left = -1
            signal.raise_signal(signal.SIGUSR1)

    def __exit__(self, *error: Any) -> None:
        self.lock.__exit__(*error)


def train(folder: Path, install: Callable[[Trainer], None], exits: bool = False, devices: int = 2) -> Launched:
    """Rank 0 saves in its handler, which was installed before the fit."""

    def script(folder: Path) -> None:
        strategy = AsyncStrategy(start_method="fork" if devices > 1 else "popen")
        trainer = fork_trainer(folder, devices, strategy)

        def handler(signum: int, frame: object) -> None:
            trainer.save_checkpoint(folder / "asked.ckpt")
            report(folder, 7, exists=(folder / "asked.ckpt").exists())
            if exits:
                raise SystemExit(3)

        class Module(TinyClassifier):
            saves_at = -1

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx == self.saves_at:
                    trainer.save_checkpoint(folder / "another.ckpt")

            def on_train_start(self) -> None:
                if self.global_rank == 0:
                    signal.signal(signal.SIGUSR1, handler)
                    install(trainer)

        module = Module()
        trainer.fit(module, loader(samples=4 * BATCHES))

    return launch(script, folder)


def in_ledger(trainer: Trainer) -> None:
    ledger: Ledger = trainer.strategy.engine.local_service.ledger  # type: ignore[union-attr]
    ledger._lock = InLock(ledger._lock, at=9)  # type: ignore[assignment]


def in_update(trainer: Trainer) -> None:
    interrupt_once(FusedUpdate, "__call__", at=5)


def in_another_save(trainer: Trainer) -> None:
    interrupt_once(trainer.strategy, "lightning_module_state_dict", at=1)
    trainer.lightning_module.saves_at = 2


def in_a_batch(trainer: Trainer) -> None:
    interrupt_once(trainer.lightning_module, "training_step", at=3)


@pytest.mark.parametrize("place", [in_ledger, in_update, in_another_save, in_a_batch])
def test_a_checkpoint_that_a_handler_saves_is_whole_and_written_after_the_batch(
    tmp_path: Path, place: Callable[[Trainer], None]
) -> None:
    run = train(tmp_path, place)

    assert run.returncode == 0, run.output
    assert not run.report(7)["exists"]
    saved = torch.load(tmp_path / "asked.ckpt", weights_only=False)
    noted = saved["async_amsgrad"]
    assert 0 < noted["version"] < BATCHES
    assert sum(noted["applied"][1::2]) - sum(noted["applied"][::2]) == noted["version"]
    (state,) = saved["optimizer_states"]
    assert {float(one["step"]) for one in state["state"].values()} == {float(noted["version"])}


def test_a_handler_that_saves_and_exits_leaves_the_checkpoint(tmp_path: Path) -> None:
    run = train(tmp_path, in_a_batch, exits=True, devices=1)

    assert run.returncode == 3, run.output
    assert (tmp_path / "asked.ckpt").exists()
    assert "Traceback" not in run.output


def test_a_handler_that_exits_in_the_middle_of_an_update_saves_nothing_half_updated(tmp_path: Path) -> None:
    run = train(tmp_path, in_update, exits=True, devices=1)

    assert run.returncode == 3, run.output
    assert not (tmp_path / "asked.ckpt").exists()
    assert "Traceback" not in run.output


def test_the_holder_shows_nothing_half_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange([2], workers=1, tickets=1)
    refused = 0

    def look(*args: Any) -> None:
        nonlocal refused
        with pytest.raises(HalfUpdatedError, match="half updated"):
            exchange.holder.snapshot()
        with pytest.raises(HalfUpdatedError, match="half updated"):
            exchange.holder.optimizer_state(0)
        refused += 1

    monkeypatch.setattr(exchange.holder._intake, "take", look)
    worker = exchange.worker(0, exchange.serve(0).channel)
    worker.draw()
    worker.begin_batch(1)
    exchange.parameters[0][0].grad = torch.ones(2)
    worker.step(0)

    assert refused == 1
    exchange.holder.snapshot()
