"""What only a GPU can show. Skipped without CUDA; GPU_KIT_STAND_IN=1 puts the host in its place (`card.py`).

How to run, on a machine with a CUDA build of torch (`tests/gpu/run.sh` runs this and more):

    python -m pytest tests/gpu -q                                 # one GPU: staging, the holder on the GPU, precision
    python -m pytest tests/gpu -q                                 # two GPUs: NCCL as well
    NCCL_MULTI_RANK_GPU_ENABLE=1 python -m pytest tests/gpu -q    # one GPU, if NCCL's version allows two ranks on it

Ranks are forked, so nothing in the test process may initialise CUDA. The other tests see no GPU (tests/conftest.py), so
these may run beside them.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from lightning_async.exchange.dial import policy_and_momentum
from tests.compatibility.test_precision import arguments_for
from tests.faults.injector import Fault, FaultInjector
from tests.gpu import card
from tests.integration.test_equality import BATCH_SIZE, SEED, Oddly, global_order, replay
from tests.launch import Launched, launch, report
from tests.models import Recorder, TinyClassifier, fork_trainer, loader

# The processes of a test, the start of CUDA in three ranks at once included.
RUN_S = 45.0

pytestmark = [
    pytest.mark.skipif(card.GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.timeout(100),
]
needs_nccl = pytest.mark.skipif(
    card.GPUS == 1 and not card.SHARES,
    reason="NCCL needs two CUDA devices, or NCCL_MULTI_RANK_GPU_ENABLE=1 where it is supported",
)


STAGED = [("StagedChannel", "Holder"), ("StagedChannel", "NoneType"), ("StagedChannel", "NoneType")]
STAGED_APART = [("StagedChannel", "NoneType")] * 3
STAGED_ON_GPU = [("_End", "DeviceHolder"), ("StagedChannel", "NoneType"), ("StagedChannel", "NoneType")]
NCCL = [("_End", "DeviceHolder"), ("NcclChannel", "NoneType"), ("NcclChannel", "NoneType")]

WAYS = [
    pytest.param({"transport": "shm"}, False, STAGED, id="staged-shm"),
    pytest.param({"transport": "tcp"}, False, STAGED, id="staged-tcp"),
    pytest.param({"transport": "shm", "overlap": True}, False, STAGED, id="staged-overlap"),
    pytest.param({"transport": "shm", "holder": "process"}, False, STAGED_APART, id="staged-holder-process"),
    pytest.param({"transport": "shm", "holder_device": "cuda"}, False, STAGED_ON_GPU, id="staged-both-ends"),
    pytest.param({"transport": "nccl"}, True, NCCL, id="nccl", marks=needs_nccl),
    pytest.param({"transport": "auto"}, True, NCCL, id="auto", marks=needs_nccl),
]
FROM_DDP: dict[str, Any] = {"gradients_per_update": 2, "staleness_policy": "from_ddp"}
# An update of more than one gradient, which are added up where the holder is.
MEANS = [
    pytest.param({"transport": "shm", "gradients_per_update": 2}, False, STAGED, id="staged-mean"),
    pytest.param(
        {"transport": "shm", "holder_device": "cuda", "gradients_per_update": 2},
        False,
        STAGED_ON_GPU,
        id="staged-mean-on-gpu",
    ),
    pytest.param({"transport": "nccl", "gradients_per_update": 2}, True, NCCL, id="nccl-mean", marks=needs_nccl),
    # What policies do to the optimizer's state, where it is.
    pytest.param({"transport": "shm", **FROM_DDP}, False, STAGED, id="staged-from-ddp"),
    pytest.param(
        {"transport": "shm", "holder_device": "cuda", "staleness_policy": "ordered_momentum"},
        False,
        STAGED_ON_GPU,
        id="staged-ordered-on-gpu",
    ),
    pytest.param(
        {"transport": "shm", "holder_device": "cuda", **FROM_DDP},
        False,
        STAGED_ON_GPU,
        id="staged-from-ddp-on-gpu",
    ),
]


def chosen(*names: str) -> list[Any]:
    return [way for way in (*WAYS, *MEANS) if way.id in names]


def gpu_trainer(folder: Path, ranks: int, apart: bool, options: dict[str, Any], **arguments: Any) -> Any:
    strategy = AsyncAMSGradStrategy(start_method="fork", parallel_devices=card.devices(ranks, apart), **options)
    return fork_trainer(folder, 1, strategy, accelerator=card.ACCELERATOR, **arguments), strategy


class OnGpu(Oddly):
    """Takes batches from anywhere, and may let the GPU be late with its gradients.

    Args:
        sleep_s: see `TinyClassifier`.
        late_ms: how long the GPU has other things to do when a backward pass begins; the host goes on at once.
    """

    def __init__(self, sleep_s: tuple[float, ...] = (0.001, 0.002, 0.004), late_ms: float = 0.0) -> None:
        super().__init__(lambda parameters: AMSGrad(parameters, lr=1e-2), sleep_s=sleep_s)
        self.late_ms = late_ms

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss([part.to(self.device) for part in batch])
        if self.late_ms and loss.requires_grad:
            loss.register_hook(lambda gradient: card.busy(self.late_ms))
        return loss

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        channel, service = strategy.worker._turns.slots[0].channel, strategy.engine.local_service
        holder = getattr(service, "holder", None)
        report(
            Path.cwd(),
            self.global_rank,
            parameters={name: parameter.detach().cpu() for name, parameter in self.named_parameters()},
            kinds=(type(channel).__name__, type(holder).__name__),
            devices={str(parameter.device) for parameter in self.parameters()},
            version=strategy.version,
        )


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name].cpu(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("options", "apart", "kinds"), [*WAYS, *MEANS])
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

        # Whoever sends a gradient before the GPU has it, or computes before the parameters have landed, sends another.
        module = Module(late_ms=3.0)
        alone = copy.deepcopy(module)
        trainer, strategy = gpu_trainer(folder, 3, apart, options, max_epochs=2)
        strategy.observers.append(recorder)
        trainer.fit(module, loader(samples, BATCH_SIZE, shuffle=True))
        alone.to(card.FIRST)
        chosen = strategy.options
        policy, _ = policy_and_momentum(chosen, [AMSGrad(alone.parameters())], 3)
        updates = torch.load(folder / "updates.pt")
        replay(alone, updates, samples, gradients_per_update=chosen.gradients_per_update, policy=policy)
        torch.save({name: p.detach().cpu() for name, p in alone.named_parameters()}, folder / "replayed.pt")

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode == 0, run.output
    assert [rank["kinds"] for rank in run.reports()] == kinds
    assert all(device.startswith(card.ACCELERATOR) for rank in run.reports() for device in rank["devices"])
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
        alone.to(card.FIRST)
        optimizer = torch.optim.Adam(alone.parameters(), lr=1e-2, amsgrad=True, fused=True)
        order = global_order(data.dataset)  # type: ignore[arg-type]
        for epoch in range(3):
            order.set_epoch(epoch)
            for batch in DataLoader(data.dataset, BATCH_SIZE, sampler=order):
                optimizer.zero_grad()
                alone.loss(batch).backward()
                optimizer.step()
        torch.save({name: p.detach().cpu() for name, p in alone.named_parameters()}, folder / "alone.pt")

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode == 0, run.output
    assert run.report(0)["kinds"][1] == ("Holder" if holder_device == "cpu" else "DeviceHolder")
    assert_close(run.report(0)["parameters"], torch.load(tmp_path / "alone.pt"))


def test_the_one_line_trains_on_a_gpu(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, 1, "async_amsgrad", accelerator=card.ACCELERATOR, max_epochs=2)
        trainer.fit(OnGpu(), loader(80, BATCH_SIZE), loader(16, BATCH_SIZE))

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode == 0, run.output
    assert run.report(0)["version"] == 40
    assert run.report(0)["devices"] == {str(card.FIRST)}


@pytest.mark.parametrize(("options", "apart", "kinds"), chosen("staged-overlap", "staged-both-ends", "nccl"))
def test_a_checkpoint_from_a_gpu_loads_without_one_and_goes_on(
    tmp_path: Path, options: dict[str, Any], apart: bool, kinds: list[tuple[str, str]]
) -> None:
    def script(folder: Path) -> None:
        for epochs in (1, 2):
            trainer, _ = gpu_trainer(folder, 2, apart, options, max_epochs=epochs, enable_checkpointing=True)
            path = folder / "first.ckpt"
            trainer.fit(OnGpu(), loader(80, BATCH_SIZE), ckpt_path=path if epochs == 2 else None, weights_only=False)
            if epochs == 1:
                found = next(folder.rglob("*.ckpt"))
                found.rename(path)

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode == 0, run.output
    assert [rank["version"] for rank in run.reports()] == [40, 40]
    # This process must not touch CUDA: the next tests' ranks are forked from it.
    saved = torch.load(tmp_path / "first.ckpt", weights_only=False, map_location="cpu")
    state = saved["optimizer_states"][0]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {20}
    module = TinyClassifier()
    module.net = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer = torch.optim.Adam(module.parameters(), amsgrad=True)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    module.load_state_dict(saved["state_dict"])

    def go_on_without(folder: Path) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        strategy = AsyncAMSGradStrategy(start_method="fork")
        trainer = fork_trainer(folder, 2, strategy, max_epochs=2, enable_checkpointing=True)
        trainer.fit(Oddly(), loader(80, BATCH_SIZE), ckpt_path=folder / "first.ckpt", weights_only=False)

    alone = launch(go_on_without, tmp_path, timeout_s=RUN_S)

    assert alone.returncode == 0, alone.output
    assert [rank["step"] for rank in alone.reports()] == [20, 20]


@pytest.mark.parametrize(("options", "apart", "kinds"), chosen("staged-shm", "staged-both-ends", "nccl"))
def test_a_checkpoint_from_a_host_goes_on_on_a_gpu(
    tmp_path: Path, options: dict[str, Any], apart: bool, kinds: list[tuple[str, str]]
) -> None:
    def script(folder: Path) -> None:
        # In a rank of its own: with a GPU in sight no process that is forked after a backward pass can have one.
        fork_trainer(folder, 1, "ddp_fork", enable_checkpointing=True).fit(Oddly(), loader(80, BATCH_SIZE))
        path = next(folder.rglob("*.ckpt")).rename(folder / "first.ckpt")
        trainer, _ = gpu_trainer(folder, 2, apart, options, max_epochs=2, enable_checkpointing=True)
        trainer.fit(OnGpu(), loader(80, BATCH_SIZE), ckpt_path=path, weights_only=False)

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode == 0, run.output
    first, second = run.reports()
    assert first["version"] == second["version"] == 60
    assert_close(first["parameters"], second["parameters"])


class Normed(OnGpu):
    """Batch norm, and buffers that are left on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.computed: set[torch.dtype] = set()

    def on_fit_start(self) -> None:
        self.register_buffer("on_host", torch.ones(2))
        self.register_buffer("count_on_host", torch.ones(1, dtype=torch.int64))

    def on_train_end(self) -> None:
        super().on_train_end()
        buffers = {name: buffer.cpu() for name, buffer in self.named_buffers()}
        parameters = {name: parameter.detach().cpu() for name, parameter in self.named_parameters()}
        report(Path.cwd(), self.global_rank, values={**parameters, **buffers}, computed=self.computed)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch[0].to(self.device, next(self.parameters()).dtype), batch[1].to(self.device)
        logits = self.net(x)
        self.computed.add(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), y)


@pytest.mark.parametrize(
    ("precision", "computed", "kept"),
    [
        ("32-true", torch.float32, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize(("options", "apart", "kinds"), chosen("staged-shm", "staged-overlap", "nccl"))
def test_ranks_agree_in_every_precision_and_with_buffers_on_the_host(
    tmp_path: Path,
    options: dict[str, Any],
    apart: bool,
    kinds: list[tuple[str, str]],
    precision: str,
    computed: torch.dtype,
    kept: torch.dtype,
) -> None:
    def script(folder: Path) -> None:
        # Lightning takes another precision for one of the names on a host.
        arguments = arguments_for(precision) if card.STANDS_IN else {"precision": precision}
        trainer, _ = gpu_trainer(folder, 2, apart, options, max_epochs=2, **arguments)
        trainer.fit(Normed(), loader(96, BATCH_SIZE), loader(16, BATCH_SIZE))

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode == 0, run.output
    first, second = run.reports()
    assert first["computed"] == second["computed"] == {computed}
    assert first["values"]["net.0.weight"].dtype == kept
    assert all(value.isfinite().all() for value in first["values"].values())
    assert [name for name, value in first["values"].items() if not value.equal(second["values"][name])] == []


@pytest.mark.parametrize(("options", "apart", "kinds"), WAYS)
def test_a_killed_rank_ends_the_run(
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

    run: Launched = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode != 0
    assert "rank 2" in run.output and "SIGKILL" in run.output
    assert "terminate called" not in run.output


@pytest.mark.parametrize(("options", "apart", "kinds"), chosen("staged-shm", "staged-both-ends", "nccl"))
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(1, 20, "raise"), "InjectedError: injected into training_step"),
        (Fault(0, 20, "kill"), "rank 0"),
    ],
    ids=["raises", "rank-0-killed"],
)
def test_a_rank_that_raises_and_a_lost_rank_0_end_the_run(
    tmp_path: Path, options: dict[str, Any], apart: bool, kinds: list[tuple[str, str]], fault: Fault, said: str
) -> None:
    def script(folder: Path) -> None:
        trainer, _ = gpu_trainer(folder, 3, apart, options, max_epochs=500, callbacks=[FaultInjector((fault,))])
        trainer.fit(OnGpu(), loader())

    run = launch(script, tmp_path, timeout_s=RUN_S)

    assert run.returncode != 0
    assert said in run.output
