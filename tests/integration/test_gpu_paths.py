"""The ways that GPU ranks take, between real processes without a GPU.

Staging is around host buffers, and a communicator is a Gloo pair behind the thread and the handshake of NCCL's. What a
GPU alone can show is in tests/gpu.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from lightning_async.exchange import engine
from lightning_async.exchange import nccl_negotiation as nccl_office
from lightning_async.holder import placement as placement
from lightning_async.strategies import strategy as strategy_module
from lightning_async.strategies.gradient_exchange import GradientExchange
from lightning_async.transport.devices import RankDevices, place_holder
from lightning_async.transport.staged import StagedChannel
from tests.integration.test_equality import (
    BATCH_SIZE,
    SEED,
    Oddly,
    assert_equal_bit_for_bit,
    replay,
)
from tests.launch import launch, report
from tests.models import Recorder, fork_trainer, loader


class GlooCommunicator:
    """Two ranks that send to and receive from each other in order, on the host."""

    def __init__(self, store: Any, name: str, side: int, device: torch.device) -> None:
        self._store, self._side = PrefixStore(name, store), side
        self._pair: Any = None
        self._queued: list[Any] = []

    def mark(self) -> None:
        return None

    def connect(self) -> None:
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=20)
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self._pair = gloo(self._store, self._side, 2, options)

    def send(self, tensor: Tensor, after: None) -> None:
        self._queued.append(self._pair.send([tensor], 1 - self._side, 0))

    def recv(self, tensor: Tensor, after: None) -> None:
        self._queued.append(self._pair.recv([tensor], 1 - self._side, 0))

    def synchronize(self) -> None:
        while self._queued:
            self._queued.pop(0).wait()

    def abort(self) -> None:
        self._pair = None


class PassingStream:
    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        yield


def gpu(rank: int) -> dict[str, Any]:
    return {"uuid": f"GPU-{rank}", "nccl": "2.27.3", "shares": False}


@pytest.fixture(params=["staged", "nccl", "nccl and staged"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes host ranks take the ways of GPU ranks."""
    way = str(request.param)
    host = torch.device("cpu")
    if way == "staged":
        for module in (engine, placement):
            monkeypatch.setattr(module, "on_device", StagedChannel)
        return way

    def devices(self: GradientExchange) -> RankDevices:
        context = self._context
        facts = [gpu(rank) for rank in range(context.world_size)]
        if way == "nccl and staged":
            facts[1] = gpu(0)
        place = place_holder(context.options.holder_device, context.options.transport, facts)
        return RankDevices(host, facts[context.rank], place)

    monkeypatch.setattr(GradientExchange, "_devices", devices)
    # It looks at the device that ranks compute on.
    monkeypatch.setattr(strategy_module, "refuse_options", lambda *arguments: None)
    monkeypatch.setattr(nccl_office, "nccl_communicator", GlooCommunicator)
    monkeypatch.setattr(placement, "CudaHolderStream", PassingStream)
    made = placement.HolderPlacement
    monkeypatch.setattr(engine, "HolderPlacement", lambda *arguments: made(*arguments, stream=PassingStream()))
    return way


def test_a_run_over_the_ways_of_gpus_is_replayed_bit_for_bit(tmp_path: Path, ways: str) -> None:
    samples = 120

    def script(folder: Path) -> None:
        logging.getLogger("lightning_async").setLevel("INFO")
        seed_everything(SEED, verbose=False)
        recorder = Recorder()

        class Module(Oddly):
            def on_train_end(self) -> None:
                strategy: Any = self.trainer.strategy
                parameters = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
                channel, service = strategy.worker._turns.slots[0].channel, strategy.engine.local_service
                kinds = type(channel).__name__, type(getattr(service, "holder", None)).__name__
                report(Path.cwd(), self.global_rank, parameters=parameters, kinds=kinds)
                if self.global_rank == 0:
                    torch.save(recorder.updates, folder / "updates.pt")

        module = Module(lambda parameters: AMSGrad(parameters, lr=1e-2), sleep_s=(0.001, 0.002, 0.004))
        alone = copy.deepcopy(module)
        strategy = AsyncAMSGradStrategy(
            start_method="fork", holder_device="cuda" if ways == "nccl and staged" else "auto"
        )
        strategy.observers.append(recorder)
        trainer = fork_trainer(folder, 3, strategy, max_epochs=2)
        trainer.fit(module, loader(samples, BATCH_SIZE, shuffle=True))
        replay(alone, torch.load(folder / "updates.pt"), samples)
        torch.save({name: p.detach() for name, p in alone.named_parameters()}, folder / "replayed.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    replayed = torch.load(tmp_path / "replayed.pt")
    for rank in run.reports():
        assert_equal_bit_for_bit(rank["parameters"], replayed)
    assert [rank["kinds"] for rank in run.reports()] == {
        "staged": [("StagedChannel", "Holder"), ("StagedChannel", "NoneType"), ("StagedChannel", "NoneType")],
        "nccl": [("_End", "DeviceHolder"), ("NcclChannel", "NoneType"), ("NcclChannel", "NoneType")],
        "nccl and staged": [("_End", "DeviceHolder"), ("SharedMemoryChannel", "NoneType"), ("NcclChannel", "NoneType")],
    }[ways]
