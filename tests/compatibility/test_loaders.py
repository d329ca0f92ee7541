"""A loader that the user iterates, wraps or modifies behaves as under DDP; the tickets are the fetcher's alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_async import AsyncAMSGradStrategy
from tests.launch import Launched, launch, report
from tests.loaders import Early, Kept, Threaded
from tests.models import TinyClassifier, fork_trainer, indexed_data

RANKS = 2
UNEVEN = (0.001, 0.006)
Hand = Literal["shared", "sharded"]
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
both = pytest.mark.parametrize("batches", ["shared", "sharded"])


class Noting(TinyClassifier):
    """Notes what this rank trained on, and what user code has seen of the train loader."""

    def __init__(self, folder: Path) -> None:
        super().__init__(UNEVEN)
        self.folder = folder
        self.sizes: list[list[int]] = []
        self.walked: list[Any] = []

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.sizes.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen, self.sizes = self.seen or [[]], self.sizes or [[]]
        self.sizes[-1].append(len(batch[0]))
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        report(
            self.folder,
            self.global_rank,
            seen=self.seen,
            sizes=self.sizes,
            walked=self.walked,
            step=self.trainer.global_step,
        )


def fit(
    folder: Path,
    data: Any,
    batches: Hand | None = "shared",
    module: type[Noting] = Noting,
    ckpt_path: Path | None = None,
    overlap: bool = False,
    **arguments: Any,
) -> Launched:
    """Trains on what ``data()`` makes; under DDP if ``batches`` is None."""
    folder.mkdir(exist_ok=True)

    def script(folder: Path) -> None:
        strategy: Any = "ddp_fork"
        if batches is not None:
            strategy = AsyncAMSGradStrategy(batches=batches, overlap=overlap, start_method="fork")
        trainer = fork_trainer(folder, RANKS, strategy, **({"max_epochs": 2} | arguments))
        trainer.fit(module(folder), data(), ckpt_path=ckpt_path)

    return launch(script, folder)


def trained(run: Launched) -> list[list[int]]:
    """What all ranks together trained on in each epoch."""
    assert run.returncode == 0, run.output
    epochs = zip(*(rank["seen"] for rank in run.reports()), strict=True)
    return [sorted(index for rank in epoch for index in rank) for epoch in epochs]


@pytest.mark.compatibility("Data", "a DataLoader subclass with an `__iter__` of its own: one iterator for all epochs")
@pytest.mark.compatibility("Data", "a DataLoader subclass that prefetches in a thread of its own")
@both
@pytest.mark.parametrize("kind", [Kept, Threaded])
def test_a_loader_that_iterates_in_its_own_way_covers_every_sample_once(
    tmp_path: Path, kind: type[DataLoader[Any]], batches: Hand
) -> None:
    run = fit(tmp_path, lambda: kind(indexed_data(45), batch_size=4), batches, val_check_interval=2)

    assert trained(run) == [list(range(45))] * 2
    assert {rank["step"] for rank in run.reports()} == {12}


class Short(DataLoader[Any]):
    """Ends after three batches."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        for _ in range(3):
            yield next(iterator)


@pytest.mark.compatibility(
    "Data",
    "a DataLoader subclass that ends before its length",
    note="Each rank takes what its loader has in an epoch, as under DDP; the epoch then ends as any other does.",
)
@both
@pytest.mark.parametrize("overlap", [False, True])
def test_an_epoch_of_a_loader_that_ends_early_has_as_many_batches_as_under_ddp(
    tmp_path: Path, overlap: bool, batches: Hand
) -> None:
    run = fit(tmp_path, lambda: Short(indexed_data(64), batch_size=4), batches, overlap=overlap)

    epochs = trained(run)
    assert [len(epoch) for epoch in epochs] == [RANKS * 3 * 4] * 2
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)


@pytest.mark.compatibility(
    "Refused",
    "StopIteration in `training_step` or a batch's hook",
    status="refused",
    note="It would end the epoch on all ranks. Begin the iterator anew there, or return -1 from "
    "`on_train_batch_start` to skip the rest of an epoch.",
)
def test_an_iterator_that_ends_in_training_step_is_no_wish_to_skip_the_epoch(tmp_path: Path) -> None:
    class Second(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                next(iter(()))
            return super().training_step(batch, batch_idx)

    run = fit(tmp_path, lambda: DataLoader(indexed_data(64), batch_size=4), module=Second)

    assert run.returncode != 0
    assert "StopIteration was raised while a train batch was computed" in run.output


class Walking(Noting):
    """Iterates the trainer's train loader wherever it can."""

    def walk(self) -> list[list[int]]:
        return [batch[2].tolist() for batch in self.trainer.train_dataloader]

    def on_train_start(self) -> None:
        self.walked.append(len(self.trainer.train_dataloader))

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.walked.append(self.walk())

    def on_train_epoch_end(self) -> None:
        self.walked.append(self.walk())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # In the first batch, which every rank has, however slow.
        if batch_idx == 0:
            self.walked += [next(iter(self.trainer.train_dataloader))[2].tolist() for _ in range(2)]
        return super().training_step(batch, batch_idx)


@pytest.mark.compatibility("Data", "iterating `trainer.train_dataloader` in hooks, in `training_step` and in callbacks")
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}], ids=str)
def test_user_code_that_iterates_the_train_loader_sees_what_it_sees_under_ddp(tmp_path: Path, workers: Any) -> None:
    def data() -> DataLoader[Any]:
        return DataLoader(indexed_data(45), batch_size=4, shuffle=True, **workers)

    reference = fit(tmp_path / "ddp", data, None, Walking)
    assert reference.returncode == 0, reference.output

    run = fit(tmp_path / "async", data, "shared", Walking)

    assert trained(run) == [list(range(45))] * 2
    assert [rank["walked"] for rank in run.reports()] == [rank["walked"] for rank in reference.reports()]


def test_a_pass_over_a_loader_with_persistent_workers_leaves_training_alone(tmp_path: Path) -> None:
    # Under DDP such a loader has one iterator, and a pass in training_step begins the epoch anew.
    run = fit(
        tmp_path,
        lambda: DataLoader(indexed_data(45), batch_size=4, num_workers=1, persistent_workers=True),
        module=Walking,
    )

    assert trained(run) == [list(range(45))] * 2


class Growing(Callback):
    """Doubles the batch size for the second epoch."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and self.rank in (None, trainer.global_rank):
            trainer.train_dataloader.batch_sampler.batch_size *= 2


@pytest.mark.compatibility("Data", "a batch sampler's attributes and methods, set or called in mid-fit")
@both
def test_a_batch_size_that_user_code_sets_holds_from_the_next_epoch(tmp_path: Path, batches: Hand) -> None:
    run = fit(tmp_path, lambda: DataLoader(indexed_data(64), batch_size=4), batches, callbacks=[Growing()])

    assert trained(run) == [list(range(64))] * 2
    for epoch, size in enumerate((4, 8)):
        assert {found for rank in run.reports() for found in rank["sizes"][epoch]} == {size}


def test_what_user_code_sets_on_one_rank_only_is_refused(tmp_path: Path) -> None:
    run = fit(tmp_path, lambda: DataLoader(indexed_data(64), batch_size=4), callbacks=[Growing(rank=1)])

    assert run.returncode != 0
    assert "gives rank 1 other batches than rank 0" in run.output
    assert "attributes on every rank alike" in run.output


class Endless(BatchSampler):
    """Never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()

    def __len__(self) -> int:
        return 10**9


@pytest.mark.compatibility("Data", "a batch sampler without an end")
@pytest.mark.parametrize("arguments", [{"limit_train_batches": 5}, {"max_steps": 10, "max_epochs": 1}], ids=str)
def test_a_batch_sampler_without_an_end_is_drawn_as_far_as_needed(
    tmp_path: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_async.data.orders._SAMPLES_AHEAD", 20)
    monkeypatch.setattr("lightning_async.data.orders._STRIDE", 8)
    data = indexed_data(64)

    run = fit(tmp_path, lambda: DataLoader(data, batch_sampler=Endless(RandomSampler(data), 4, False)), **arguments)

    assert sum(map(len, trained(run))) == RANKS * 10 * 4
    assert {rank["step"] for rank in run.reports()} == {10}


class Normal(Noting):
    """A network that refuses a batch of one sample."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.compatibility(
    "Data",
    "a last batch",
    status="differs",
    note="All ranks share one order, so an epoch has one last batch and no sample is seen twice. Where a single sample "
    "would be left for it, which BatchNorm refuses, it gets half of the batch before it; `drop_last=True` leaves an "
    "incomplete last batch out. A batch sampler of your own makes its last batch itself.",
)
@pytest.mark.parametrize(("samples", "sizes"), [(49, [8, 9, 16, 16]), (50, [2, 16, 16, 16])])
def test_no_batch_of_a_single_sample_is_left_over(tmp_path: Path, samples: int, sizes: list[int]) -> None:
    run = fit(tmp_path, lambda: DataLoader(indexed_data(samples), batch_size=16, shuffle=True), module=Normal)

    assert trained(run) == [list(range(samples))] * 2
    assert [sorted(size for rank in run.reports() for size in rank["sizes"][epoch]) for epoch in range(2)] == [
        sizes
    ] * 2


class Stateful(DataLoader[Any]):
    """Saves how many batches it has yielded, and skips them once that is loaded."""

    yielded = skip = 0

    def state_dict(self) -> dict[str, Any]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["yielded"]

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        self.yielded = skip
        iterator = super().__iter__()
        for _ in range(skip):
            next(iterator)
        for batch in iterator:
            self.yielded += 1
            yield batch


class OnlyOwn(DistributedSampler[Any]):
    """A sampler of the user's own, which makes a loader each rank's stream."""


@pytest.mark.compatibility("State", "a loader with state_dict and load_state_dict, resumed in mid-epoch")
@pytest.mark.parametrize("first", ["shared", None], ids=["own checkpoint", "checkpoint of DDP"])
@both
def test_the_ledger_alone_knows_what_is_left_of_a_shared_epoch(
    tmp_path: Path, first: Hand | None, batches: Hand
) -> None:
    def data() -> Stateful:
        return Stateful(indexed_data(64), batch_size=4)

    saving = ModelCheckpoint(dirpath=tmp_path / "saved", filename="mid", every_n_train_steps=3)
    began = fit(tmp_path / "first", data, first, max_steps=3, enable_checkpointing=True, callbacks=[saving])
    (before,) = trained(began)

    run = fit(tmp_path / "second", data, batches, ckpt_path=tmp_path / "saved" / "mid.ckpt")

    first_epoch, second_epoch = trained(run)
    if first is not None:
        assert sorted(before + first_epoch) == list(range(64))
    assert len(before + first_epoch) == 64
    assert second_epoch == list(range(64))
    assert {rank["step"] for rank in run.reports()} == {16}


@pytest.mark.compatibility(
    "State",
    "a stream with state_dict and load_state_dict, resumed in mid-epoch",
    status="differs",
    note="As under DDP every rank's stream goes on from rank 0's state. Ranks may have taken unlike numbers of batches "
    'by then; with `max_staleness=0` and `batches="sharded"`, or at an epoch\'s end, they have not.',
)
def test_a_stream_that_restores_itself_is_not_skipped_twice(tmp_path: Path) -> None:
    def data() -> Stateful:
        sampler = OnlyOwn(indexed_data(64), RANKS, dist.get_rank(), shuffle=False)
        return Stateful(indexed_data(64), batch_size=4, sampler=sampler)

    class WithData(Noting):
        def train_dataloader(self) -> Any:
            return data()

    saving = ModelCheckpoint(dirpath=tmp_path / "saved", filename="mid", every_n_train_steps=3)
    began = fit(
        tmp_path / "first",
        lambda: None,
        None,
        WithData,
        max_steps=3,
        enable_checkpointing=True,
        callbacks=[saving],
    )
    (before,) = trained(began)

    run = fit(tmp_path / "second", lambda: None, "shared", WithData, ckpt_path=tmp_path / "saved" / "mid.ckpt")

    first_epoch, second_epoch = trained(run)
    assert sorted(before + first_epoch) == list(range(64))
    assert second_epoch == list(range(64))


def test_a_loader_whose_batches_belong_to_no_ticket_is_refused_by_name(tmp_path: Path) -> None:
    run = fit(tmp_path, lambda: Early(indexed_data(64), batch_size=4, sampler=SequentialSampler(indexed_data(64))))

    assert run.returncode != 0
    assert "Early delivers a batch beyond those" in run.output
