"""Runs of emulated steps, for benchmarks: a rank sleeps as long as its hardware would compute, or keeps a core busy."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_async
from benchmarks.network import Link, leave_other_processes
from lightning_async.monitoring.diagnosis import RunFacts

__all__ = ["LENET5_PARAMETERS", "QUIET", "RESNET18_PARAMETERS", "Step", "hush_lightning", "measure", "sizes_of"]

LENET5_PARAMETERS = 44_426
RESNET18_PARAMETERS = 11_173_962


def sizes_of(parameters: int) -> list[int]:
    """The sizes of the tensors of a model.

    As many as ResNet18 has, so that a large model's gradient comes in pieces that fit into a cache.
    """
    return [parameters] if parameters < 1_000_000 else [len(part) for part in torch.arange(parameters).chunk(62)]


@dataclass(frozen=True)
class Step:
    """What a rank does for a batch.

    Args:
        sleep_s: seconds of sleep, which takes no core.
        products: matrix products to compute with one core, about 0.1 ms each.
        noise: standard deviation of the logarithm of a factor on both, drawn anew for each batch.
    """

    sleep_s: float = 0.0
    products: int = 0
    noise: float = 0.0

    def take(self, random: np.random.Generator) -> None:
        """Takes the step."""
        factor = float(np.exp(random.normal(0.0, self.noise))) if self.noise else 1.0
        if self.sleep_s:
            time.sleep(self.sleep_s * factor)
        matrix = torch.full((160, 160), 1e-3)
        for _ in range(round(self.products * factor)):
            torch.mm(matrix, matrix)


class EmulatedModule(LightningModule):
    """Parameters whose gradient costs little more than writing it; each rank takes its own step for a batch.

    Args:
        parameters: number of parameters.
        steps: of each rank.
    """

    def __init__(self, parameters: int, steps: Sequence[Step]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes_of(parameters))
        self.steps = steps
        self.started = self.ended = 0.0
        self._random = np.random.default_rng()

    def on_train_start(self) -> None:
        self._random = np.random.default_rng(self.global_rank)
        self.trainer.strategy.barrier()
        self.started = time.perf_counter()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps[self.global_rank].take(self._random)
        return torch.stack([weight.sum() for weight in self.weights]).sum() * batch[0].mean()

    def on_train_end(self) -> None:
        self.ended = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return lightning_async.AMSGrad(self.parameters(), lr=1e-4, fused=True)


def measure(
    strategy: Any,
    steps: Sequence[float | Step],
    batches: int,
    parameters: int,
    with_facts: bool = False,
    link: Link | None = None,
) -> dict[str, Any]:
    """Trains in ranks of their own and returns rank 0's view of it.

    Args:
        strategy: a name or a factory (called in the measuring process) of a strategy that forks its ranks.
        steps: each rank's, or the seconds that it sleeps.
        batches: batches over all ranks.
        parameters: number of parameters of the model.
        with_facts: whether to return what the diagnosis looks at, which JSON cannot hold.
        link: between two hosts that have half of the ranks each; without it, all are on this one.

    Returns:
        ``batches_per_second`` over all ranks, ``start_s`` from the call of fit to the first batch, and for
        asynchronous strategies ``waiting``, the fraction of its time that the mean rank spent in push and pull, and
        ``facts`` and the counted ``staleness``, if they are wanted.
    """
    taken = [step if isinstance(step, Step) else Step(sleep_s=step) for step in steps]
    # A process per measurement and host, so that none inherits the threads and process groups of another.
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    hosts = [None] if link is None else [link.a, link.b]
    processes = [
        context.Process(target=_measure, args=(queue, strategy, taken, batches, parameters, (node, len(hosts))))
        for node in range(len(hosts))
    ]
    for host, process in zip(hosts, processes, strict=True):
        host.run(process.start) if host is not None else process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the measurement of {strategy} failed with exit code {process.exitcode}")
    found = dict(queue.get())
    return found if with_facts else {name: found[name] for name in found if name not in ("facts", "staleness")}


def _measure(
    queue: Any, strategy: Any, steps: list[Step], batches: int, parameters: int, place: tuple[int, int]
) -> None:
    warnings.filterwarnings("ignore")
    ranks, (node, nodes) = len(steps), place
    if nodes > 1:
        leave_other_processes()
        # The host's name is this machine's, whose addresses it does not have.
        os.environ |= {"MASTER_ADDR": Link.ADDRESS, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
        os.environ["NODE_RANK"] = str(node)
    results: Any = multiprocessing.get_context("fork").SimpleQueue()

    class Reporting(EmulatedModule):
        def on_train_end(self) -> None:
            super().on_train_end()
            if self.global_rank == 0:
                seconds = self.ended - self.started
                found: dict[str, Any] = {"batches_per_second": batches / seconds, "start_s": self.started - called}
                strategy = self.trainer.strategy
                if isinstance(strategy, lightning_async.AsyncStrategy):
                    stats = strategy.stats
                    own = [stats.step_seconds(rank) for rank in range(ranks)]
                    found["facts"] = RunFacts.of(strategy.configuration, stats.as_dict(), own)
                    found["waiting"] = sum(stats.wait_seconds_by_rank.values()) / (seconds * ranks)
                    found["staleness"] = dict(stats.staleness)
                    found["staleness_max"] = max(stats.staleness)
                results.put(found)

    module = Reporting(parameters, steps)
    hush_lightning()
    trainer = Trainer(
        strategy=strategy() if callable(strategy) else strategy,
        accelerator="cpu",
        devices=ranks // nodes,
        num_nodes=nodes,
        max_epochs=1,
        **QUIET,
    )
    if isinstance(trainer.strategy, lightning_async.AsyncStrategy):
        trainer.strategy.summary = False
    called = time.perf_counter()
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(batches, 1)), batch_size=1))
    if node == 0:
        queue.put(results.get())


# Arguments of a Trainer that says and writes nothing.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def hush_lightning() -> None:
    """Keeps what Lightning says of each run out of a benchmark's table."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
