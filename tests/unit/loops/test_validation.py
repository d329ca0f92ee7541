"""A validation that is broken off and repeated is, for everyone who looks at it afterwards, one that ran once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, SumMetric

from lightning_async.loops.validation import validate_whole

pytestmark = pytest.mark.timeout(60)
BATCHES = 4


class BrokenOffError(Exception):
    """Stands for the loss of a rank."""


class Losing:
    """The strategy's collectives of a run that loses a rank in each of its first attempts."""

    outlives_ranks = True

    def __init__(self, members_change: bool = False) -> None:
        self._members_change = members_change
        self.attempts = 0
        # For each attempt whether it has to make loaders.
        self.made_anew: list[bool] = []

    def take_changed_members(self) -> bool:
        return self._members_change

    def repeat_if_lost(self, body: Callable[[], None], restore: Callable[[], None]) -> None:
        while True:
            self.attempts += 1
            try:
                body()
            except BrokenOffError:
                restore()
            else:
                return


class Module(LightningModule):
    """Is broken off at the places that it is told, one in each attempt: ``(hook, batch)``."""

    def __init__(self, places: tuple[tuple[str, int], ...]) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(1, 1), nn.Dropout()
        self.frozen.eval()
        self.total, self.seen = SumMetric(), CatMetric()
        self.places = [*places]
        self.modes: list[bool] = []

    def strike(self, hook: str, batch: int = 0) -> None:
        if self.places and self.places[0] == (hook, batch):
            self.places.pop(0)
            raise BrokenOffError

    def val_dataloader(self) -> Any:
        return DataLoader(torch.arange(float(BATCHES))[:, None], batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self.modes.append(self.training)
        self.strike("on_validation_epoch_start")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.total.update(batch.sum())
        self.seen.update(batch.sum())
        self.log("total", self.total)
        self.log("mean", batch.sum())
        self.strike("validation_step", batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.strike("on_validation_epoch_end")


class Watching(Callback):
    """What a user's callback is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_validation_start(self, *arguments: Any) -> None:
        self.calls.append("start")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls.append("end")
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


class Averaging(WeightAveraging):
    """Swaps the module's weight for an average while it is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.tensor([[7.0]])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        return

    def _swap_models(self, pl_module: Any) -> None:
        with torch.no_grad():
            self.average, present = pl_module.layer.weight.clone(), self.average
            pl_module.layer.weight.copy_(present)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_models(pl_module)
        self.while_validating = pl_module.layer.weight.item()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_models(pl_module)


def validate(
    folder: Path, places: tuple[tuple[str, int], ...], losing: Losing | None = None
) -> tuple[Module, Watching, Averaging, Losing]:
    """Validates a module, broken off at each of the places before it comes through."""
    losing = losing or Losing()
    module, watching, averaging = Module(places), Watching(), Averaging()
    module.train()
    module.frozen.eval()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[watching, averaging],
        default_root_dir=folder,
    )
    loop: Any = trainer.validate_loop
    setup_data = loop.setup_data

    def setup_and_note() -> None:
        losing.made_anew.append(loop._combined_loader is None)
        setup_data()

    def run() -> None:
        del loop.run
        loop.setup_data = setup_and_note
        collectives: Any = losing
        validate_whole(trainer, loop, collectives)

    loop.run = run
    with torch.no_grad():
        module.layer.weight.fill_(1.0)
    trainer.validate(module, verbose=False)
    assert not module.places
    assert losing.attempts == len(places) + 1
    return module, watching, averaging, losing


PLACES = [
    (),
    (("validation_step", 1),),
    (("validation_step", 1), ("validation_step", 2)),
    (("on_validation_epoch_start", 0), ("on_validation_epoch_end", 0), ("validation_step", 3)),
]


@pytest.mark.parametrize("places", PLACES)
def test_what_metrics_and_logs_say_counts_each_batch_once(tmp_path: Path, places: tuple[tuple[str, int], ...]) -> None:
    module, watching, *_ = validate(tmp_path, places)

    assert watching.logged == {"total": 6.0, "mean": 1.5}
    assert module.seen.compute().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("places", PLACES)
def test_callbacks_are_told_of_the_end_once_after_the_whole_of_it(
    tmp_path: Path, places: tuple[tuple[str, int], ...]
) -> None:
    _, watching, *_ = validate(tmp_path, places)

    assert watching.calls == ["start"] * (len(places) + 1) + ["end"]


@pytest.mark.parametrize("places", PLACES)
def test_modes_and_averaged_weights_are_what_they_were_in_each_attempt_and_afterwards(
    tmp_path: Path, places: tuple[tuple[str, int], ...]
) -> None:
    module, _, averaging, _ = validate(tmp_path, places)

    assert module.modes == [False] * (len(places) + 1)
    assert (module.training, module.layer.training, module.frozen.training) == (True, True, False)
    assert (averaging.while_validating, module.layer.weight.item(), averaging.average.item()) == (7.0, 1.0, 7.0)


@pytest.mark.parametrize("members_change", [False, True])
def test_loaders_are_made_anew_for_other_ranks_only(tmp_path: Path, members_change: bool) -> None:
    losing = Losing(members_change)

    validate(tmp_path, (("validation_step", 1),), losing)

    assert losing.made_anew == [True, members_change]


def test_what_was_patched_is_as_it_was_also_after_an_error(tmp_path: Path) -> None:
    class Failing(Losing):
        def repeat_if_lost(self, body: Callable[[], None], restore: Callable[[], None]) -> None:
            raise ValueError("no")

    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Module(()))
    loop: Any = trainer.validate_loop
    collectives: Any = Failing()

    with pytest.raises(ValueError, match="no"):
        validate_whole(trainer, loop, collectives)

    assert not {"_on_evaluation_end", "_on_evaluation_model_train", "run"} & vars(loop).keys()
    assert "log_eval_end_metrics" not in vars(trainer._logger_connector)
