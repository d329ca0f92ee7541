"""What the strategy costs where nobody is slow: samples a second of real training steps, async_amsgrad beside DDP.

Run ``python -m benchmarks.overhead``. Ranks of one speed train LeNet-5 and ResNet18 on random images, one thread each.
For the asynchronous runs the time that rank 0 spends in each part of the exchange is added up and divided by its steps.
With more than one rank the holder is also given a process of its own (``holder="process"``).

With ``--device cuda`` all ranks share the first GPU, and the holder on the GPU and ``overlap=True`` are measured too
(overlap alone where NCCL carries, since the holder is on the GPU then). Parameters then travel as `docs/gpu.md` says,
and DDP reduces over ``--backend``: NCCL takes several ranks on one GPU only where NCCL_MULTI_RANK_GPU_ENABLE=1 is set
and understood.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_async
from benchmarks.emulated import QUIET, hush_lightning
from benchmarks.record import save
from lightning_async.exchange.param_views import ParameterViews
from lightning_async.exchange.worker import Worker
from lightning_async.holder.holder import Holder
from recipes.models import LeNet5, ResNet18

ASYNC, APART, DDP = "async_amsgrad", "async_amsgrad, holder apart", "ddp"
ON_GPU, OVERLAP = "async_amsgrad, holder on the GPU", "async_amsgrad, overlap"
# What each kind of run gives the strategy.
OPTIONS: dict[str, dict[str, Any]] = {
    ASYNC: {},
    APART: {"holder": "process"},
    ON_GPU: {"holder_device": "cuda"},
    OVERLAP: {"overlap": True},
}
# Model, image shape, batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet-5": (LeNet5, (1, 28, 28), 64),
    "ResNet18": (ResNet18, (3, 32, 32), 16),
}
# Parts of a step, outermost first: what is inside another one is counted in both.
PARTS: dict[str, tuple[type, str]] = {
    "draw": (Worker, "draw"),
    "push and pull": (Worker, "step"),
    "gather gradients": (ParameterViews, "gather"),
    "holder: update": (Holder, "try_push"),
    "holder: copy parameters": (Holder, "try_pull"),
    "install parameters": (ParameterViews, "install"),
}


class Images(Dataset[tuple[Tensor, int]]):
    """Random images, a few of them again and again, so that long runs need no memory for them."""

    def __init__(self, samples: int, shape: tuple[int, ...]) -> None:
        self.samples = samples
        self.images = torch.randn(64, *shape)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], 0


class ImageModule(LightningModule):
    """A classifier that leaves the first batches out of its measurement."""

    def __init__(self, net: nn.Module, warm_up: int) -> None:
        super().__init__()
        self.net = net
        self.warm_up = warm_up
        self.batches = 0
        self.started: Any = None
        self.ended: Any = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.batches == self.warm_up:
            self.started = self.mark()
        self.batches += 1
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.ended = self.mark()

    def mark(self) -> Any:
        """This moment; on a GPU the moment at which what has been queued is done, which nothing waits for here."""
        if self.device.type != "cuda":
            return time.perf_counter()
        cuda: Any = torch.cuda
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def measured_s(self) -> float:
        """Seconds from the end of the warm-up to the end of the last batch."""
        if self.device.type != "cuda":
            return float(self.ended - self.started)
        self.ended.synchronize()
        return float(self.started.elapsed_time(self.ended)) / 1e3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return lightning_async.AMSGrad(self.parameters(), lr=1e-4, fused=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=12.0, help="about how long each run takes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, taken in turns; medians are shown")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="the first GPU for all ranks, or none")
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"], help="of DDP's process group")
    parser.add_argument("--batch-size", type=int, help="in place of each model's own")
    arguments = parser.parse_args()
    # Counts GPUs without CUDA, which does not survive the fork that starts the ranks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    name = "overhead" if arguments.device == "cpu" else f"overhead_{arguments.device}_{arguments.backend}"
    found: list[dict[str, Any]] = []
    for model in arguments.models:
        step_s = float(_in_process("a step", _measure_step, model, arguments))
        for ranks in arguments.ranks:
            runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for _ in range(arguments.repeats):
                for strategy in kinds(ranks, arguments.device, arguments.backend):
                    run = measure(model, ranks, strategy, step_s, arguments)
                    runs[strategy].append(run)
                    print(f"   {strategy}: {run['samples_per_second']:.0f} samples/s", flush=True)
            found.append(compare(model, ranks, runs))
            save(name, vars(arguments), found)


def compare(model: str, ranks: int, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints and returns what runs of each kind have come to: medians, and each kind beside DDP."""
    rates = {
        strategy: sorted(run["samples_per_second"] for run in repeats)[len(repeats) // 2]
        for strategy, repeats in runs.items()
    }
    row: dict[str, Any] = {"model": model, "ranks": ranks, "ddp": rates[DDP]}
    print(f"{model}, {ranks} rank(s): ddp {rates[DDP]:.0f} samples/s")
    for strategy in [one for one in runs if one != DDP]:
        ours, repeats = rates[strategy], runs[strategy]
        row[strategy] = {"samples_per_second": ours, "parts_us": repeats[-1]["parts_us"]}
        print(f"   {strategy} {ours:.0f} samples/s, {ours / rates[DDP]:.3f}")
        parts = (f"{name} {value:.0f} us" for name, value in repeats[-1]["parts_us"].items() if value)
        print("      " + ", ".join(parts), flush=True)
        if ranks > 1:
            rank_0 = sorted(run["rank_0"] for run in repeats)[len(repeats) // 2]
            row[strategy]["rank_0"] = rank_0
            print(f"      rank 0 makes {rank_0:.3f} of another rank's samples a second", flush=True)
    return row


def kinds(ranks: int, device: str, backend: str) -> list[str]:
    """What is measured, in turns."""
    if ranks == 1:
        return [ASYNC, DDP]
    if device == "cpu":
        return [ASYNC, DDP, APART]
    return [ASYNC, DDP, OVERLAP] if backend == "nccl" else [ASYNC, DDP, ON_GPU, OVERLAP, APART]


def measure(model: str, ranks: int, strategy: str, step_s: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples per second over all ranks, rank 0's over another's, and rank 0's time in each part of a step."""
    return dict(_in_process(strategy, _measure, model, ranks, strategy, step_s, arguments))


def _in_process(what: str, target: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(queue, *arguments))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the measurement of {what} failed with exit code {process.exitcode}")
    return queue.get()


def _measure(queue: Any, model: str, ranks: int, strategy: str, step_s: float, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    make, shape, batch_size = MODELS[model]
    batch_size = arguments.batch_size or batch_size
    results: Any = multiprocessing.get_context("fork").SimpleQueue()
    # Those that share a GPU take turns on it.
    per_rank = max(10, int(arguments.seconds / step_s / (ranks if arguments.device == "cuda" else 1)))
    warm_up = per_rank // 5
    spent = _time_parts()

    class Reporting(ImageModule):
        def on_train_end(self) -> None:
            steps = max(1, self.batches - self.warm_up)
            rate = batch_size * steps / self.measured_s()
            parts = {name: 1e6 * total / self.batches for name, total in spent.items()}
            results.put((self.global_rank, rate, parts))

    hush_lightning()
    trainer = Trainer(
        strategy=_strategy(strategy, [torch.device(arguments.device, 0)] * ranks, arguments.backend),
        accelerator=arguments.device,
        devices=1,
        max_epochs=1,
        **QUIET,
    )
    data = Images(per_rank * ranks * batch_size, shape)
    trainer.fit(Reporting(make(), warm_up), DataLoader(data, batch_size))
    reports = sorted(results.get() for _ in range(ranks))
    rates = [rate for _, rate, _ in reports]
    others = sum(rates[1:]) / max(1, ranks - 1) or rates[0]
    queue.put({"samples_per_second": sum(rates), "rank_0": rates[0] / others, "parts_us": reports[0][2]})


def _strategy(name: str, devices: list[torch.device], backend: str) -> DDPStrategy:
    if name == DDP:
        return DDPStrategy(parallel_devices=devices, process_group_backend=backend, start_method="fork")
    return lightning_async.AsyncAMSGradStrategy(
        parallel_devices=devices, start_method="fork", summary=False, **OPTIONS[name]
    )


def _measure_step(queue: Any, model: str, arguments: argparse.Namespace) -> None:
    """The seconds of a forward and backward pass; in a process of its own, since the ranks' may not touch CUDA."""
    torch.set_num_threads(1)
    make, shape, batch_size = MODELS[model]
    batch_size, device = arguments.batch_size or batch_size, arguments.device
    net = make().to(device)
    images, labels = torch.randn(batch_size, *shape, device=device), torch.zeros(batch_size, dtype=torch.long)
    durations = []
    for _ in range(4):
        started = time.perf_counter()
        loss: Any = nn.functional.cross_entropy(net(images), labels.to(device))
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - started)
    queue.put(min(durations))


def _time_parts() -> dict[str, float]:
    """Adds up, in this process's training thread, the time spent in each of `PARTS`."""
    spent = dict.fromkeys(PARTS, 0.0)
    for name, (owner, method) in PARTS.items():
        setattr(owner, method, _timed(getattr(owner, method), name, spent))
    return spent


def _timed(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    return timed


if __name__ == "__main__":
    main()
