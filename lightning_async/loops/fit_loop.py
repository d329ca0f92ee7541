"""Lightning's fit loop over segments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import fit_loop as _fit_loop_module
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource, _request_dataloader
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async.loops.epoch_size import agree_on_size
from lightning_async.loops.fetcher import TicketFetcher, shared_loader
from lightning_async.loops.joining import SegmentOverError
from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.protocols import Collectives

__all__ = ["AsyncFitLoop"]


class AsyncFitLoop(_FitLoop):
    """Lightning's fit loop over `AsyncEpochLoop`."""

    # Given to Lightning's own loop with this class, by `install`.
    _collectives: Collectives
    _strategy_name: str
    _on_train_loaders: Callable[[int], None]

    @override
    def run(self) -> None:
        coordinator = self.epoch_loop._fit_coordinator  # type: ignore[attr-defined]  # of `AsyncEpochLoop`
        while coordinator is not None and coordinator.joins:
            # Whatever takes long comes before the others count on this rank.
            self.setup_data()
            if not coordinator.take_state():
                # The run was over before this rank had come to it.
                raise SystemExit(0)
            with suppress(SegmentOverError):
                super().run()
                return
        super().run()

    @override
    def setup_data(self) -> None:
        epoch_loop: Any = self.epoch_loop

        def select(trainer: Trainer, stage: RunningStage) -> _DataFetcher:
            chosen = _select_data_fetcher(trainer, stage)
            if isinstance(chosen, _DataLoaderIterDataFetcher):
                raise MisconfigurationException(
                    f"{self._strategy_name} hands each batch out by its ticket and cannot give training_step the "
                    '`dataloader_iter`. Take `batch` (and `batch_idx`) instead, or use strategy="ddp".'
                )
            return TicketFetcher(epoch_loop.begin_batch)

        def request(source: _DataLoaderSource) -> Any:
            loaders = _request_dataloader(source)
            flattened = (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened
            self._on_train_loaders(len(flattened))
            return loaders

        before = self._data_fetcher
        with ExitStack() as undo:
            set_until_closed(undo, _fit_loop_module, "_select_data_fetcher", select)
            set_until_closed(undo, _fit_loop_module, "_request_dataloader", request)
            super().setup_data()
        fetcher = self._data_fetcher
        if isinstance(fetcher, TicketFetcher) and fetcher is not before and not fetcher.is_shared:
            agree_on_size(self.trainer, self._collectives.gather_objects)

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
        trainer.should_stop = self._collectives.reduce_boolean_decision(trainer.should_stop, all=False)
