"""The holder in a process of its own does what the holder in rank 0's process does, and is never waited for in vain."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async import AMSGrad
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.remote_service import HolderProcess, HolderProcessError
from lightning_async.holder.types import Update
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from tests.elsewhere import Signs
from tests.launch import gone

pytestmark = pytest.mark.timeout(120)

RANKS = 2
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class Run:
    """Two ranks in this process, which take turns, and a holder wherever it is to be."""

    def __init__(self, make: MakeOptimizer, process: HolderProcess | None = None, **options: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        initial = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
        self.parameters = [[nn.Parameter(value.clone()) for value in initial] for _ in range(RANKS)]
        self.optimizers = [make(own) for own in self.parameters]
        self.options = ExchangeOptions(max_staleness=None, holder="process" if process else "thread", **options)
        self.latch, self.stats, self.process = FailureLatch(), RunStats(RANKS), process
        self.told: list[tuple[Update, tuple[int, ...]]] = []
        self.observers: list[Callable[[Update, tuple[int, ...]], None]] = [lambda *told: self.told.append(told)]
        self.heartbeats = Heartbeats(0, self.latch, 60.0)
        self.listener = Listener("127.0.0.1", RANKS, self.heartbeats)
        self.engines: list[Engine] = []
        try:
            self.build()
        except BaseException:
            self.close()
            raise

    def build(self, version: int = 0, predecessors: Sequence[Engine] = ()) -> None:
        found = ""

        def meet(mine: str) -> str:
            nonlocal found
            found = mine or found
            return found

        self.engines = []
        for rank in range(RANKS):
            engine = Engine(
                rank=rank,
                world_size=RANKS,
                optimizers=[self.optimizers[rank]],
                options=self.options,
                latch=self.latch,
                listener=self.listener if rank == 0 else None,
                stats=self.stats,
                observers=self.observers,
                version=version,
                meet=meet,
                predecessor=predecessors[rank] if predecessors else None,
                process=self.process if rank == 0 else None,
            )
            self.engines.append(engine)

    @property
    def service(self) -> Any:
        service = self.engines[0].service
        assert service is not None
        return service

    def train(self, steps: int, seed: int = 5, spoiled: tuple[int, ...] = ()) -> None:
        """Both ranks read; then they push in turns, so that each gradient is a version stale; some are infinite."""
        generator = torch.Generator().manual_seed(seed)
        self.service.begin_epoch(range(steps))
        self.service.open(steps)
        drawing = [engine.worker.draw() for engine in self.engines]
        for engine in self.engines:
            engine.worker.begin_batch(1)
        for step in range(steps):
            rank = step % RANKS
            for parameter in self.parameters[rank]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad *= float("inf") if step in spoiled else 1.0
            self.engines[rank].worker.step(0)
            drawing[rank] = self.engines[rank].worker.draw()
            if drawing[rank]:
                self.engines[rank].worker.begin_batch(1)
        for engine in self.engines:
            engine.worker.finish_segment()
            engine.worker.refresh()

    def train_and_ask(self) -> None:
        """Until an observer must have been told."""
        self.train(steps=2)
        self.service.progress()

    def close(self) -> None:
        for engine in reversed(self.engines):
            engine.close()
        if self.process is not None:
            self.process.end()
        self.listener.close()
        self.heartbeats.close()


@contextmanager
def running(make: MakeOptimizer, holder: str = "fork", **options: Any) -> Iterator[Run]:
    run = Run(make, None if holder == "thread" else HolderProcess(forks=holder == "fork"), **options)
    try:
        yield run
    finally:
        run.close()


def amsgrad(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return AMSGrad(parameters, lr=0.1, weight_decay=0.01)


@pytest.mark.parametrize(
    ("make", "transport", "apart"),
    [
        (amsgrad, "auto", "process"),
        (amsgrad, "tcp", "fork"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "auto", "fork"),
        (lambda parameters: Signs(parameters, lr=0.1), "auto", "process"),
    ],
    ids=["AMSGrad", "AMSGrad-tcp", "SGD", "the-users-own"],
)
def test_it_computes_the_same_bits_and_tells_the_same(make: MakeOptimizer, transport: Any, apart: str) -> None:
    found = []
    for holder in ("thread", apart):
        with running(make, holder, transport=transport) as run:
            run.train(steps=9, spoiled=(6,))
            snapshot = run.service.snapshot()
            assert run.service.progress() == (9, 0)
            assert run.service.unfinished() == 0
            told = [
                (u.push.worker, u.push.version_read, u.version, u.staleness, u.applied, u.rejected, tickets)
                for u, tickets in run.told
            ]
            parameters = [[parameter.detach().clone() for parameter in own] for own in run.parameters]
            found.append((snapshot, told, parameters, run.stats.counts()))
    (inside, told, parameters, counts), (outside, told_apart, parameters_apart, counts_apart) = found
    assert torch.equal(inside.parameters, outside.parameters)
    assert inside.applied == outside.applied == ((0, 9),)
    assert inside.version == outside.version == 8
    assert told == told_apart
    assert [age for _, _, _, age, *_ in told] == [0, *[1] * 6, 0, 1]
    assert [step for step, (*_, applied, rejected, _) in enumerate(told) if rejected and not applied] == [6]
    for mine, theirs in zip(parameters, parameters_apart, strict=True):
        assert all(map(torch.equal, mine, theirs))
    states = [taken.optimizer_states[0]["state"] for taken in (inside, outside)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]) if isinstance(value, torch.Tensor) else True
    for name in ("updates", "staleness_by_rank", "batches_by_rank", "dropped", "rejected"):
        assert counts[name] == counts_apart[name]


def test_what_was_saved_goes_on_there_and_what_hooks_change_is_taken_over() -> None:
    with running(amsgrad) as run:
        run.train(steps=4)
        saved = run.service.snapshot()
        run.train(steps=4, seed=6)
        assert run.service.snapshot().version == 8

        assert run.service.restore(4, saved.optimizer_states) is False
        run.parameters[0][0].data.fill_(2.0)
        run.engines[0].load_parameters()

        again = run.service.snapshot()
        assert again.version == 4
        assert torch.equal(again.parameters[:15], torch.full((15,), 2.0))
        assert not torch.equal(again.parameters[15:], saved.parameters[15:])
        assert torch.equal(
            again.optimizer_states[0]["state"][1]["exp_avg"], saved.optimizer_states[0]["state"][1]["exp_avg"]
        )


def test_an_error_there_is_raised_here_and_it_goes_on() -> None:
    two_groups = amsgrad([nn.Parameter(torch.ones(1))])
    two_groups.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with running(amsgrad) as run:
        with pytest.raises(ValueError, match="different number of parameter groups"):
            run.service.restore(0, [two_groups.state_dict()])
        run.train(steps=2)
        assert run.service.snapshot().version == 2


@pytest.mark.parametrize("holder", ["thread", "fork"])
def test_a_successor_has_what_was_there(holder: str) -> None:
    with running(amsgrad, holder) as run:
        run.train(steps=4)
        before = run.service.snapshot()
        added = [nn.Parameter(torch.full((3,), float(rank))) for rank in range(RANKS)]
        for optimizer, parameter in zip(run.optimizers, added, strict=True):
            optimizer.add_param_group({"params": [parameter], "lr": 0.5})
        for engine in reversed(run.engines):
            engine.close()
        for own, parameter in zip(run.parameters, added, strict=True):
            own.append(parameter)

        run.build(version=4, predecessors=run.engines)

        after = run.service.snapshot()
        assert after.version == 4
        assert torch.equal(after.parameters, torch.cat([before.parameters, torch.zeros(3)]))
        assert list(after.optimizer_states[0]["state"]) == [0, 1]
        # What is applied of the epoch is known there too.
        assert run.service.progress() == (4, 0)
        run.train(steps=4)
        steps = [state["step"].item() for state in run.service.snapshot().optimizer_states[0]["state"].values()]
        assert steps == [8, 8, 4]


def test_signals_to_all_processes_are_rank_0s_to_answer() -> None:
    with running(amsgrad) as run:
        assert run.process is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(run.process.pid, number)
        time.sleep(0.1)
        run.train(steps=3)
        assert run.service.snapshot().version == 3


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_its_death_is_a_failure_of_rank_0_that_everybody_hears_of(transport: Any) -> None:
    with running(amsgrad, transport=transport) as run:
        assert run.process is not None
        run.train(steps=2)
        os.kill(run.process.pid, signal.SIGKILL)

        with pytest.raises(WorkerFailedError, match="rank 0 failed: its holder process was killed by SIGKILL"):
            run.service.progress()
        with pytest.raises(WorkerFailedError, match="its holder process was killed by SIGKILL"):
            run.engines[1].worker.pull()
        assert run.latch.failure == RunFailure(0, "its holder process was killed by SIGKILL")
        run.service.close()


def test_closing_what_has_just_died_is_closing() -> None:
    with running(amsgrad) as run:
        assert run.process is not None
        os.kill(run.process.pid, signal.SIGKILL)
        run.service.close()
        assert run.latch.failure == RunFailure(0, "its holder process was killed by SIGKILL")


def test_who_waits_for_an_answer_when_it_dies_is_woken() -> None:
    with running(amsgrad) as run:
        assert run.process is not None
        os.kill(run.process.pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (run.process.pid, signal.SIGKILL)).start()

        with pytest.raises(WorkerFailedError, match="its holder process was killed by SIGKILL"):
            run.service.progress()


def test_that_it_is_stopped_is_noticed() -> None:
    with running(amsgrad, worker_timeout_s=1.0) as run:
        assert run.process is not None
        run.train(steps=2)
        os.kill(run.process.pid, signal.SIGSTOP)

        with pytest.raises(WorkerFailedError, match=r"its holder process gave no sign of life for 1 s"):
            run.service.snapshot()


def test_another_ranks_failure_reaches_it_and_wakes_who_is_held_back() -> None:
    with running(amsgrad) as run:
        run.service.begin_epoch(range(9))
        run.service.open(9)
        run.engines[0].worker.draw()
        run.latch.trip(RunFailure(1, "its process was killed by SIGKILL"))
        with pytest.raises(WorkerFailedError, match="rank 1 failed"):
            run.service.progress()
        # Its latch has it by way of the heartbeat, and its session answers so.
        with pytest.raises(WorkerFailedError, match="rank 1 failed"):
            run.engines[1].worker.pull()


def test_a_request_that_does_not_fit_ends_the_run_by_name() -> None:
    with running(amsgrad) as run:
        run.engines[1].worker.version = 7
        run.engines[1].worker._turns.slot.version = 7
        run.service.begin_epoch(range(9))
        run.service.open(9)
        run.engines[1].worker.draw()
        run.engines[1].worker.pull()
        run.engines[1].worker._turns.slot.version = 7
        for parameter in run.parameters[1]:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(Exception, match="pushes a gradient of version 7 but holds 0"):
            run.engines[1].worker.step(0)
        failure = run.latch.wait(10.0)
        assert failure is not None
        assert failure.rank == 1
        assert "pushes a gradient of version 7" in failure.reason


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError])
def test_an_observer_that_fails_ends_the_run(error: type[Exception]) -> None:
    def fail(update: Update, tickets: tuple[int, ...]) -> None:
        raise error("of the observer's")

    with running(amsgrad) as run:
        run.observers.append(fail)
        with pytest.raises(WorkerFailedError, match=f"an observer of the updates failed: {error.__name__}"):
            run.train_and_ask()


def test_an_observer_cannot_wait_for_what_its_own_thread_brings() -> None:
    with running(amsgrad) as run:
        run.observers.append(lambda update, tickets: run.service.snapshot())
        with pytest.raises(WorkerFailedError, match="an observer of the updates may not call snapshot"):
            run.train_and_ask()


def test_an_optimizer_that_cannot_travel_is_refused_with_the_way_out() -> None:
    class Local(Signs):
        pass

    with pytest.raises(ValueError, match=r"Local cannot go there: .* or take holder=\"thread\""):
        Run(lambda parameters: Local(parameters, lr=0.1), HolderProcess())
    gc.collect()


def test_that_it_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(HolderProcessError, match=r'its holder process exited with code 3; .* holder="thread"'):
        Run(amsgrad, HolderProcess())


def test_that_it_takes_too_long_to_start_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    process = HolderProcess(start_timeout_s=0.2)
    with pytest.raises(HolderProcessError, match=r"has not started in 0\.2 s"):
        Run(amsgrad, process)
    assert gone(process.pid, 1.0)
