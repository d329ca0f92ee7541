"""Many short runs with faults at random places; each must train every batch exactly once, end in time, leave nothing.

``python -m tests.faults.soak --faults 2000 --seed 0`` runs as many runs as it takes for that many faults; a run that
fails is told with the command that repeats it. ``--deaths 200`` is one run with that many deaths and joins instead,
which must need no more memory, descriptors and threads at its end than at its beginning.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from lightning_async.chaos import Fault, FaultInjector
from lightning_async.runtime import restart_counts
from tests.faults.scenarios import Scenario
from tests.launch import Launched, launch, report, session_processes
from tests.models import Recorder, TinyClassifier, fork_trainer, loader

__all__ = ["problems_of", "run"]

DEADLINE_S = 90.0
_BATCH_SIZE = 2


class _Module(TinyClassifier):
    """Has buffers, and a metric that its ranks share."""

    def __init__(self, sleep_s: tuple[float, ...]) -> None:
        super().__init__(sleep_s)
        from torchmetrics import MeanMetric

        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.correct = MeanMetric()
        self.validated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.sleep_s[0])
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.correct.update((self.net(batch[0]).argmax(1) == batch[1]).float())

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def on_validation_epoch_end(self) -> None:
        self.validated.append(float(self.correct.compute()))
        self.correct.reset()


class _Observer(Recorder):
    """Keeps the hyperparameters that each gradient came with, too."""

    def __call__(self, update: Any, tickets: tuple[int, ...]) -> None:
        super().__call__(update, tickets)
        self.updates[-1]["groups"] = [float(value) for value in update.push.groups]


class _Reporter(Callback):
    """Reports what the observer of the updates has seen, and where every rank has ended."""

    def __init__(self, folder: Path, recorder: Recorder) -> None:
        self.folder = folder
        self.recorder = recorder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        (self.folder / "trained").touch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncAMSGradStrategy) and isinstance(pl_module, _Module)
        report(
            self.folder,
            strategy.worker_rank,
            parameters=pl_module.flat_parameters(),
            buffers=[buffer.clone() for buffer in pl_module.net.buffers()],
            validated=pl_module.validated,
            updates=self.recorder.updates,
            evicted=list(strategy.stats.evicted),
            step=trainer.global_step,
            bound=strategy.options.max_staleness,
        )


def train(scenario: Scenario, folder: Path) -> None:
    """Trains; called in a process of its own, which starts the ranks."""
    _prepare(folder)
    if not scenario.backs_off:
        restart_counts.back_off_s = lambda count: 0.0
    before = _own_resources()
    strategy = AsyncAMSGradStrategy(**scenario.strategy)
    recorder = _Observer()
    strategy.observers.append(recorder)
    trainer = fork_trainer(
        folder,
        scenario.ranks,
        strategy,
        max_epochs=scenario.epochs,
        val_check_interval=scenario.validate_every,
        enable_checkpointing=True,
        callbacks=[FaultInjector(scenario.faults), _Reporter(folder, recorder)],
    )
    # Tickets are batches of all ranks: with as many as are a multiple of their number all of them count.
    samples = scenario.tickets // scenario.ranks * scenario.ranks * _BATCH_SIZE
    trainer.fit(_Module((scenario.sleep_s,)), loader(samples, _BATCH_SIZE, shuffle=True), loader(samples=24))
    del trainer, strategy, recorder
    gc.collect()
    torch.save({"before": before, "after": _own_resources()}, folder / "resources.pt")


def _own_resources() -> dict[str, int]:
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def _prepare(folder: Path) -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    tempfile.tempdir = str(folder / "tmp")
    os.mkdir(tempfile.tempdir)


class _Meter(Callback):
    """Notes what rank 0 needs after each death, and ends the fit when there were enough."""

    def __init__(self, folder: Path, deaths: int) -> None:
        self.folder = folder
        self.deaths = deaths
        self.needed: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        strategy: Any = trainer.strategy
        if strategy.worker_rank != 0 or len(strategy.stats.evicted) <= len(self.needed):
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.needed.append(_own_resources() | {"memory": pages * os.sysconf("SC_PAGE_SIZE")})
        if len(self.needed) >= self.deaths:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.needed:
            torch.save(self.needed, self.folder / "needed.pt")


def train_with_deaths(deaths: int, folder: Path) -> None:
    """One run, whose ranks but for rank 0 die again and again."""
    _prepare(folder)
    # It is for ranks that fail by themselves.
    restart_counts.back_off_s = lambda count: 0.0
    strategy = AsyncAMSGradStrategy(
        start_method="fork", on_worker_failure="continue", max_restarts=10 * deaths, summary=False
    )
    faults = [Fault(rank, 8, "kill", "compute", 0.0, number) for rank in (1, 2) for number in range(10 * deaths)]
    callbacks = [FaultInjector(faults), _Meter(folder, deaths)]
    trainer = fork_trainer(folder, 3, strategy, max_epochs=-1, callbacks=callbacks)
    trainer.fit(_Module((0.02,)), loader(600, _BATCH_SIZE, shuffle=True), loader(samples=24))


def problems_of_deaths(deaths: int, folder: Path) -> list[str]:
    """Runs `train_with_deaths`; what is wrong with it."""
    launched = launch(lambda folder: train_with_deaths(deaths, folder), folder, 60.0 + 6.0 * deaths)
    if launched.returncode:
        return [f"the run has ended with code {launched.returncode}\n{launched.output[-4000:]}"]
    needed = torch.load(folder / "needed.pt")
    part = max(1, len(needed) // 4)
    found = []
    for name, most in (("descriptors", 2), ("threads", 2), ("memory", 20 * 2**20)):
        # Not the first: what is made once and kept comes with them.
        early, late = (median(each[name] for each in some) for some in (needed[part : 2 * part], needed[-part:]))
        print(f"{name}: {early:,.0f} early, {late:,.0f} late, after {len(needed)} deaths")
        if late - early > most:
            found.append(f"{name} grow: {[each[name] for each in needed]}")
    return found


def run(scenario: Scenario, folder: Path) -> list[str]:
    """Runs a scenario; returns what is wrong with how it went."""
    before = set(os.listdir("/dev/shm"))

    def tell_where_it_hangs(session: int) -> None:
        def dump() -> None:
            for pid in session_processes(session):
                os.kill(pid, signal.SIGUSR2)

        timer = threading.Timer(DEADLINE_S - 5.0, dump)
        timer.daemon = True
        timer.start()
        timers.append(timer)

    timers: list[threading.Timer] = []
    try:
        launched = launch(lambda folder: train(scenario, folder), folder, DEADLINE_S, tell_where_it_hangs)
    except AssertionError as error:
        return [str(error)]
    finally:
        for timer in timers:
            timer.cancel()
    return problems_of(scenario, launched, before)


def problems_of(scenario: Scenario, launched: Launched, before: set[str]) -> list[str]:
    """What is wrong with a run that has ended.

    Args:
        scenario: what was run.
        launched: what it left.
        before: the names of shared memory that there were before.
    """
    found = []
    # Lightning's launcher keeps the empty folder that rank 0 has handed the weights over in.
    if left := [path for path in (launched.folder / "tmp").rglob("*") if not path.is_dir()]:
        found.append(f"temporary files left: {left}")
    if left_memory := [name for name in set(os.listdir("/dev/shm")) - before if not _is_in_use(name)]:
        found.append(f"shared memory left: {left_memory}")
    output = launched.output
    if "Exception in thread" in output or "unraisable" in output or "Exception ignored" in output:
        found.append("noise: an exception in a thread, or one that was ignored")
    if launched.returncode:
        trained = (launched.folder / "trained").exists()
        if trained and not scenario.ends:
            found.append(f"the run has ended with code {launched.returncode}")
        elif "failed: " not in output:
            found.append("the run has ended, and does not say why")
        elif not struck(output):
            found.append("the run has ended, and nothing was done to it")
        return found
    resources = torch.load(launched.folder / "resources.pt")
    if any(resources["after"][name] > resources["before"][name] for name in resources["before"]):
        found.append(f"the process that has started the ranks keeps more than it had: {resources}")
    return found + _problems_of_training(scenario, launched)


def _problems_of_training(scenario: Scenario, launched: Launched) -> list[str]:
    found = []
    reports = {int(path.stem[4:]): launched.report(int(path.stem[4:])) for path in launched.folder.glob("rank*.pt")}
    mine = reports[0]
    updates = [update for update in mine["updates"] if update["applied"]]
    applied = [ticket for update in updates for ticket in update["tickets"]]
    per_epoch = scenario.tickets // scenario.ranks * scenario.ranks
    if len(applied) != per_epoch * scenario.epochs:
        found.append(f"{len(applied)} batches were applied, not {per_epoch} in each of {scenario.epochs} epochs")
    for epoch in range(scenario.epochs):
        counts = Counter(applied[epoch * per_epoch : (epoch + 1) * per_epoch])
        if len(found_groups := _groups_in(updates, epoch, per_epoch)) > 1:
            found.append(f"epoch {epoch}: gradients came with different hyperparameters: {found_groups}")
        if counts != Counter(range(per_epoch)):
            twice = [ticket for ticket, count in counts.items() if count > 1]
            missing = sorted(set(range(per_epoch)) - set(counts))
            found.append(f"epoch {epoch}: applied twice {twice}, not at all {missing}")
    bound = 4 * scenario.ranks if mine["bound"] == "auto" else mine["bound"]
    stalest = max(update["staleness"] for update in updates)
    if bound is not None and stalest > bound:
        found.append(f"a gradient was {stalest} versions old, and the bound is {bound}")
    for rank, other in reports.items():
        for name in ("parameters", "buffers", "step"):
            if not _equal(mine[name], other[name]):
                found += [f"{name} of rank {rank} are not rank 0's"]
    return found


def _groups_in(updates: list[dict[str, Any]], epoch: int, per_epoch: int) -> set[tuple[float, ...]]:
    """The hyperparameters that an epoch's gradients came with."""
    found, done = set(), 0
    for update in updates:
        if epoch * per_epoch <= done < (epoch + 1) * per_epoch:
            found.add(tuple(update["groups"]))
        done += len(update["tickets"])
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _is_in_use(name: str) -> bool:
    """Whether the process still runs that has made a segment, as its name says; those of others are in use."""
    # A lock of multiprocessing's, which has no process in its name and is on its way out.
    if name.startswith("sem."):
        return True
    pids = [int(part) for part in name.split("_") if part.isdigit()]
    return not pids or any(os.path.exists(f"/proc/{pid}") for pid in pids)


def struck(output: str) -> int:
    """How many faults a run's output tells of."""
    return output.count(" lightning_async: fault: ")


def main() -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=2000, help="how many are to strike")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each run has the next one")
    parser.add_argument("--runs", type=int, help="how many runs, in place of --faults")
    parser.add_argument("--keep", type=Path, help="a folder for what the runs leave; those that go well leave nothing")
    parser.add_argument(
        "--stopped-s",
        type=float,
        default=1.5,
        help="worker_timeout of runs with a stopped rank; 1.5, busy machines need 4",
    )
    parser.add_argument("--deaths", type=int, help="one run with that many deaths and joins, in place of many runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.deaths:
        found = problems_of_deaths(given.deaths, Path(tempfile.mkdtemp(prefix="soak-deaths-", dir=given.keep)))
        print("\n".join(found) or "memory, descriptors and threads stay as they are")
        return 1 if found else 0
    started, seed, done, failed = time.monotonic(), given.seed, 0, []
    places: Counter[str] = Counter()
    while seed - given.seed < given.runs if given.runs else done < given.faults:
        scenario = Scenario.of(seed)
        if scenario.strategy["worker_timeout"] < given.stopped_s:
            patient = scenario.strategy | {"worker_timeout": given.stopped_s}
            scenario = dataclasses.replace(scenario, strategy=patient)
        folder = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-", dir=given.keep))
        found = run(scenario, folder)
        log = folder / "output.txt"
        output = log.read_text(errors="replace") if log.exists() else ""
        done += struck(output)
        for fault in scenario.faults:
            places[fault.place] += f"fault: {fault.kind} at {fault.place} {fault.step}" in output
        if found:
            failed.append(seed)
            (folder / "problems.txt").write_text("\n".join(found))
            print(f"\nseed {seed}: {scenario}\n" + "\n".join(found)[:6000])
            print(f"what it left is in {folder}; again: python -m tests.faults.soak --runs 1 --seed {seed}", flush=True)
        else:
            shutil.rmtree(folder)
        if seed % 20 == 0 or given.runs == 1:
            minutes = (time.monotonic() - started) / 60
            print(f"{seed - given.seed + 1} runs, {done} faults, {len(failed)} failed, {minutes:.1f} min", flush=True)
        seed += 1
    print(f"{seed - given.seed} runs, {done} faults in {(time.monotonic() - started) / 60:.1f} min")
    print(", ".join(f"{place} {count}" for place, count in places.most_common()))
    print(f"failed: seeds {', '.join(map(str, failed))}" if failed else "every run was as it is to be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
