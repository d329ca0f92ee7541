"""What only a GPU can show. Skipped without CUDA.

How to run, on a machine with a CUDA build of torch:

    python -m pytest tests/gpu -q                                 # one GPU: staging, the holder on the GPU, precision
    python -m pytest tests/gpu -q                                 # two GPUs: NCCL as well
    NCCL_MULTI_RANK_GPU_ENABLE=1 python -m pytest tests/gpu -q    # one GPU, if NCCL's version allows two ranks on it

Ranks are forked, so nothing in the test process may initialise CUDA. The other tests see no GPU (tests/conftest.py), so
these may run beside them.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.cuda import count_gpus
from tests.faults.injector import Fault, FaultInjector
from tests.integration.test_equality import BATCH_SIZE, SEED, Oddly, global_order, replay
from tests.launch import Launched, launch, report
from tests.models import Recorder, TinyClassifier, fork_trainer, loader

GPUS = count_gpus()
SHARES = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
END_S = 60.0

pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
needs_nccl = pytest.mark.skipif(
    GPUS == 1 and not SHARES,
    reason="NCCL needs two CUDA devices, or NCCL_MULTI_RANK_GPU_ENABLE=1 where it is supported",
)

STAGED = [("StagedChannel", "Holder"), ("StagedChannel", "NoneType"), ("StagedChannel", "NoneType")]
STAGED_APART = [("StagedChannel", "NoneType")] * 3
STAGED_ON_GPU = [("_End", "DeviceHolder"), ("StagedChannel", "NoneType"), ("StagedChannel", "NoneType")]
NCCL = [("_End", "DeviceHolder"), ("NcclChannel", "NoneType"), ("NcclChannel", "NoneType")]

WAYS = [
    pytest.param({"transport": "shm"}, False, STAGED, id="staged-shm"),
    pytest.param({"transport": "gloo"}, False, STAGED, id="staged-gloo"),
    pytest.param({"transport": "shm", "overlap": True}, False, STAGED, id="staged-overlap"),
    pytest.param({"transport": "shm", "holder": "process"}, False, STAGED_APART, id="staged-holder-process"),
    pytest.param({"transport": "shm", "holder_device": "cuda"}, False, STAGED_ON_GPU, id="staged-both-ends"),
    pytest.param({"transport": "nccl"}, True, NCCL, id="nccl", marks=needs_nccl),
    pytest.param({"transport": "auto"}, True, NCCL, id="auto", marks=needs_nccl),
]


@pytest.fixture(autouse=True)
def without_gpus() -> None:
    """In place of the fixture that hides GPUs from other tests."""


def devices(ranks: int, apart: bool) -> list[torch.device]:
    """One GPU for all ranks, or one for each as far as there are enough: no worker on rank 0's."""
    if not apart or GPUS < 2:
        return [torch.device("cuda", 0)] * ranks
    return [torch.device("cuda", 0 if rank == 0 else 1 + (rank - 1) % (GPUS - 1)) for rank in range(ranks)]


def gpu_trainer(folder: Path, ranks: int, apart: bool, options: dict[str, Any], **arguments: Any) -> Any:
    strategy = AsyncAMSGradStrategy(start_method="fork", parallel_devices=devices(ranks, apart), **options)
    return fork_trainer(folder, 1, strategy, accelerator="cuda", **arguments), strategy


class OnGpu(Oddly):
    """Takes batches from anywhere, and keeps a buffer on the host."""

    def __init__(self, sleep_s: tuple[float, ...] = (0.001, 0.002, 0.004)) -> None:
        super().__init__(lambda parameters: AMSGrad(parameters, lr=1e-2), sleep_s=sleep_s)

    def loss(self, batch: Any) -> Tensor:
        return super().loss([part.to(self.device) for part in batch])

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        channel, service = strategy.worker._lanes[0].channel, strategy._engine.local_service
        holder = getattr(service, "holder", None)
        report(
            Path.cwd(),
            self.global_rank,
            parameters={name: parameter.detach().cpu() for name, parameter in self.named_parameters()},
            kinds=(type(channel).__name__, type(holder).__name__),
            devices={str(parameter.device) for parameter in self.parameters()},
        )


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name].cpu(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("options", "apart", "kinds"), WAYS)
def test_a_recorded_run_replayed_on_one_gpu_gives_the_same_parameters(
    tmp_path: Path, options: dict[str, Any], apart: bool, kinds: list[tuple[str, str]]
) -> None:
    samples = 160

    def script(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        recorder = Recorder()

        class Module(OnGpu):
            def on_train_end(self) -> None:
                super().on_train_end()
                if self.global_rank == 0:
                    torch.save(recorder.updates, folder / "updates.pt")

        module = Module()
        alone = copy.deepcopy(module)
        trainer, strategy = gpu_trainer(folder, 3, apart, options, max_epochs=2)
        strategy.observers.append(recorder)
        trainer.fit(module, loader(samples, BATCH_SIZE, shuffle=True))
        alone.to("cuda:0")
        replay(alone, torch.load(folder / "updates.pt"), samples)
        torch.save({name: p.detach().cpu() for name, p in alone.named_parameters()}, folder / "replayed.pt")

    run = launch(script, tmp_path, timeout_s=200)

    assert run.returncode == 0, run.output
    assert [rank["kinds"] for rank in run.reports()] == kinds
    assert all(device.startswith("cuda") for rank in run.reports() for device in rank["devices"])
    replayed = torch.load(tmp_path / "replayed.pt")
    for rank in run.reports():
        assert_close(rank["parameters"], replayed)


@pytest.mark.parametrize("holder_device", ["auto", "cuda", "cpu"])
def test_one_rank_on_a_gpu_is_plain_amsgrad_there(tmp_path: Path, holder_device: str) -> None:
    def script(folder: Path) -> None:
        seed_everything(SEED, verbose=False)
        module = OnGpu(sleep_s=())
        alone = copy.deepcopy(module)
        data = loader(200, BATCH_SIZE)
        trainer, _ = gpu_trainer(folder, 1, False, {"holder_device": holder_device}, max_epochs=3)
        trainer.fit(module, data)
        alone.to("cuda:0")
        optimizer = torch.optim.Adam(alone.parameters(), lr=1e-2, amsgrad=True, fused=True)
        order = global_order(data.dataset)  # type: ignore[arg-type]
        for epoch in range(3):
            order.set_epoch(epoch)
            for batch in DataLoader(data.dataset, BATCH_SIZE, sampler=order):
                optimizer.zero_grad()
                alone.loss(batch).backward()
                optimizer.step()
        torch.save({name: p.detach().cpu() for name, p in alone.named_parameters()}, folder / "alone.pt")

    run = launch(script, tmp_path, timeout_s=200)

    assert run.returncode == 0, run.output
    assert run.report(0)["kinds"][1] == ("Holder" if holder_device == "cpu" else "DeviceHolder")
    assert_close(run.report(0)["parameters"], torch.load(tmp_path / "alone.pt"))


@pytest.mark.parametrize(("options", "apart"), [(way.values[0], way.values[1]) for way in WAYS[2:3]])
def test_a_checkpoint_from_a_gpu_loads_without_one_and_goes_on(
    tmp_path: Path, options: dict[str, Any], apart: bool
) -> None:
    def script(folder: Path) -> None:
        for epochs in (1, 2):
            trainer, _ = gpu_trainer(folder, 2, apart, options, max_epochs=epochs, enable_checkpointing=True)
            path = folder / "first.ckpt"
            trainer.fit(OnGpu(), loader(80, BATCH_SIZE), ckpt_path=path if epochs == 2 else None, weights_only=False)
            if epochs == 1:
                found = next(folder.rglob("*.ckpt"))
                found.rename(path)

    run = launch(script, tmp_path, timeout_s=200)

    assert run.returncode == 0, run.output
    saved = torch.load(tmp_path / "first.ckpt", weights_only=False)
    state = saved["optimizer_states"][0]["state"]
    assert {value.device.type for entry in state.values() for value in entry.values()} == {"cpu"}
    module = TinyClassifier()
    module.net = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer = torch.optim.Adam(module.parameters(), amsgrad=True)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    module.load_state_dict(saved["state_dict"])


class Normed(OnGpu):
    """Batch norm, and buffers that are left on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def on_fit_start(self) -> None:
        self.register_buffer("on_host", torch.ones(2))
        self.register_buffer("count_on_host", torch.ones(1, dtype=torch.int64))

    def on_train_end(self) -> None:
        super().on_train_end()
        values = {name: buffer.cpu() for name, buffer in self.named_buffers()}
        report(Path.cwd(), self.global_rank, buffers=values)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("options", "apart"), [(way.values[0], way.values[1]) for way in (WAYS[0], WAYS[2])])
def test_ranks_agree_in_every_precision_and_with_buffers_on_the_host(
    tmp_path: Path, options: dict[str, Any], apart: bool, precision: str
) -> None:
    class Module(Normed):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch[0].to(self.device, next(self.parameters()).dtype), batch[1].to(self.device)
            return nn.functional.cross_entropy(self.net(x).float(), y)

    def script(folder: Path) -> None:
        trainer, _ = gpu_trainer(folder, 2, apart, options, max_epochs=2, precision=precision)
        trainer.fit(Module(), loader(96, BATCH_SIZE), loader(16, BATCH_SIZE))

    run = launch(script, tmp_path, timeout_s=200)

    assert run.returncode == 0, run.output
    first, second = (rank["buffers"] for rank in run.reports())
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(("options", "apart", "kinds"), WAYS)
def test_a_killed_rank_ends_the_run_in_time(
    tmp_path: Path, options: dict[str, Any], apart: bool, kinds: list[tuple[str, str]]
) -> None:
    def script(folder: Path) -> None:
        module = OnGpu()
        # Payloads that take a while, so that the rank dies with one under way now and then.
        module.net = nn.Sequential(nn.Linear(6, 1 << 18), nn.ReLU(), nn.Linear(1 << 18, 2))
        trainer, _ = gpu_trainer(
            folder, 3, apart, options, max_epochs=500, callbacks=[FaultInjector((Fault(2, 20, "kill"),))]
        )
        trainer.fit(module, loader())

    run: Launched = launch(script, tmp_path, timeout_s=200)

    seconds = time.monotonic() - float((tmp_path / "struck").read_text())
    assert run.returncode != 0
    assert "rank 2" in run.output and "SIGKILL" in run.output
    assert "terminate called" not in run.output
    assert seconds < END_S
