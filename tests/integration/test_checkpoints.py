"""A checkpoint is Lightning's own: one version's parameters and state, which any strategy goes on from."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader

RANKS = 3
UNEVEN = (0.001, 0.002, 0.004)
SAMPLES = 124  # 31 batches: no multiple of the number of ranks


class Module(TinyClassifier):
    """Reports what it started and ended with; its optimizer is torch's own."""

    def __init__(self, optimizer: Any = AMSGrad, sleep_s: tuple[float, ...] = UNEVEN) -> None:
        super().__init__(sleep_s)
        self.optimizer = optimizer
        self.began: dict[str, Any] = {}

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def state(self) -> dict[str, Any]:
        engine = getattr(self.trainer.strategy, "engine", None)
        snapshot = None if engine is None else engine.snapshot()
        optimizer = copy.deepcopy(self.trainer.optimizers[0].state_dict())
        return {
            "version": getattr(self.trainer.strategy, "version", self.trainer.global_step),
            "step": self.trainer.global_step,
            "epoch": self.trainer.current_epoch,
            "lr": optimizer["param_groups"][0]["lr"],
            "state": optimizer["state"] if snapshot is None else snapshot.optimizer_states[0]["state"],
            "parameters": self.flat_parameters(),
        }

    def on_train_start(self) -> None:
        self.began = self.state()

    def on_train_end(self) -> None:
        report(Path.cwd(), self.global_rank, began=self.began, ended=self.state(), seen=self.seen)


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, amsgrad=True, fused=True)


def print_warnings() -> None:
    """Lets a run warn, where pytest would turn warnings into errors."""
    warnings.simplefilter("default")
    warnings.showwarning = lambda message, *args, **kwargs: print(message)


def resume(trainer: Trainer, module: Module, path: Path) -> None:
    """Goes on from a checkpoint, without the callback that saved it, of which Lightning warns."""
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    trainer.fit(module, loader(SAMPLES), ckpt_path=path)


def flat(checkpoint: dict[str, Any]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in checkpoint["state_dict"].values()])


def assert_same_state(first: dict[int, Any], second: dict[int, Any]) -> None:
    assert first.keys() == second.keys()
    for index, values in first.items():
        assert values.keys() == second[index].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert all(torch.equal(value, second[index][name]) for name, value in values.items())


def checkpoint_every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)


@pytest.mark.compatibility("State", "ModelCheckpoint by epoch")
@pytest.mark.compatibility("State", "resume at an epoch's end")
def test_a_resumed_run_goes_on_from_the_same_version_state_and_place_in_the_data(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        seed_everything(3, verbose=False)
        arguments = {"callbacks": [checkpoint_every_epoch(folder)], "enable_checkpointing": True}
        fork_trainer(folder, RANKS, max_epochs=3, **arguments).fit(Module(), loader(SAMPLES), loader(24))
        for rank in range(RANKS):
            (folder / f"rank{rank}.pt").rename(folder / f"first{rank}.pt")
        resume(fork_trainer(folder, RANKS, max_epochs=3), Module(), folder / "checkpoints" / "epoch=1.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=1.ckpt")
    uninterrupted = [torch.load(tmp_path / f"first{rank}.pt", weights_only=False) for rank in range(RANKS)]
    resumed = run.reports()
    for rank in resumed:
        assert (rank["began"]["version"], rank["began"]["step"], rank["began"]["epoch"]) == (62, 20, 2)
        assert torch.equal(rank["began"]["parameters"], flat(checkpoint))
        assert rank["began"]["lr"] == 1e-2 * 0.5**2
        assert (rank["ended"]["version"], rank["ended"]["step"], rank["ended"]["epoch"]) == (93, 31, 3)
    assert_same_state(resumed[0]["began"]["state"], checkpoint["optimizer_states"][0]["state"])
    assert sorted(index for rank in resumed for index in rank["seen"][0]) == list(range(SAMPLES))
    # The order of the data is that of the epoch, not of the process: a rank's batches are the others' too.
    orders = [
        [batch for rank in ranks for batch in batches_of(rank["seen"][epoch])]
        for ranks, epoch in ((uninterrupted, 2), (resumed, 0), (uninterrupted, 1))
    ]
    assert sorted(orders[0]) == sorted(orders[1]) != sorted(orders[2])


def batches_of(seen: list[int]) -> list[list[int]]:
    return [seen[start : start + 4] for start in range(0, len(seen), 4)]


@pytest.mark.compatibility("State", "resume at an epoch's end")
def test_a_run_of_one_rank_resumes_bit_for_bit(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        seed_everything(3, verbose=False)
        arguments = {"callbacks": [checkpoint_every_epoch(folder)], "enable_checkpointing": True}
        fork_trainer(folder, 1, max_epochs=3, **arguments).fit(Module(sleep_s=()), loader(SAMPLES))
        (folder / "rank0.pt").rename(folder / "first.pt")
        trainer = fork_trainer(folder, 1, max_epochs=3)
        resume(trainer, Module(sleep_s=()), folder / "checkpoints" / "epoch=0.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, resumed = torch.load(tmp_path / "first.pt"), run.report(0)
    assert torch.equal(first["ended"]["parameters"], resumed["ended"]["parameters"])
    assert_same_state(first["ended"]["state"], resumed["ended"]["state"])


@pytest.mark.compatibility(
    "State", "a checkpoint goes on in a single-device or DDP run with torch's Adam(amsgrad=True)"
)
@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp_fork", 2)])
def test_a_checkpoint_resumes_in_another_run_with_torchs_adam(tmp_path: Path, strategy: str, ranks: int) -> None:
    def script(folder: Path) -> None:
        arguments = {"callbacks": [checkpoint_every_epoch(folder)], "enable_checkpointing": True}
        fork_trainer(folder, RANKS, **arguments).fit(Module(), loader(SAMPLES))
        trainer = fork_trainer(folder, ranks, strategy, max_epochs=2)
        resume(trainer, Module(adam), folder / "checkpoints" / "epoch=0.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt")
    for rank in run.reports()[:ranks]:
        began, ended = rank["began"], rank["ended"]
        assert (began["step"], began["epoch"]) == (10, 1)
        assert torch.equal(began["parameters"], flat(checkpoint))
        assert_same_state(began["state"], checkpoint["optimizer_states"][0]["state"])
        assert (ended["step"], ended["epoch"]) == (10 - -31 // ranks, 2)


@pytest.mark.compatibility("State", "a checkpoint of a single-device or DDP run with torch's Adam goes on here")
@pytest.mark.parametrize(
    ("strategy", "ranks", "amsgrad"), [("auto", 1, True), ("auto", 1, False), ("ddp_fork", 2, True)]
)
def test_another_runs_checkpoint_of_torchs_adam_resumes_here(
    tmp_path: Path, strategy: str, ranks: int, amsgrad: bool
) -> None:
    def plain(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, amsgrad=amsgrad)

    def train_elsewhere(folder: Path) -> None:
        arguments = {"callbacks": [checkpoint_every_epoch(folder)], "enable_checkpointing": True}
        fork_trainer(folder, ranks, strategy, **arguments).fit(Module(plain), loader(SAMPLES))

    def go_on(folder: Path) -> None:
        print_warnings()
        trainer = fork_trainer(folder, RANKS, max_epochs=2)
        resume(trainer, Module(plain), folder / "checkpoints" / "epoch=0.ckpt")

    first = launch(train_elsewhere, tmp_path)
    run = launch(go_on, tmp_path)

    assert (first.returncode, run.returncode) == (0, 0), first.output + run.output
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt")
    state = checkpoint["optimizer_states"][0]["state"]
    for values in state.values():
        values.setdefault("max_exp_avg_sq", values["exp_avg_sq"])
    steps = -(-31 // ranks)
    for rank in run.reports():
        # Steps of the other run, which all of its ranks made together, are steps of the clock that all ranks share.
        assert (rank["began"]["step"], rank["began"]["version"]) == (steps, steps * RANKS)
        assert torch.equal(rank["began"]["parameters"], flat(checkpoint))
        assert rank["ended"]["version"] == steps * RANKS + 31
    assert_same_state(run.report(0)["began"]["state"], state)
    assert run.output.count("from Adam without AMSGrad") == (not amsgrad)


@pytest.mark.compatibility("State", "resume with another number of ranks")
def test_a_checkpoint_resumes_with_another_number_of_ranks(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        arguments = {"callbacks": [checkpoint_every_epoch(folder)], "enable_checkpointing": True}
        fork_trainer(folder, RANKS, **arguments).fit(Module(), loader(SAMPLES))
        trainer = fork_trainer(folder, 2, max_epochs=2)
        (folder / "rank2.pt").unlink()
        resume(trainer, Module(), folder / "checkpoints" / "epoch=0.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    for rank in run.reports():
        assert (rank["began"]["step"], rank["began"]["version"]) == (10, 20)
        assert rank["ended"]["version"] == 20 + 31
    assert sorted(index for rank in run.reports() for index in rank["seen"][0]) == list(range(SAMPLES))


class Scored(Module):
    """Reports what the checkpoint callback has noted."""

    logs = True

    def on_train_end(self) -> None:
        callback = self.trainer.checkpoint_callback
        noted = {name: getattr(callback, name) for name in ("best_k_models", "best_model_path", "last_model_path")}
        scores = {path: score.item() for path, score in noted.pop("best_k_models").items()}
        report(Path.cwd(), self.global_rank, scores=scores, best_score=callback.best_model_score.item(), **noted)


@pytest.mark.compatibility("State", "ModelCheckpoint by metric with top-k")
@pytest.mark.compatibility("State", "ModelCheckpoint(save_last=True)")
@pytest.mark.parametrize(
    "when",
    [
        {"monitor": "val/loss"},
        # Saved between batches, by a metric that is unlike on every rank.
        {"monitor": "train/loss_step", "every_n_train_steps": 1},
        # Due at the last step before a validation, which one rank sees, and put off until all have validated.
        {"monitor": "val/loss", "every_n_train_steps": 5},
    ],
    ids=["validation", "batches", "deferred"],
)
def test_the_best_checkpoints_are_the_same_on_all_ranks_and_on_disk(tmp_path: Path, when: dict[str, Any]) -> None:
    def script(folder: Path) -> None:
        best = ModelCheckpoint(folder / "checkpoints", "{epoch}-{step}", save_top_k=2, save_last=True, **when)
        arguments = {"val_check_interval": 0.5, "callbacks": [best], "enable_checkpointing": True}
        fork_trainer(folder, RANKS, max_epochs=4, **arguments).fit(Scored(), loader(SAMPLES), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, *others = run.reports()
    assert others == [first] * 2
    assert len(first["scores"]) == 2
    assert first["best_score"] == min(first["scores"].values()) == first["scores"][first["best_model_path"]]
    kept = {*first["scores"], first["last_model_path"]}
    assert {str(path) for path in (tmp_path / "checkpoints").iterdir()} == kept


@pytest.mark.compatibility(
    "State",
    "ModelCheckpoint(every_n_train_steps=n)",
    note="Once for each multiple of n that the clock of all ranks passes.",
)
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_every_n_steps_is_once_for_each_multiple_that_the_clock_passes(tmp_path: Path, slow_rank: int) -> None:
    def script(folder: Path) -> None:
        often = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
        # While a slow rank computes a batch the others take the clock two steps further: not to every third.
        strategy = AsyncAMSGradStrategy(max_staleness=5, start_method="fork")
        trainer = fork_trainer(folder, RANKS, strategy, callbacks=[often], enable_checkpointing=True)
        sleep_s = tuple(0.01 if rank == slow_rank else 0.001 for rank in range(RANKS))
        trainer.fit(Module(sleep_s=sleep_s), loader(samples=216))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    checkpoints = [torch.load(path) for path in (tmp_path / "checkpoints").iterdir()]
    steps = sorted(checkpoint["global_step"] for checkpoint in checkpoints)
    assert [step // 3 for step in steps] == [1, 2, 3, 4, 5, 6]
    # Lightning knows the callback again by what it was created with.
    assert all("'every_n_train_steps': 3" in key for checkpoint in checkpoints for key in checkpoint["callbacks"])


@pytest.mark.compatibility("State", "parameters and optimizer state of one checkpoint are of one version")
@pytest.mark.compatibility("State", "a checkpoint file holds nothing of the holder's flat storage")
def test_a_checkpoint_between_batches_is_of_one_version_and_no_larger_than_its_contents(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        versions: dict[int, Tensor] = {}
        strategy = AsyncAMSGradStrategy(start_method="fork")

        def observe(update: Any, tickets: tuple[int, ...]) -> None:
            assert strategy.engine is not None
            assert strategy.engine.local_service is not None
            versions[update.version] = strategy.engine.local_service.holder._flat.clone()

        class Observed(Module):
            def on_train_end(self) -> None:
                if self.global_rank == 0:
                    torch.save(versions, folder / "versions.pt")

        strategy.observers.append(observe)
        often = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = fork_trainer(folder, RANKS, strategy, callbacks=[often], enable_checkpointing=True)
        trainer.fit(Observed(), loader(SAMPLES))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    versions = torch.load(tmp_path / "versions.pt")
    paths = list((tmp_path / "checkpoints").iterdir())
    assert len(paths) >= 5
    for path in paths:
        checkpoint = torch.load(path)
        version = checkpoint["async_amsgrad"]["version"]
        state = checkpoint["optimizer_states"][0]["state"]
        assert torch.equal(flat(checkpoint), versions[version])
        assert {values["step"].item() for values in state.values()} == {version}
        tensors = [
            *checkpoint["state_dict"].values(),
            *(value for values in state.values() for value in values.values()),
        ]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
        assert path.stat().st_size < sum(tensor.nbytes for tensor in tensors) + 20_000


def test_a_checkpoint_saved_after_fit_has_the_holders_state(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, 1, "async_amsgrad")
        module = Module(sleep_s=())
        trainer.fit(module, loader(SAMPLES))
        trainer.save_checkpoint(folder / "after.ckpt")
        # And a second fit of the same trainer goes on from there.
        trainer.fit_loop.max_epochs = 2
        (folder / "rank0.pt").rename(folder / "first.pt")
        trainer.fit(module, loader(SAMPLES))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, second, saved = torch.load(tmp_path / "first.pt"), run.report(0), torch.load(tmp_path / "after.ckpt")
    assert saved["global_step"] == saved["async_amsgrad"]["version"] == first["ended"]["version"] == 31
    assert torch.equal(flat(saved), first["ended"]["parameters"])
    assert_same_state(saved["optimizer_states"][0]["state"], first["ended"]["state"])
    assert (second["began"]["version"], second["ended"]["version"]) == (31, 62)
