"""Whatever a train loader is like, ranks of unlike speed train on what DDP's ranks would, each batch once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_async import AsyncAMSGradStrategy
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, indexed_data, loader

RANKS = 3
UNEVEN = (0.001, 0.002, 0.004)
Hand = Literal["shared", "sharded"]
pytestmark = pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
both = pytest.mark.parametrize("batches", ["shared", "sharded"])


class Noting(TinyClassifier):
    """Reports which batches this rank has trained on and validated."""

    def __init__(self) -> None:
        super().__init__(UNEVEN)
        self.trained: list[list[Any]] = []
        self.validated: list[list[tuple[int, ...]]] = []

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.trained.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        named = batch if isinstance(batch, dict) else {"": batch}
        self.trained[-1].append({name: part and tuple(part[2].tolist()) for name, part in named.items()})
        return super().training_step(next(part for part in named.values() if part), batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated[-1].append((self.trainer.global_step, dataloader_idx, *batch[2].tolist()))
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def on_train_end(self) -> None:
        report(
            Path.cwd(),
            self.global_rank,
            trained=self.trained,
            validated=self.validated,
            step=self.trainer.global_step,
            version=getattr(self.trainer.strategy, "version", None),
            batches=self.trainer.num_training_batches,
        )


def fit(
    folder: Path,
    train: Callable[[Noting], Any],
    validation: Any = None,
    batches: Hand | None = "shared",
    **arguments: Any,
) -> Launched:
    """Trains on ``train(module)``, which each rank calls for itself; under DDP if ``batches`` is None."""

    class WithData(Noting):
        def train_dataloader(self) -> Any:
            return train(self)

    def script(folder: Path) -> None:
        strategy = "ddp_fork" if batches is None else AsyncAMSGradStrategy(batches=batches, start_method="fork")
        defaults = {"max_epochs": 2, "log_every_n_steps": 1}
        fork_trainer(folder, RANKS, strategy, **(defaults | arguments)).fit(WithData(), val_dataloaders=validation)

    folder.mkdir(exist_ok=True)
    run = launch(script, folder)
    assert run.returncode == 0, run.output
    return run


def indices_in(run: Launched, epoch: int) -> list[int]:
    """Every sample that was trained on in an epoch, once for each time."""
    batches = [batch[""] for rank in run.reports() for batch in rank["trained"][epoch]]
    return sorted(index for batch in batches for index in batch)


def refuses(folder: Path, train: Callable[[Noting], Any]) -> str:
    """What a run is refused with."""

    class WithData(Noting):
        def train_dataloader(self) -> Any:
            return train(self)

    run = launch(lambda folder: fork_trainer(folder, RANKS).fit(WithData()), folder)
    assert run.returncode != 0
    return run.output


# --- loaders that all ranks share ------------------------------------------------------------------------------------


@pytest.mark.compatibility("Data", "map-style data set")
@pytest.mark.compatibility("Data", "batch sizes that leave a rest")
@pytest.mark.compatibility("Data", "loader workers with persistent_workers")
@both
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "persistent_workers": True}], ids=["main", "workers"])
def test_a_map_style_data_set_is_seen_once_an_epoch(tmp_path: Path, batches: Hand, workers: Any) -> None:
    run = fit(tmp_path, lambda _: loader(45, shuffle=True, **workers), loader(6), batches, val_check_interval=2)

    assert [indices_in(run, epoch) for epoch in range(2)] == [list(range(45))] * 2
    assert {rank["version"] for rank in run.reports()} == {2 * 12}


@pytest.mark.compatibility("Data", "fewer batches than ranks")
@both
def test_fewer_batches_than_ranks_are_no_trouble(tmp_path: Path, batches: Hand) -> None:
    run = fit(tmp_path, lambda _: loader(8), loader(8), batches)

    assert [indices_in(run, epoch) for epoch in range(2)] == [list(range(8))] * 2
    assert [len(rank["validated"]) for rank in run.reports()] == [2] * RANKS


class Halves(BatchSampler):
    """Batches whose samples are all of one half of the data, in an order that Python's own generator decides."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        halves = [[i for i in indices if i < 22], [i for i in indices if i >= 22]]
        cut = [half[at : at + self.batch_size] for half in halves for at in range(0, 22, self.batch_size)]
        random.shuffle(cut)
        return iter(cut)

    def __len__(self) -> int:
        return 2 * -(-22 // self.batch_size)


@pytest.mark.compatibility("Data", "custom batch_sampler")
@both
def test_a_custom_batch_sampler_makes_the_batches(tmp_path: Path, batches: Hand) -> None:
    data = indexed_data(44)

    run = fit(
        tmp_path, lambda _: DataLoader(data, batch_sampler=Halves(RandomSampler(data), 4, False)), batches=batches
    )

    assert [indices_in(run, epoch) for epoch in range(2)] == [list(range(44))] * 2
    trained = [batch[""] for rank in run.reports() for epoch in rank["trained"] for batch in epoch]
    assert all(len({index >= 22 for index in batch}) == 1 for batch in trained)


class TooMany(Halves):
    """Says that there are three batches more than there are."""

    def __len__(self) -> int:
        return super().__len__() + 3


class TooFew(Halves):
    """Says that there are three batches fewer than there are."""

    def __len__(self) -> int:
        return super().__len__() - 3


@pytest.mark.compatibility("Data", "custom batch_sampler whose length is an estimate")
@both
@pytest.mark.parametrize(("estimating", "trained"), [(TooMany, 12), (TooFew, 9)])
def test_an_epoch_ends_where_its_batches_do_whatever_their_sampler_has_said(
    tmp_path: Path, batches: Hand, estimating: type[Halves], trained: int
) -> None:
    data = indexed_data(44)

    def train(module: Noting) -> Any:
        return DataLoader(data, batch_sampler=estimating(RandomSampler(data), 4, False))

    run = fit(tmp_path, train, loader(6), batches)

    assert [sum(len(rank["trained"][epoch]) for rank in run.reports()) for epoch in range(2)] == [trained] * 2
    assert {rank["version"] for rank in run.reports()} == {2 * trained}
    assert [len(rank["validated"]) for rank in run.reports()] == [2] * RANKS


@pytest.mark.compatibility("Data", "WeightedRandomSampler")
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_weighted_sampler_draws_one_sample_for_all_ranks(tmp_path: Path, own_generator: bool) -> None:
    weights = [0.0 if index < 10 else float(index) for index in range(60)]

    def train(module: Noting) -> Any:
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return loader(60, sampler=WeightedRandomSampler(weights, 60, generator=generator))

    run = fit(tmp_path, train)

    epochs = [indices_in(run, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    for indices in epochs:
        assert len(indices) == 60
        assert min(indices) >= 10
        # Drawn with replacement: some more than once, as in any such sample.
        assert max(Counter(indices).values()) > 1


def test_ranks_whose_samplers_disagree_are_told(tmp_path: Path) -> None:
    def train(module: Noting) -> Any:
        generator = torch.Generator().manual_seed(module.global_rank)
        return loader(60, sampler=WeightedRandomSampler([1.0] * 60, 60, generator=generator))

    assert "gives rank 1 other batches than rank 0" in refuses(tmp_path, train)


@pytest.mark.compatibility("Data", "several validation loaders")
def test_several_validation_loaders_are_all_validated_at_one_step(tmp_path: Path) -> None:
    run = fit(tmp_path, lambda _: loader(48), [loader(24), loader(12)], val_check_interval=0.5, max_epochs=1)

    validations = list(zip(*(rank["validated"] for rank in run.reports()), strict=True))
    assert len(validations) == 2
    for validation in validations:
        batches = [batch for rank in validation for batch in rank]
        assert len({step for step, *_ in batches}) == 1
        for number, samples in enumerate((24, 12)):
            indices = [index for _, found, *batch in batches if found == number for index in batch]
            assert sorted(indices) == list(range(samples))


@pytest.mark.compatibility("Data", "reload_dataloaders_every_n_epochs")
def test_data_that_is_reloaded_is_seen_from_then_on(tmp_path: Path) -> None:
    run = fit(
        tmp_path,
        lambda module: loader(20 + 10 * module.current_epoch),
        max_epochs=4,
        reload_dataloaders_every_n_epochs=2,
    )

    assert [len(indices_in(run, epoch)) for epoch in range(4)] == [20, 20, 40, 40]


@pytest.mark.compatibility("Data", "overfit_batches")
@both
def test_overfitting_sees_the_same_batches_in_every_epoch(tmp_path: Path, batches: Hand) -> None:
    run = fit(tmp_path, lambda _: loader(60), batches=batches, overfit_batches=2)

    assert [indices_in(run, epoch) for epoch in range(2)] == [list(range(RANKS * 2 * 4))] * 2


# --- loaders that give each rank a stream of its own -----------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """This rank's share of some samples; rank r's is ``more * r`` samples longer than rank 0's.

    Args:
        samples: of rank 0; None for a stream without end.
        more: see above.
        sized: whether the stream tells its length.
    """

    def __new__(cls, samples: int | None, more: int = 0, sized: bool = False) -> Any:
        return super().__new__(SizedStream if sized else Stream)

    def __init__(self, samples: int | None, more: int = 0, sized: bool = False) -> None:
        self.data = indexed_data(1000)
        self.samples = 1000 // RANKS if samples is None else samples + more * dist.get_rank()
        self.rank = dist.get_rank()

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position in range(first, self.samples, step):
            yield self.data[position * RANKS + self.rank]


class SizedStream(Stream):
    """A stream that tells its length."""

    def __len__(self) -> int:
        return self.samples


class Repeatable:
    """An iterable that is no DataLoader and has no length."""

    def __init__(self, batches: DataLoader[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.batches))


def by_rank(run: Launched, epoch: int) -> list[list[Any]]:
    """What each rank trained on in an epoch, in its order."""
    return [rank["trained"][epoch] for rank in run.reports()]


OWN_STREAMS: dict[str, Callable[[Noting], Any]] = {
    "sized stream": lambda _: DataLoader(Stream(22, sized=True), 4),
    "stream": lambda _: DataLoader(Stream(22), 4),
    "stream with workers": lambda _: DataLoader(Stream(24), 4, num_workers=2, persistent_workers=True),
    "iterable that is no loader": lambda _: Repeatable(DataLoader(Stream(22), 4)),
    "own sampler": lambda module: loader(
        66, sampler=DistributedSampler(indexed_data(66), RANKS, module.global_rank, shuffle=True)
    ),
    "min_size": lambda _: CombinedLoader({"a": loader(36), "b": loader(60)}, "min_size"),
    "max_size": lambda _: CombinedLoader({"a": loader(36), "b": loader(60)}, "max_size"),
    "max_size_cycle": lambda _: {"a": loader(36), "b": loader(60)},
}
# Each has a case beside it that differs in little.
LONG_RUN = ("stream", "sized stream", "iterable that is no loader", "max_size", "min_size")


@pytest.mark.compatibility("Data", "IterableDataset, sized or not")
@pytest.mark.compatibility("Data", "a DistributedSampler of the user's own, use_distributed_sampler=False")
@pytest.mark.compatibility("Data", "CombinedLoader: min_size, max_size, max_size_cycle")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.soak] * (kind in LONG_RUN)) for kind in OWN_STREAMS]
)
def test_every_rank_walks_the_stream_that_it_walks_under_ddp(tmp_path: Path, kind: str) -> None:
    arguments: dict[str, Any] = {"use_distributed_sampler": kind != "own sampler", "validation": loader(6)}
    reference = fit(tmp_path / "ddp", OWN_STREAMS[kind], batches=None, **arguments)

    shared = fit(tmp_path / "shared", OWN_STREAMS[kind], batches="shared", **arguments)
    sharded = fit(tmp_path / "sharded", OWN_STREAMS[kind], batches="sharded", **arguments)

    for run in (shared, sharded):
        for epoch in range(2):
            assert by_rank(run, epoch) == by_rank(reference, epoch)
        for mine, theirs in zip(run.reports(), reference.reports(), strict=True):
            assert (mine["step"], mine["batches"]) == (theirs["step"], theirs["batches"])
            assert mine["validated"] == theirs["validated"]


@pytest.mark.compatibility("Data", "plain loaders, use_distributed_sampler=False")
@both
def test_without_a_distributed_sampler_every_rank_walks_the_whole_loader(tmp_path: Path, batches: Hand) -> None:
    run = fit(tmp_path, lambda _: loader(30), batches=batches, use_distributed_sampler=False)

    for epoch in range(2):
        for rank in by_rank(run, epoch):
            assert [index for batch in rank for index in batch[""]] == list(range(30))
    assert {rank["version"] for rank in run.reports()} == {2 * RANKS * 8}


@both
@pytest.mark.parametrize("sized", [True, False])
def test_streams_of_unlike_length_are_each_walked_to_their_end(tmp_path: Path, batches: Hand, sized: bool) -> None:
    # Under DDP the longer streams' ranks would wait for ever for the shorter ones'.
    run = fit(tmp_path, lambda _: DataLoader(Stream(5, more=9, sized=sized), 4), loader(6), batches)

    for epoch in range(2):
        for number, rank in enumerate(by_rank(run, epoch)):
            expected = [position * RANKS + number for position in range(5 + 9 * number)]
            assert [index for batch in rank for index in batch[""]] == expected
    assert {rank["version"] for rank in run.reports()} == {2 * (2 + 4 + 6)}
    assert [len(rank["validated"]) for rank in run.reports()] == [2] * RANKS


@both
@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        pytest.param({"limit_train_batches": 5}, 0, marks=pytest.mark.soak),
        ({"limit_train_batches": 5}, 2),
        ({"max_steps": 10, "max_epochs": -1}, 0),
    ],
    ids=str,
)
def test_streams_without_end_are_drawn_from_up_to_the_limit(
    tmp_path: Path, batches: Hand, arguments: dict[str, Any], workers: int
) -> None:
    run = fit(
        tmp_path,
        lambda _: DataLoader(Stream(None), 4, num_workers=workers),
        loader(6),
        batches,
        **({"val_check_interval": 2, "enable_progress_bar": True} | arguments),
    )

    assert {(rank["step"], rank["version"]) for rank in run.reports()} == {(10, 10 * RANKS)}
    epochs = len(run.report(0)["trained"])
    taken = [[len(rank) for rank in by_rank(run, epoch)] for epoch in range(epochs)]
    assert sum(sum(ranks) for ranks in taken) == 10 * RANKS
    if batches == "sharded":
        assert all(len(set(ranks)) == 1 for ranks in taken)
    # What the loader has fetched ahead at one stop comes after it, in each epoch.
    for epoch in range(epochs):
        for number, rank in enumerate(by_rank(run, epoch)):
            own = [index for batch in rank for index in batch[""]]
            assert len(own) == len(set(own))
            assert {index % RANKS for index in own} == {number}
            if not workers:
                assert own == [position * RANKS + number for position in range(len(own))]
    assert [len(rank["validated"]) for rank in run.reports()] == [4 if epochs == 2 else 5] * RANKS


@both
def test_a_stream_that_ends_within_an_accumulation_gives_the_rest_to_others(tmp_path: Path, batches: Hand) -> None:
    run = fit(
        tmp_path,
        lambda _: DataLoader(Stream(12, more=8), 4),
        batches=batches,
        accumulate_grad_batches=2,
    )

    for epoch in range(2):
        assert [len(rank) for rank in by_rank(run, epoch)] == [3, 5, 7]
    # Each rank's last batch of an epoch is an update of its own.
    assert {rank["version"] for rank in run.reports()} == {2 * (2 + 3 + 4)}


@pytest.mark.compatibility("Data", "an int val_check_interval over a stream of unknown length")
def test_a_stream_that_ends_where_it_was_just_validated_is_not_validated_again(tmp_path: Path) -> None:
    run = fit(tmp_path, lambda _: DataLoader(Stream(24), 4), loader(6), val_check_interval=3, max_epochs=1)

    assert [[step for step, *_ in validation] for validation in run.report(0)["validated"]] == [[3], [6]]


@pytest.mark.compatibility(
    "Data", "CombinedLoader: sequential", status="refused", note="Lightning's fit refuses it under every strategy"
)
def test_a_sequential_combination_is_refused_as_by_lightning(tmp_path: Path) -> None:
    output = refuses(tmp_path, lambda _: CombinedLoader([loader(8), loader(8)], "sequential"))

    assert 'does not support the `CombinedLoader(mode="sequential")` mode' in output
