"""The state of an optimizer that user code holds: read, changed, and there after a fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AMSGrad
from lightning_async.holder.held_state import same_state
from tests.compatibility.runs import RANKS, UNEVEN, Reporting, fail, train
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader


class Reading(Reporting):
    """Reads its optimizer's state wherever it can, on every rank, and on rank 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, Any] = {}

    def _look(self, where: str) -> None:
        state = self.trainer.optimizers[0].state_dict()["state"]
        self.shown[where] = {key: {name: value.clone() for name, value in of.items()} for key, of in state.items()}

    def on_train_start(self) -> None:
        self._look("start")

    def on_validation_epoch_start(self) -> None:
        self._look("validation")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._look("batch")

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 0:
            self._look("end")
            torch.save(self.optimizers().state_dict(), "own.pt")

    def facts(self) -> dict[str, Any]:
        return {"shown": self.shown}


STATE = "`optimizer.state` and `optimizer.state_dict()` in hooks"
STATE_NOTE = (
    "The holder's, fetched by the rank that looks, when it looks: nothing is sent otherwise, and no rank waits for "
    "another. Between batches it is as new as the rank's parameters. After fit every rank has it."
)


@pytest.mark.compatibility("State", STATE, note=STATE_NOTE)
@pytest.mark.parametrize("holder", ["thread", "process"])
def test_the_state_reads_as_the_holders_on_every_rank(tmp_path: Path, holder: Any) -> None:
    run = train(tmp_path, Reading, {"holder": holder}, validation_samples=12, val_check_interval=1.0)

    first = run.report(0)
    for rank in run.reports():
        assert rank["shown"]["start"] == {}
        assert {int(state["step"]) for state in rank["shown"]["validation"].values()} == {24}
        assert same_state(first["holder"][0]["state"], rank["shown"]["validation"])
        (seen,) = {int(state["step"]) for state in rank["shown"]["batch"].values()}
        assert 0 < seen <= 24
    assert same_state(first["holder"][0]["state"], first["shown"]["end"])
    own = torch.load(tmp_path / "own.pt")
    optimizer = torch.optim.Adam(Reading().parameters(), amsgrad=True)
    optimizer.load_state_dict(own)
    assert {int(state["step"]) for state in optimizer.state.values()} == {24}


class Changing(Reporting):
    """Clears the state of a layer before epoch 1, zeroes a moment before epoch 2, and saves in between."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        optimizer = self.trainer.optimizers[0]
        if self.current_epoch == 1:
            del optimizer.state[self.net[0].weight]
            self.kept = optimizer.state_dict()["state"][1]["step"].item()
        elif self.current_epoch == 2:
            for state in optimizer.state.values():
                state["step"].fill_(100.0)
        elif self.current_epoch == 3:
            saved = optimizer.state_dict()
            saved["state"] = {2: {**saved["state"][2], "step": torch.tensor(1000.0)}}
            optimizer.load_state_dict(saved)

    def on_validation_end(self) -> None:
        if self.current_epoch == 0:
            # A checkpoint of this stop has it, as under DDP.
            self.trainer.optimizers[0].state[self.net[2].bias]["step"].fill_(7.0)

    def facts(self) -> dict[str, Any]:
        return {"kept": self.kept}


@pytest.mark.compatibility(
    "State",
    "the optimizer's state cleared, changed or loaded (`load_state_dict`) in mid-run",
    note="Where the ranks meet, from rank 0, as parameters are. Between two batches it is refused, with the places "
    "where it can be done.",
)
def test_what_user_code_makes_of_the_state_is_taken_over(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)

    run = train(
        tmp_path,
        Changing,
        validation_samples=12,
        max_epochs=4,
        callbacks=[checkpoint],
        enable_checkpointing=True,
    )

    def steps(epoch: int) -> list[int]:
        saved = torch.load(tmp_path / "checkpoints" / f"epoch={epoch}.ckpt")
        return [int(state["step"]) for _, state in sorted(saved["optimizer_states"][0]["state"].items())]

    assert run.report(0)["kept"] == 24
    assert steps(0) == [24, 24, 24, 7]
    assert steps(1) == [24, 48, 48, 31]
    assert steps(2) == [124] * 4
    assert steps(3) == [24, 24, 1024, 24]


def test_a_state_is_not_changed_between_two_batches(tmp_path: Path) -> None:
    class InTheMiddle(TinyClassifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers[0].state[self.net[0].weight]["exp_avg"].zero_()

    assert "the state of AMSGrad was changed between two batches" in fail(tmp_path, InTheMiddle(UNEVEN))


def test_after_a_fit_every_rank_has_the_state(tmp_path: Path) -> None:
    class Kept(TinyClassifier):
        optimizer: Any = None

        def configure_optimizers(self) -> Any:
            # The same one in a second fit.
            self.optimizer = self.optimizer or AMSGrad(self.parameters())
            return self.optimizer

        def on_train_end(self) -> None:
            self.steps = [int(state["step"]) for state in self.optimizer.state.values()]

        def teardown(self, stage: str) -> None:
            self.trainer.strategy.barrier()

    class TwoFits(Kept):
        def on_fit_end(self) -> None:
            assert self.optimizer.state

    def script(folder: Path) -> None:
        from tests.every_rank import run_on_every_rank

        def fit() -> None:
            module, kept = TwoFits(UNEVEN), []
            for _ in range(2):
                trainer = fork_trainer(folder, RANKS, "async_amsgrad")
                trainer.fit(module, loader(96))
                kept.append(copy.deepcopy(module.optimizer.state_dict()["state"]))
            report(folder, trainer.global_rank, steps=module.steps, kept=kept)
            trainer.save_checkpoint(folder / "after.ckpt")

        run_on_every_rank(RANKS, fit)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, *others = run.reports()
    assert [rank["steps"] for rank in run.reports()] == [[48] * 4] * RANKS
    assert [state["step"] for state in first["kept"][1].values()] == [48.0] * 4
    assert all(
        same_state(mine, theirs) for rank in others for mine, theirs in zip(first["kept"], rank["kept"], strict=True)
    )
    saved = torch.load(tmp_path / "after.ckpt")
    assert {int(state["step"]) for state in saved["optimizer_states"][0]["state"].values()} == {48}
