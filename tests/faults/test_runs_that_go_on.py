"""A run goes on without ranks that it loses, and with them again: every sample counts once, whatever is lost when."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torchmetrics import SumMetric
from typing_extensions import override

from lightning_async import AsyncAMSGradStrategy
from lightning_async.cli.join import join_variables
from tests.faults.injector import Fault, FaultInjector
from tests.faults.runs import explanations
from tests.harness import eventually
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader

pytestmark = pytest.mark.timeout(120)

BATCHES, VALIDATED, EPOCHS = 16, 24, 4
CONTINUE: dict[str, Any] = {"start_method": "fork", "on_worker_failure": "continue", "max_restarts": 0}


class Counting(TinyClassifier):
    """Counts the samples of each validation over all ranks, by a torchmetric, which gathers past the strategy."""

    def __init__(self) -> None:
        super().__init__(sleep_s=(0.01,) * 4)
        self.validated = SumMetric()
        self.counts: list[int] = []

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.validated.update(len(batch[0]))

    def on_validation_epoch_end(self) -> None:
        self.counts.append(int(self.validated.compute()))
        self.validated.reset()


class Watching(Callback):
    """Reports what a rank has seen, when its fit is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world_sizes: list[int] = []
        self.tickets: list[Counter[int]] = []
        self.stalest = 0
        self.epochs: list[int] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.observers.append(self.observe)

    def observe(self, update: Any, tickets: tuple[int, ...]) -> None:
        self.tickets[-1].update(tickets)
        self.stalest = max(self.stalest, update.staleness)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.tickets.append(Counter())
        self.epochs.append(trainer.current_epoch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.world_size == torch.distributed.get_world_size()
        assert trainer.global_rank == torch.distributed.get_rank()
        self.world_sizes.append(trainer.world_size)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        stats = trainer.strategy.stats
        report(
            self.folder,
            trainer.strategy.worker_rank,
            world_sizes=self.world_sizes,
            tickets=self.tickets,
            stalest=self.stalest,
            counts=pl_module.counts,
            steps=trainer.global_step,
            epochs=self.epochs,
            parameters=pl_module.flat_parameters(),
            evicted=stats.evicted,
            joined=stats.joined,
            updates=stats.updates,
            updates_by_rank=dict(stats.updates_by_rank),
        )


class WaitsForRankOne(Callback):
    """Has the third epoch go on until a lost rank has come back."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.worker_rank == 0 and trainer.current_epoch == 2:
            assert eventually(lambda: trainer.strategy.stats.joined == [1], 60.0)


def train(
    folder: Path,
    faults: tuple[Fault, ...],
    ranks: int = 3,
    epochs: int = EPOCHS,
    hosts: int = 1,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> None:
    strategy = AsyncAMSGradStrategy(**(CONTINUE | arguments))
    callbacks = [Watching(folder), FaultInjector(faults), *callbacks]
    trainer = fork_trainer(folder, ranks, strategy, max_epochs=epochs, callbacks=callbacks, num_nodes=hosts)
    trainer.fit(Counting(), loader(BATCHES * 4), loader(VALIDATED))


def start(folder: Path, *faults: Fault, **arguments: Any) -> Launched:
    return launch(lambda folder: train(folder, faults, **arguments), folder, timeout_s=90.0)


def check(run: Launched, lost: list[int], joined: tuple[int, ...] = ()) -> dict[str, Any]:
    """Every epoch was trained and validated once, and all ranks that are left ended with the same; rank 0's report."""
    assert run.returncode == 0, run.output
    first = run.report(0)
    assert first["evicted"] == lost and first["joined"] == list(joined)
    assert first["tickets"] == [Counter(range(BATCHES))] * EPOCHS
    assert first["counts"] == [VALIDATED] * EPOCHS
    for other in (run.report(rank) for rank in range(5) if (run.folder / f"rank{rank}.pt").exists()):
        assert torch.equal(other["parameters"], first["parameters"])
        assert other["steps"] == first["steps"]
        assert other["counts"] == first["counts"][-len(other["counts"]) :]
    return first


@pytest.mark.parametrize(
    ("fault", "sizes"),
    [
        (Fault(1, 1, "kill"), [2, 2, 2, 2]),
        (Fault(2, 1, "kill", "validation_step"), [2, 2, 2, 2]),
        (Fault(1, 0, "kill", "on_validation_epoch_end", after_s=0.2), [2, 2, 2, 2]),
        (Fault(2, 1, "kill", "on_train_epoch_end"), [3, 3, 2, 2]),
        (Fault(1, 1, "kill", "on_train_epoch_start"), [3, 2, 2, 2]),
    ],
    ids=lambda value: value.place if isinstance(value, Fault) else "",
)
def test_the_others_go_on_without_a_killed_rank(tmp_path: Path, fault: Fault, sizes: list[int]) -> None:
    run = start(tmp_path, fault)

    assert check(run, lost=[fault.rank])["world_sizes"] == sizes
    assert f"rank {fault.rank} is lost: " in run.output and "2 ranks go on without it" in run.output


def test_a_rank_that_is_stopped_is_taken_out_and_its_process_does_not_stay(tmp_path: Path) -> None:
    # The session must be empty at the end: the harness looks.
    run = start(tmp_path, Fault(2, 9, "stop"), worker_timeout=2.0)

    check(run, lost=[2])
    assert "rank 2 is lost: gave no sign of life for 2 s" in run.output


def test_several_ranks_may_be_lost_at_once(tmp_path: Path) -> None:
    run = start(tmp_path, Fault(1, 5, "kill"), Fault(3, 5, "kill"), ranks=4, batches="sharded")

    first = check(run, lost=run.report(0)["evicted"])
    assert sorted(first["evicted"]) == [1, 3]
    assert first["world_sizes"][-1] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batches": "sharded", "transport": "tcp", "holder": "process"},
        {"gradients_per_update": 3, "max_staleness": 0},
        {"overlap": True},
    ],
    ids=["default", "tcp-process-sharded", "lock-step", "overlap"],
)
def test_a_lost_rank_comes_back_in_the_middle_of_the_run(tmp_path: Path, arguments: dict[str, Any]) -> None:
    run = start(tmp_path, Fault(1, 6, "kill"), **(arguments | {"max_restarts": 1}))

    assert check(run, lost=[1], joined=(1,))["world_sizes"][-1] == 3
    assert run.report(1)["epochs"][-1] == EPOCHS - 1


# It has asked, is known to the holder, has been told the state.
@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.soak), 2], ids=str
)
def test_a_rank_that_is_stopped_while_it_joins_is_replaced(tmp_path: Path, step: int) -> None:
    joins = Fault(1, step, "stop", place="handshake", incarnation=1)
    options: dict[str, Any] = {"max_restarts": 2, "worker_timeout": 2.0, "callbacks": [WaitsForRankOne()]}
    run = start(tmp_path, Fault(1, 6, "kill"), joins, **options)

    check(run, lost=[1], joined=(1,))
    assert "rank 1, which was about to join, is lost: gave no sign of life for 2 s" in run.output
    assert "it is started again in 1 s (2 of 2)" in run.output


@pytest.mark.parametrize("holder", ["thread", pytest.param("process", marks=pytest.mark.soak)])
def test_a_worker_from_elsewhere_joins_beyond_those_that_the_run_began_with(tmp_path: Path, holder: str) -> None:
    file = tmp_path / "join.json"

    def add(session: int) -> None:
        assert eventually(file.exists, 60.0)
        assert file.stat().st_mode & 0o777 == 0o600
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.chdir(tmp_path)
                os.environ |= join_variables(file.read_text())
                train(tmp_path, (), epochs=20, **(arguments | {"start_method": "popen"}))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0

    arguments: dict[str, Any] = {"join_file": str(file), "holder": holder}
    run = launch(lambda folder: train(folder, (), epochs=20, **arguments), tmp_path, 90.0, meanwhile=add)

    assert run.returncode == 0, run.output
    first, new = run.report(0), run.report(3)
    assert first["joined"] == [3] and first["evicted"] == []
    assert first["tickets"] == [Counter(range(BATCHES))] * 20
    assert first["world_sizes"][-1] == new["world_sizes"][-1] == 4
    assert first["counts"] == [VALIDATED] * 20
    assert torch.equal(first["parameters"], new["parameters"])


def test_fewer_ranks_than_min_ranks_do_not_go_on(tmp_path: Path) -> None:
    run = start(tmp_path, Fault(1, 6, "kill"), ranks=2, min_ranks=2)

    assert run.returncode != 0
    assert explanations(run.output) == ["rank 1 failed: its process was killed by SIGKILL"]


def test_an_error_of_user_code_ends_the_run_all_the_same(tmp_path: Path) -> None:
    run = start(tmp_path, Fault(1, 6, "raise"))

    assert run.returncode != 0
    assert explanations(run.output) == ["rank 1 failed: InjectedError: injected into training_step"]


def test_rank_0_is_not_outlived(tmp_path: Path) -> None:
    run = start(tmp_path, Fault(0, 6, "kill"))

    assert run.returncode != 0
    assert "rank 0 failed: its process was killed by SIGKILL" in run.output


def test_a_rank_that_runs_out_of_memory_is_lost_and_no_bug(tmp_path: Path) -> None:
    run = start(tmp_path, Fault(1, 6, "exhaust"))

    check(run, lost=[1])
    assert "rank 1 is lost: MemoryError" in run.output or os.environ.get("CI")


def test_a_rank_that_is_told_to_end_finishes_its_batch_and_leaves(tmp_path: Path) -> None:
    run = start(tmp_path, Fault(2, 6, "sigterm"), max_restarts=2)

    first = check(run, lost=[2])
    assert "rank 2 leaves: it was told to end (SIGTERM); 2 ranks go on without it" in run.output
    assert first["world_sizes"][-1] == 2
