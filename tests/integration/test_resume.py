"""A run that is resumed in the middle of an epoch trains on exactly what was left of it."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.launch import launch, report
from tests.models import Recorder, TinyClassifier, fork_trainer, loader

RANKS = 3
SAMPLES, BATCH = 162, 4  # 41 batches: a rest, and no multiple of the number of ranks
TICKETS = 41
SEED = 5
Hand = Literal["shared", "sharded"]


class Module(TinyClassifier):
    """Notes which batches it trains on in which epoch, and what it began with."""

    def __init__(self, sleep_s: tuple[float, ...] = (0.002, 0.001, 0.015)) -> None:
        super().__init__(sleep_s)
        self.trained: list[tuple[int, int]] = []
        self.began: dict[str, Any] = {}

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_start(self) -> None:
        snapshot = self.trainer.strategy.engine.snapshot()
        self.began = {
            "version": self.trainer.strategy.version,
            "epoch": self.trainer.current_epoch,
            "parameters": self.flat_parameters(),
            "state": None if snapshot is None else snapshot.optimizer_states[0]["state"],
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.began.setdefault("first_lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.began.setdefault("first_version", self.trainer.strategy.version)
        self.began.setdefault("first_batch", batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained += [(self.current_epoch, index) for index in batch[2].tolist()]
        self.seen = self.seen or [[]]
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        ended = {"version": self.trainer.strategy.version, "step": self.trainer.global_step}
        report(Path.cwd(), self.global_rank, began=self.began, trained=self.trained, ended=ended)


class SavesInMidEpoch(Module):
    """Saves from user code after this rank's sixth batch of the second epoch, on one rank or on all.

    On a busy machine the other ranks wait for rank 0 before they take its share too.
    """

    at_most_before = (6, 12, 3)

    def __init__(self, path: Path, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.path, self.ranks = path, ranks
        self.own_batches = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        most = self.at_most_before[self.global_rank]
        while self.global_rank > 0 and self.own_batches == most and not self.path.exists():
            time.sleep(0.001)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1:
            self.own_batches += 1
            if self.own_batches == 6 and self.global_rank in self.ranks:
                # The others go on: what is saved is further than what this rank has seen.
                service = self.trainer.strategy.engine.service
                before = 0 if service is None else service.progress()[0]
                for _ in range(50):
                    if service is not None and service.progress()[0] < before + RANKS:
                        time.sleep(0.001)
                self.trainer.save_checkpoint(self.path)


def strategy_without_bound(batches: Hand = "shared", **options: Any) -> AsyncAMSGradStrategy:
    """So that ranks can wait for each other in a hook."""
    return AsyncAMSGradStrategy(max_staleness=None, batches=batches, start_method="fork", **options)


def resume(
    folder: Path,
    path: Path,
    ranks: int,
    batches: Hand = "shared",
    seed: int = SEED,
    samples: int = SAMPLES,
    module: Module | None = None,
    holder: Any = "thread",
    **arguments: Any,
) -> None:
    seed_everything(seed, verbose=False)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    strategy = AsyncAMSGradStrategy(batches=batches, holder=holder, start_method="fork")
    trainer = fork_trainer(folder, ranks, strategy, **({"max_epochs": 3} | arguments))
    data = loader(samples, BATCH, shuffle=samples == SAMPLES)
    trainer.fit(module or Module(), data, loader(12), ckpt_path=path)


def order_of(epoch: int) -> list[list[int]]:
    """The epoch's batches in their global order."""
    sampler = torch.utils.data.DistributedSampler(range(SAMPLES), 1, 0, seed=SEED)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    indices = list(sampler)
    return [indices[at : at + BATCH] for at in range(0, SAMPLES, BATCH)]


def applied_tickets(noted: dict[str, Any]) -> list[int]:
    """The tickets that a checkpoint says are applied."""
    bounds = noted["applied"]
    return [ticket for start, stop in zip(bounds[::2], bounds[1::2], strict=True) for ticket in range(start, stop)]


def assert_resumed_exactly(path: Path, rest: Any, accumulate: int = 1, epochs: int = 3) -> None:
    """Checks what the ranks report that went on from the checkpoint at ``path``."""
    ranks = len(rest)
    checkpoint = torch.load(path)
    noted = checkpoint["async_amsgrad"]
    clock = noted["version"] // noted["world_size"]
    applied = applied_tickets(noted)
    epoch = noted["epoch"]
    before = [(earlier, index) for earlier in range(epoch) for index in range(SAMPLES)]
    before += [(epoch, index) for ticket in applied for index in order_of(epoch)[ticket]]
    done = len(applied)
    version = noted["version"] if ranks == RANKS else clock * ranks
    saved = torch.cat([value.reshape(-1) for value in checkpoint["state_dict"].values()])
    for rank in rest:
        assert rank["began"]["version"] == version
        assert torch.equal(rank["began"]["parameters"], saved)
        # Others may have pushed before this one read.
        assert rank["began"]["first_version"] >= version
        clock_then = rank["began"]["first_version"] // ranks
        assert rank["began"]["first_lr"] == pytest.approx(1e-2 / (1 + clock_then))
    # Counted as under DDP, where an update's first batch is one whose number its size divides. Others may have taken
    # all that was left up to the next validation.
    first_batch = -(-(done // ranks) // accumulate) * accumulate if done < TICKETS else 0
    assert min(rank["began"]["first_batch"] for rank in rest) == first_batch
    state = checkpoint["optimizer_states"][0]["state"]
    assert all(
        torch.equal(value, rest[0]["began"]["state"][index][name])
        for index, values in state.items()
        for name, value in values.items()
    )
    trained = sorted(before + [sample for rank in rest for sample in rank["trained"]])
    assert trained == [(epoch, index) for epoch in range(epochs) for index in range(SAMPLES)]


@pytest.mark.compatibility("State", "trainer.save_checkpoint from user code in mid-epoch, on rank 0 or on all ranks")
@pytest.mark.compatibility("State", "resume in the middle of an epoch: what is left of it, each batch once")
@pytest.mark.compatibility("State", "resume in the middle of an epoch with another number of ranks")
@pytest.mark.parametrize(
    ("batches", "accumulate", "callers", "holder"),
    [
        ("shared", 1, (0,), "thread"),
        ("shared", 2, (0, 1, 2), "thread"),
        pytest.param("sharded", 1, (0, 1, 2), "thread", marks=pytest.mark.soak),
        pytest.param("sharded", 2, (0,), "process", marks=pytest.mark.soak),
        ("sharded", 2, (0,), "thread"),
        pytest.param("shared", 1, (0, 1, 2), "process", marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_a_run_saved_between_batches_goes_on_with_exactly_the_rest(
    tmp_path: Path, batches: Hand, accumulate: int, callers: tuple[int, ...], holder: Any
) -> None:
    path = tmp_path / "middle.ckpt"

    def train(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        strategy = strategy_without_bound(batches, holder=holder)
        recorder = Recorder()
        strategy.observers.append(recorder)

        class Recorded(SavesInMidEpoch):
            def on_train_end(self) -> None:
                if self.global_rank == 0:
                    torch.save(recorder.updates, folder / "updates.pt")

        trainer = fork_trainer(folder, RANKS, strategy, max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(Recorded(path, callers), loader(SAMPLES, BATCH, shuffle=True), loader(12))

    def go_on(ranks: int) -> Any:
        def script(folder: Path) -> None:
            resume(folder, path, ranks, batches, holder=holder, accumulate_grad_batches=accumulate)

        folder = tmp_path / f"with {ranks} ranks"
        folder.mkdir()
        return launch(script, folder)

    first = launch(train, tmp_path)
    assert first.returncode == 0, first.output
    noted = torch.load(path)["async_amsgrad"]
    applied = applied_tickets(noted)
    updates = torch.load(tmp_path / "updates.pt", weights_only=False)
    updates_an_epoch = -(-TICKETS // accumulate)
    of_version = [t for u in updates if updates_an_epoch < u["version"] <= noted["version"] for t in u["tickets"]]
    assert (noted["epoch"], applied) == (1, sorted(of_version))
    assert 0 < len(applied) < TICKETS
    for ranks in (RANKS, 2):
        run = go_on(ranks)

        assert run.returncode == 0, run.output
        assert_resumed_exactly(path, run.reports(), accumulate)


@pytest.mark.compatibility(
    "State", "resume from ModelCheckpoint(every_n_train_steps) and from a validation in mid-epoch"
)
def test_every_checkpoint_of_a_run_can_be_gone_on_from(tmp_path: Path) -> None:
    def train(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        often = ModelCheckpoint(folder / "often", "{step}", every_n_train_steps=4, save_top_k=-1)
        validated = ModelCheckpoint(folder / "validated", "{step}", monitor="val/loss", save_top_k=-1)
        arguments = {"callbacks": [often, validated], "enable_checkpointing": True, "val_check_interval": 6}
        trainer = fork_trainer(folder, RANKS, max_epochs=2, **arguments)
        trainer.fit(Module(), loader(SAMPLES, BATCH, shuffle=True), loader(12))

    first = launch(train, tmp_path)

    assert first.returncode == 0, first.output
    steps = {"often": [16, 20, 24], "validated": [19, 25]}
    paths = [tmp_path / name / f"step={step}.ckpt" for name, of_name in steps.items() for step in of_name]
    done = [len(applied_tickets(torch.load(path)["async_amsgrad"])) for path in paths if path.exists()]
    assert done[-2:] == [18, 36]
    for number, path in enumerate(path for path in paths if path.exists()):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = launch(lambda folder, path=path: resume(folder, path, RANKS, val_check_interval=6), folder)  # type: ignore[misc]
        assert run.returncode == 0, run.output
        assert_resumed_exactly(path, run.reports())


class SavesAtTheEnd(SavesInMidEpoch):
    """Rank 0 ends last, and saves after its last batch, before the ranks meet."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, (0,))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Nobody waits here."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1 and self.global_rank == 0:
            self.own_batches += 1
            if self.own_batches == 14:
                service = self.trainer.strategy.engine.service
                while service.progress()[0] < TICKETS:
                    time.sleep(0.001)
                self.trainer.save_checkpoint(self.path)


def test_an_epoch_whose_batches_are_all_done_is_still_ended_when_it_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"

    class Ends(Module):
        def on_validation_start(self) -> None:
            self.began.setdefault("validated", []).append((self.current_epoch, self.trainer.global_step))

    def train(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        strategy = strategy_without_bound("sharded")
        trainer = fork_trainer(folder, RANKS, strategy, max_epochs=2)
        trainer.fit(SavesAtTheEnd(path), loader(SAMPLES, BATCH, shuffle=True))

    first = launch(train, tmp_path)
    assert first.returncode == 0, first.output
    assert len(applied_tickets(torch.load(path)["async_amsgrad"])) == TICKETS

    run = launch(lambda folder: resume(folder, path, RANKS, module=Ends()), tmp_path)

    assert run.returncode == 0, run.output
    for rank in run.reports():
        assert rank["began"]["validated"] == [(1, 2 * TICKETS // RANKS), (2, TICKETS)]
    assert sorted(sample for rank in run.reports() for sample in rank["trained"]) == [(2, i) for i in range(SAMPLES)]


def test_a_run_is_told_that_it_goes_on_with_other_batches(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"

    def train(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        trainer = fork_trainer(folder, RANKS, strategy_without_bound(), max_epochs=2)
        trainer.fit(SavesInMidEpoch(path, (0,)), loader(SAMPLES, BATCH, shuffle=True))

    def go_on(folder: Path) -> None:
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *args, **kwargs: print(message)
        resume(folder, path, RANKS, seed=SEED + 1)

    assert launch(train, tmp_path).returncode == 0
    run = launch(go_on, tmp_path)

    assert run.returncode == 0, run.output
    assert run.output.count("whose batches came in another order than now") == 1
    done = len(applied_tickets(torch.load(path)["async_amsgrad"])) // RANKS * RANKS
    in_epoch = [sample for rank in run.reports() for sample in rank["trained"] if sample[0] == 1]
    assert -(-len(in_epoch) // BATCH) == TICKETS - done


@pytest.mark.compatibility(
    "State",
    "resume in the middle of an epoch over streams",
    note="as under DDP: a stream begins anew and is as many batches shorter as were done",
)
def test_streams_begin_anew_when_an_epoch_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    sampler = {"use_distributed_sampler": False}

    def train(folder: Path) -> None:
        trainer = fork_trainer(folder, RANKS, strategy_without_bound(), max_epochs=2, **sampler)
        trainer.fit(SavesInMidEpoch(path, (0,)), loader(60, BATCH))

    first = launch(train, tmp_path)
    assert first.returncode == 0, first.output
    run = launch(lambda folder: resume(folder, path, RANKS, samples=60, **sampler), tmp_path)

    assert run.returncode == 0, run.output
    done = len(applied_tickets(torch.load(path)["async_amsgrad"]))
    taken = [[index for epoch, index in rank["trained"] if epoch == 1] for rank in run.reports()]
    assert all(indices == list(range(len(indices))) for indices in taken)
    assert max(len(indices) for indices in taken) <= 60 - done // RANKS * BATCH
    assert sum(len(indices) for indices in taken) // BATCH == RANKS * 15 - done


@pytest.mark.compatibility("State", "a checkpoint from mid-epoch in a single-device run")
def test_another_strategy_goes_on_from_mid_epoch_as_from_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"

    class OneDevice(TinyClassifier):
        def on_train_start(self) -> None:
            self.began = (self.trainer.global_step, self.trainer.current_epoch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = self.seen or [[]]
            self.first = getattr(self, "first", batch_idx)
            return super().training_step(batch, batch_idx)

        def on_train_end(self) -> None:
            report(Path.cwd(), 0, began=self.began, first=self.first, step=self.trainer.global_step)

    def train(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        trainer = fork_trainer(folder, RANKS, strategy_without_bound(), max_epochs=2)
        trainer.fit(SavesInMidEpoch(path, (0,)), loader(SAMPLES, BATCH, shuffle=True))

    def go_on(folder: Path) -> None:
        fork_trainer(folder, 1, "auto", max_epochs=2).fit(OneDevice(), loader(SAMPLES, BATCH), ckpt_path=path)

    assert launch(train, tmp_path).returncode == 0
    run = launch(go_on, tmp_path)

    assert run.returncode == 0, run.output
    noted = torch.load(path)["async_amsgrad"]
    clock, batches = noted["version"] // RANKS, len(applied_tickets(noted)) // RANKS
    assert run.report(0)["began"] == (clock, 1)
    assert run.report(0)["first"] == batches
    assert run.report(0)["step"] == clock + TICKETS - batches
