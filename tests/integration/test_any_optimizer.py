"""Strategy async: whatever the optimizer, the arithmetic and the checkpoints are those of one device."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, AsyncStrategy
from tests.integration.test_equality import (
    BATCH_SIZE,
    SEED,
    Oddly,
    assert_equal_bit_for_bit,
    global_order,
    replay,
)
from tests.launch import launch, report
from tests.models import Recorder, TinyClassifier, fork_trainer, indexed_data, loader
from tests.soaked import soaked
from tests.unit.holder.test_update import SignDescent

MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.01, fused=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, momentum=0.5, foreach=True),
    "own": SignDescent,
    "AMSGrad": lambda params: AMSGrad(params, lr=1e-2, fused=True),
}


class Cycled(Oddly):
    """A scheduler that changes two hyperparameters with every step, where there are two."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        momentum = {"momentum", "betas"} & optimizer.param_groups[0].keys()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.05, total_steps=300, cycle_momentum=bool(momentum)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.compatibility(
    "Optimization", "any torch optimizer", note='strategy="async"; equal to one device bit for bit with one rank'
)
@pytest.mark.parametrize("name", soaked(MAKE, "Adam", "RMSprop"))
def test_one_rank_is_single_device_training_bit_for_bit(tmp_path: Path, name: str) -> None:
    def script(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        module = Cycled(MAKE[name])
        alone = copy.deepcopy(module)
        data = indexed_data(samples=200)
        arguments: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
        fork_trainer(folder, 1, "async_fork", **arguments).fit(module, DataLoader(data, BATCH_SIZE, shuffle=True))
        (folder / "rank0.pt").rename(folder / "async.pt")
        one_order = DataLoader(data, BATCH_SIZE, sampler=global_order(data))
        fork_trainer(folder, 1, "auto", **arguments).fit(alone, one_order)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ours, theirs = torch.load(tmp_path / "async.pt"), run.report(0)
    assert ours["step"] == theirs["step"] == 75
    assert_equal_bit_for_bit(ours["parameters"], theirs["parameters"])


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"max_staleness": 0, "batches": "sharded"}), ("SGD", {}), ("own", {"max_staleness": 1})],
    ids=["SGD-in-turns", "SGD", "own"],
)
def test_a_recorded_run_of_two_ranks_replayed_in_one_process_gives_the_same_bits(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    samples = 120

    def script(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        recorder = Recorder()

        class Module(Oddly):
            def on_train_end(self) -> None:
                super().on_train_end()
                if self.global_rank == 0:
                    torch.save(recorder.updates, folder / "updates.pt")

        module = Module(MAKE[name], sleep_s=(0.001, 0.003))
        alone = copy.deepcopy(module)
        strategy = AsyncStrategy(start_method="fork", **options)
        strategy.observers.append(recorder)
        fork_trainer(folder, 2, strategy, max_epochs=2).fit(module, loader(samples, BATCH_SIZE, shuffle=True))
        replay(alone, torch.load(folder / "updates.pt"), samples, MAKE[name](alone.parameters()))
        torch.save({name: p.detach() for name, p in alone.named_parameters()}, folder / "replayed.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    updates = torch.load(tmp_path / "updates.pt")
    replayed = torch.load(tmp_path / "replayed.pt")
    assert {update["worker"] for update in updates} == {0, 1}
    assert any(update["staleness"] for update in updates) == (options.get("max_staleness") != 0)
    for rank in run.reports():
        assert_equal_bit_for_bit(rank["parameters"], replayed)


@pytest.mark.compatibility("State", "checkpoints of any torch optimizer, here and on one device")
@pytest.mark.parametrize("name", ["SGD", "own"])
def test_a_run_that_moves_here_and_back_is_one_run_bit_for_bit(tmp_path: Path, name: str) -> None:
    """One epoch on a single device, one here, one on a single device again, one here."""

    def fit(folder: Path, strategy: str, epochs: int, checkpoint: Path | None = None) -> None:
        seed_everything(SEED, verbose=False)
        callback = ModelCheckpoint(folder / f"{strategy}-{epochs}", filename="{epoch}", save_top_k=-1)
        arguments: dict[str, Any] = {"callbacks": [callback], "enable_checkpointing": True, "max_epochs": epochs}
        trainer = fork_trainer(folder, 1, strategy, **arguments)
        warnings.filterwarnings("ignore", ".*The dirpath has changed")
        data = indexed_data(samples=80)
        order: dict[str, Any] = {"sampler": global_order(data)} if strategy == "auto" else {"shuffle": True}
        trainer.fit(Cycled(MAKE[name]), DataLoader(data, BATCH_SIZE, **order), ckpt_path=checkpoint)

    def script(folder: Path) -> None:
        fit(folder, "auto", 4)
        (folder / "rank0.pt").rename(folder / "uninterrupted.pt")
        fit(folder, "auto", 1)
        fit(folder, "async_fork", 2, folder / "auto-1" / "epoch=0.ckpt")
        fit(folder, "auto", 3, folder / "async_fork-2" / "epoch=1.ckpt")
        fit(folder, "async_fork", 4, folder / "auto-3" / "epoch=2.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    uninterrupted = torch.load(tmp_path / "uninterrupted.pt")
    assert run.report(0)["step"] == uninterrupted["step"] == 80
    assert_equal_bit_for_bit(run.report(0)["parameters"], uninterrupted["parameters"])
    here, plain = (
        torch.load(tmp_path / folder / "epoch=3.ckpt", weights_only=False)["optimizer_states"][0]
        for folder in ("async_fork-4", "auto-4")
    )
    assert here["param_groups"] == plain["param_groups"]
    torch.testing.assert_close(here["state"], plain["state"], rtol=0, atol=0)


def test_a_fit_that_is_over_leaves_the_holders_state_in_the_modules_optimizer(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, 1, "async")
        trainer.fit(Cycled(SignDescent), loader(40))
        group = trainer.optimizers[0].param_groups[0]
        report(folder, 0, steps=group["steps"], state=len(trainer.optimizers[0].state))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.report(0) == {"steps": 10, "state": 6}


def test_an_optimizer_that_cannot_be_stepped_elsewhere_is_refused(tmp_path: Path) -> None:
    class Module(TinyClassifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    def script(folder: Path) -> None:
        with pytest.raises(MisconfigurationException) as refusal:
            fork_trainer(folder, 1, "async").fit(Module(), loader())
        report(folder, 0, message=str(refusal.value))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    message = run.report(0)["message"]
    assert "The holder cannot step LBFGS, which re-evaluates its closure" in message
    assert 'Return another optimizer from configure_optimizers, or use strategy="ddp"' in message


def test_ranks_with_unlike_optimizers_are_told_so(tmp_path: Path) -> None:
    class Module(TinyClassifier):
        def configure_optimizers(self) -> Any:
            kind = torch.optim.SGD if self.global_rank == 0 else torch.optim.RMSprop
            return kind(self.parameters(), lr=0.1)

    run = launch(lambda folder: fork_trainer(folder, 2, "async_fork").fit(Module(), loader()), tmp_path)

    assert run.returncode != 0
    assert "rank 1 has optimizers = ['RMSprop " in run.output
    assert "every rank must build the same model and optimizers" in run.output
