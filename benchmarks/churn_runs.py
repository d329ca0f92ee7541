"""The trainings that `benchmarks.churn` kills ranks of: each process tells in a file of its own what it does, and when.

``python -m benchmarks.churn_runs '<json>'`` is one of them, or one rank of it, without an end: the benchmark ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Churned", "Event", "Notebook", "command_of", "events_in"]

Event = dict[str, Any]


@dataclass(frozen=True)
class Churned:
    """A training that ranks are killed of.

    Args:
        kind: ``fork`` and ``popen`` are async_amsgrad with that start method, ``ddp`` a rank that torchrun starts,
            ``torchft`` a replica group of one process, ``lighthouse`` what its replicas find each other by.
        folder: where it works and tells.
        ranks: number of ranks.
        parameters: of the model.
        step_s: seconds that a step sleeps.
        samples: of an epoch; a batch is one.
        checkpoint_steps: DDP's steps between two checkpoints.
        rank: of a torchft replica.
        lighthouse: address of torchft's lighthouse.
    """

    kind: str
    folder: str
    ranks: int
    parameters: int
    step_s: float
    samples: int
    checkpoint_steps: int = 50
    rank: int = 0
    lighthouse: str = ""


def command_of(run: Churned) -> list[str]:
    """The command line that starts it."""
    module = ["-m", "benchmarks.churn_runs", json.dumps(asdict(run))]
    if run.kind != "ddp":
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.ranks}"]
    return [sys.executable, *torchrun, "--max-restarts=1000", "--monitor-interval=0.1", *module]


def events_in(folder: Path) -> list[Event]:
    """What the processes of a run have told so far, by time; the last line of one that was killed may be cut off."""
    found = []
    for path in folder.glob("events-*.jsonl"):
        lines = path.read_text().split("\n")[:-1]
        found += [json.loads(line) | {"pid": int(path.stem.partition("-")[2])} for line in lines]
    return sorted(found, key=lambda event: float(event["at_s"]))


class Notebook:
    """Where this process tells what it does."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._files: dict[int, TextIO] = {}

    def note(self, what: str, at_s: float | None = None, **facts: Any) -> None:
        """Writes one line; a forked process writes a file of its own."""
        pid = os.getpid()
        if pid not in self._files:
            self._files[pid] = (self._folder / f"events-{pid}.jsonl").open("a", buffering=1)
        at_s = time.monotonic() if at_s is None else at_s
        self._files[pid].write(json.dumps({"what": what, "at_s": at_s, **facts}) + "\n")


def _started_s() -> float:
    """When this process was started, by the monotonic clock; to a hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def _train(run: Churned, notebook: Notebook) -> None:
    import lightning.pytorch as pl
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_async
    from benchmarks.emulated import QUIET, hush_lightning, sizes_of
    from lightning_async.runtime import restart_counts

    torch.set_num_threads(1)
    imported_s = time.monotonic()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes_of(run.parameters))
            self.begun = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if not self.begun:
                self.begun = True
                strategy = self.trainer.strategy
                rank = getattr(strategy, "worker_rank", self.global_rank)
                # A forked rank has imported everything when it is started.
                ready_s = max(imported_s, _started_s())
                notebook.note("begins", rank=rank, ready_s=ready_s, step=self.trainer.global_step)
            time.sleep(run.step_s)
            return torch.stack([weight.sum() for weight in self.weights]).sum() * batch[0].mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return lightning_async.AMSGrad(self.parameters(), lr=1e-4, fused=True)

    class Steps(pl.Callback):
        """Notes the samples of each step of DDP."""

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
            samples = rest[1][1].tolist()
            notebook.note("step", step=trainer.global_step, epoch=trainer.current_epoch, samples=samples)

    hush_lightning()
    warnings.filterwarnings("ignore")
    data = TensorDataset(torch.zeros(run.samples, 1), torch.arange(run.samples))
    arguments: dict[str, Any] = {**QUIET, "accelerator": "cpu", "devices": run.ranks, "max_epochs": -1}
    resume: str | None = None
    if run.kind == "ddp":
        from lightning.pytorch.callbacks import ModelCheckpoint

        checkpoints = ModelCheckpoint(run.folder, every_n_train_steps=run.checkpoint_steps, save_last=True)
        arguments |= {"strategy": "ddp", "enable_checkpointing": True, "callbacks": [Steps(), checkpoints]}
        resume = "last"
    else:

        def observe(update: Any, tickets: tuple[int, ...]) -> None:
            notebook.note("update", rank=update.push.worker, tickets=tickets, applied=update.applied)

        # It is for ranks that fail by themselves; here the benchmark says when one is killed.
        restart_counts.back_off_s = lambda count: 0.0
        start_method: Any = run.kind
        arguments["strategy"] = strategy = lightning_async.AsyncAMSGradStrategy(
            on_worker_failure="continue", max_restarts=1000, start_method=start_method, summary=False
        )
        strategy.observers.append(observe)
    pl.Trainer(**arguments).fit(Module(), DataLoader(data, batch_size=1, shuffle=True), ckpt_path=resume)


def _train_by_torchft(run: Churned, notebook: Notebook) -> None:
    """One replica group of torchft, written as its own example train_ddp.py is."""
    import torch
    import torchft
    from torch import nn

    from benchmarks.emulated import sizes_of

    torch.set_num_threads(1)
    ready_s = time.monotonic()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes_of(run.parameters))

        def forward(self, scale: torch.Tensor) -> torch.Tensor:
            return torch.stack([weight.sum() for weight in self.weights]).sum() * scale

    model = Model()
    inner = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True, fused=True)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=5)),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        replica_id=f"replica-{run.rank}-",
        timeout=timedelta(seconds=10),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=run.lighthouse,
        hostname="127.0.0.1",
    )
    data = torch.utils.data.TensorDataset(torch.arange(run.samples))
    sampler = torchft.DistributedSampler(data, run.rank, run.ranks, group_rank=0, num_replicas=1)
    ddp, optimizer = torchft.DistributedDataParallel(manager, model), torchft.Optimizer(manager, inner)
    begun = False
    while True:
        for (samples,) in torch.utils.data.DataLoader(data, batch_size=1, sampler=sampler):
            optimizer.zero_grad()
            if not begun:
                begun = True
                notebook.note("begins", rank=run.rank, ready_s=ready_s, step=manager.current_step())
            time.sleep(run.step_s)
            ddp(torch.ones(())).backward()
            before = manager.current_step()
            optimizer.step()
            if manager.current_step() > before:
                notebook.note("committed", rank=run.rank, samples=samples.tolist(), step=manager.current_step())


def _serve_lighthouse(run: Churned, notebook: Notebook) -> None:
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100)
    notebook.note("lighthouse", address=lighthouse.address())
    while True:
        time.sleep(60.0)


def _main() -> None:
    run = Churned(**json.loads(sys.argv[1]))
    notebook = Notebook(run.folder)
    if run.kind == "torchft":
        _train_by_torchft(run, notebook)
    elif run.kind == "lighthouse":
        _serve_lighthouse(run, notebook)
    else:
        _train(run, notebook)


if __name__ == "__main__":
    _main()
