"""Rank 0 is killed, with the holder in its process or in one of its own: how soon the run goes on, and what is lost.

Run ``python -m benchmarks.lost_rank0``. Four forked ranks train with ``on_worker_failure="continue"``; rank 0 is killed
some times, one after the other. What has started the ranks starts all of them anew by itself, from the newest snapshot;
a holder's own process has left what it had. Seconds run from the kill until a rank, and until every rank, begins its
first step. Updates are lost that a rank had been told of before the kill, and that the run then goes on without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.churn_runs import Event, Notebook, events_in
from benchmarks.record import save
from lightning_async.chaos.processes import descendants, parents

__all__ = ["Loss", "Run", "losses_in"]

SIZES = {"44K": 44_426, "1M": 1_000_000, "11.2M": 11_173_962}
HOLDERS: tuple[Literal["thread", "process"], ...] = ("thread", "process")
_HUNG_S = 60.0


@dataclass(frozen=True)
class Run:
    """A training whose rank 0 is killed.

    Args:
        holder: where the holder is.
        size: of the model, a key of `SIZES`.
        folder: where it works and tells.
        ranks: number of ranks.
        step_s: seconds that a step sleeps.
        snapshot_s: seconds between two snapshots.
        batches: of an epoch.
    """

    holder: Literal["thread", "process"]
    size: str
    folder: str
    ranks: int = 4
    step_s: float = 0.05
    snapshot_s: float = 10.0
    batches: int = 4_000


@dataclass(frozen=True)
class Loss:
    """What became of one kill.

    Args:
        first_s: seconds until a rank trained.
        all_s: seconds until all of them did.
        updates: number of updates that were lost.
    """

    first_s: float
    all_s: float
    updates: int


def losses_in(events: list[Event], kills: list[float], ranks: int) -> list[Loss]:
    """What became of each kill.

    Args:
        events: of all processes, by time.
        kills: when rank 0 was killed.
        ranks: number of ranks.

    Examples:
        >>> told = [
        ...     {"what": "batch", "at_s": 1.0, "version": 8},
        ...     {"what": "begins", "at_s": 4.0, "version": 5},
        ...     {"what": "batch", "at_s": 5.0, "version": 6},
        ...     {"what": "begins", "at_s": 7.0, "version": 6},
        ... ]
        >>> losses_in(told, [2.0, 6.0], ranks=1)
        [Loss(first_s=2.0, all_s=2.0, updates=3), Loss(first_s=1.0, all_s=1.0, updates=0)]
    """
    found = []
    for since, kill, until in zip([0.0, *kills], kills, [*kills[1:], float("inf")], strict=False):
        told = [event["version"] for event in events if event["what"] == "batch" and since < event["at_s"] <= kill]
        begun = [event for event in events if event["what"] == "begins" and kill < event["at_s"] <= until]
        from_version = min(event["version"] for event in begun)
        first_s, all_s = begun[0]["at_s"] - kill, begun[ranks - 1]["at_s"] - kill
        found.append(Loss(round(first_s, 2), round(all_s, 2), max(0, max(told) - from_version)))
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["44K", "11.2M"])
    parser.add_argument("--holders", nargs="+", choices=HOLDERS, default=list(HOLDERS))
    parser.add_argument("--kills", type=int, default=4, help="of each run")
    parser.add_argument("--every", type=float, default=14.0, help="seconds from when all train until the kill")
    parser.add_argument("--batches", type=int, default=4_000, help="of an epoch; each begins with a snapshot")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        _train(Run(**json.loads(arguments.run)))
        return
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))
    os.environ["OMP_NUM_THREADS"] = "1"
    print("parameters  holder   kills  a rank trains after  all do  updates lost  load", flush=True)
    table = []
    for size in arguments.sizes:
        for holder in arguments.holders:
            run = Run(holder, size, tempfile.mkdtemp(prefix="lost-rank0-"), batches=arguments.batches)
            losses = kill_rank_0(run, arguments.kills, arguments.every)
            row = {
                "size": size,
                "holder": holder,
                "kills": len(losses),
                "first_s": statistics.median(loss.first_s for loss in losses),
                "all_s": statistics.median(loss.all_s for loss in losses),
                "lost": [loss.updates for loss in losses],
                "load": round(os.getloadavg()[0], 1),
            }
            table.append(row)
            lost = f"{min(row['lost'])} to {max(row['lost'])}"
            print(
                f"{size:>10}  {holder:7}  {row['kills']:5}  {row['first_s']:17.2f} s  {row['all_s']:4.2f} s  {lost:>12}"
                f"  {row['load']:4}",
                flush=True,
            )
    save("lost-rank0", {name: value for name, value in vars(arguments).items() if name != "run"}, table)


def kill_rank_0(run: Run, kills: int, every_s: float) -> list[Loss]:
    """Runs one training and kills its rank 0 some times."""
    folder = run.folder
    killed: list[float] = []
    command = [sys.executable, "-m", "benchmarks.lost_rank0", "--run", json.dumps(asdict(run))]
    with (Path(folder) / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        for _ in range(kills):
            pid = _wait_until_all_train(run, killed[-1] if killed else 0.0)
            time.sleep(every_s)
            killed.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)
        _wait_until_all_train(run, killed[-1])
        return losses_in(events_in(Path(folder)), killed, run.ranks)
    finally:
        below = descendants(process.pid, parents())
        process.kill()
        process.wait()
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # noqa: PERF203  # each may be gone by itself
                continue
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_all_train(run: Run, since: float) -> int:
    """Waits until every rank has begun since then; returns the process id of rank 0."""
    deadline = time.monotonic() + _HUNG_S
    while time.monotonic() < deadline:
        begun = [one for one in events_in(Path(run.folder)) if one["what"] == "begins" and one["at_s"] > since]
        if len(begun) == run.ranks:
            return int(next(one["pid"] for one in begun if one["rank"] == 0))
        time.sleep(0.05)
    raise SystemExit(f"not every rank trains:\n{(Path(run.folder) / 'output.txt').read_text()[-3000:]}")


def _train(run: Run) -> None:
    import lightning.pytorch as pl
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset

    from benchmarks.emulated import QUIET, hush_lightning, sizes_of
    from lightning_async import AsyncAMSGradStrategy
    from lightning_async.runtime import restart_counts

    notebook = Notebook(run.folder)
    # It is for ranks that fail by themselves; here the benchmark says when one is killed.
    restart_counts.back_off_s = lambda count: 0.0

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes_of(SIZES[run.size]))
            self.begun = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            strategy: Any = self.trainer.strategy
            what, self.begun = "batch" if self.begun else "begins", True
            notebook.note(what, rank=strategy.worker_rank, version=strategy.version)
            time.sleep(run.step_s)
            return torch.stack([weight.sum() for weight in self.weights]).sum() * batch[0].mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-6, amsgrad=True)

    hush_lightning()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    strategy = AsyncAMSGradStrategy(
        start_method="fork",
        holder=run.holder,
        on_worker_failure="continue",
        max_restarts=1000,
        snapshot_every_s=run.snapshot_s,
        summary=False,
    )
    arguments: dict[str, Any] = {**QUIET, "accelerator": "cpu", "max_epochs": -1, "default_root_dir": run.folder}
    data = DataLoader(TensorDataset(torch.ones(run.batches, 1)), batch_size=1, shuffle=True)
    pl.Trainer(strategy=strategy, devices=run.ranks, **arguments).fit(Module(), data)


if __name__ == "__main__":
    main()
