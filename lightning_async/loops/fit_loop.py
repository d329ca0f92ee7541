"""Lightning's fit loop over segments, and what is put in place while a fit runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import fit_loop as _fit_loop_module
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource, _request_dataloader
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async.loops.checkpoint_interval import follow_clock, unfollow_clock
from lightning_async.loops.epoch_loop import AsyncEpochLoop, Epoch
from lightning_async.loops.epoch_size import agree_on_size
from lightning_async.loops.fetcher import TicketFetcher, shared_loader
from lightning_async.loops.optimization import AsyncAutomaticOptimization
from lightning_async.loops.progress_bar import follow_all_ranks, unfollow_all_ranks
from lightning_async.loops.weight_averaging import average_with_clock, forget_clock

__all__ = ["install", "scheduler_clock", "uninstall"]


class AsyncFitLoop(_FitLoop):
    """Lightning's fit loop over `AsyncEpochLoop`."""

    @override
    def setup_data(self) -> None:
        epoch_loop: Any = self.epoch_loop
        strategy: Any = self.trainer.strategy

        def select(trainer: Trainer, stage: RunningStage) -> _DataFetcher:
            chosen = _select_data_fetcher(trainer, stage)
            if isinstance(chosen, _DataLoaderIterDataFetcher):
                raise MisconfigurationException(
                    f"{strategy.strategy_name} hands each batch out by its ticket and cannot give training_step the "
                    '`dataloader_iter`. Take `batch` (and `batch_idx`) instead, or use strategy="ddp".'
                )
            return TicketFetcher(epoch_loop.begin_batch)

        def request(source: _DataLoaderSource) -> Any:
            loaders = _request_dataloader(source)
            flattened = (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened
            strategy.has_one_train_loader = len(flattened) == 1
            return loaders

        before = self._data_fetcher
        with (
            _replaced(_fit_loop_module, "_select_data_fetcher", select),
            _replaced(_fit_loop_module, "_request_dataloader", request),
        ):
            super().setup_data()
        fetcher = self._data_fetcher
        if isinstance(fetcher, TicketFetcher) and fetcher is not before and not fetcher.is_shared:
            agree_on_size(self.trainer, strategy.gather_objects)

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = super().on_save_checkpoint()
        if self._shares_loader:
            # The ledger knows what is left of the epoch; a loader that skips, too, would skip twice.
            state.pop("combined_loader", None)
        return state

    @override
    def _load_combined_loader_states(self) -> None:
        if self._shares_loader:
            self._combined_loader_states_to_load = []
        super()._load_combined_loader_states()

    @property
    def _shares_loader(self) -> bool:
        return self._combined_loader is not None and shared_loader(self._combined_loader) is not None

    @override
    def on_advance_end(self) -> None:
        super().on_advance_end()
        # User code may have asked to stop on one rank only.
        trainer = self.trainer
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(trainer.should_stop, all=False)


def install(trainer: Trainer) -> None:
    """Gives the trainer's loops this module's behaviour, and signals handlers that leave the work to the loops."""
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    _become(trainer.fit_loop, AsyncFitLoop)
    _become(epoch_loop, AsyncEpochLoop)
    _become(epoch_loop.automatic_optimization, AsyncAutomaticOptimization)
    epoch_loop._epoch = Epoch()
    follow_all_ranks(trainer)
    follow_clock(trainer, lambda: epoch_loop._epoch.ticks)
    average_with_clock(trainer, lambda: epoch_loop._epoch.ticks)
    connector: Any = trainer._signal_connector
    strategy: Any = trainer.strategy

    def on_sigterm(signum: int, frame: object) -> None:
        if not strategy.sigterm_received and strategy.launcher is not None:
            strategy.launcher.kill(signum)
        strategy.sigterm_received = True

    connector._sigterm_notifier_fn = on_sigterm
    requeue = connector._slurm_sigusr_handler_fn

    def on_requeue(signum: int, frame: object) -> None:
        strategy.requeue = functools.partial(requeue, signum, frame)

    connector._slurm_sigusr_handler_fn = on_requeue


def scheduler_clock(trainer: Trainer) -> int:
    """Steps of the shared clock that this rank's learning-rate schedulers have made."""
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    scheduled: int = epoch_loop._epoch.scheduled
    return scheduled


def uninstall(trainer: Trainer) -> None:
    """Undoes `install`; the loops keep their state."""
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    if isinstance(epoch_loop, AsyncEpochLoop):
        _become(trainer.fit_loop, _FitLoop)
        _become(epoch_loop, _TrainingEpochLoop)
        _become(epoch_loop.automatic_optimization, _AutomaticOptimization)
        unfollow_clock(trainer)
        forget_clock(trainer)
        unfollow_all_ranks(trainer)
        del epoch_loop._epoch
    for handler in ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"):
        vars(trainer._signal_connector).pop(handler, None)


def _become(loop: Any, kind: type) -> None:
    # The trainer's own loops, with their state and everything that refers to them, take on another behaviour.
    loop.__class__ = kind


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
