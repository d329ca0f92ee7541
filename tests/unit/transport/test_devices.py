"""Where the holder lives and what NCCL can join: rules, and what a holder on a GPU does with its stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.placement import DeviceHolder, HolderPlacement
from lightning_async.holder.types import Push
from lightning_async.holder.update import FusedUpdate
from lightning_async.runtime.failure import FailureLatch
from lightning_async.transport.devices import describe_device, nccl_obstacle, place_holder
from tests.models import TinyClassifier, fork_trainer, loader


def gpu(number: int, **other: Any) -> dict[str, Any]:
    return {"uuid": f"GPU-{number}", "nccl": "2.27.3", "shares": False, **other}


@pytest.mark.parametrize(
    ("choice", "transport", "facts", "place"),
    [
        ("auto", "auto", [], "cpu"),
        ("auto", "auto", [gpu(0)], "cuda"),
        ("auto", "shm", [gpu(0)], "cuda"),
        ("auto", "auto", [gpu(0), gpu(1), gpu(2)], "cuda"),
        ("auto", "nccl", [gpu(0), gpu(1)], "cuda"),
        ("auto", "auto", [gpu(0), gpu(1), gpu(1)], "cuda"),
        ("auto", "auto", [gpu(0), gpu(1), gpu(0)], "cpu"),
        ("auto", "auto", [gpu(0, shares=True), gpu(0, shares=True)], "cuda"),
        ("auto", "auto", [gpu(0, shares=True), gpu(0)], "cpu"),
        ("auto", "tcp", [gpu(0), gpu(1)], "cpu"),
        ("auto", "auto", [gpu(0, nccl=""), gpu(1, nccl="")], "cpu"),
        ("auto", "auto", [gpu(0), gpu(1, nccl="2.20.5")], "cpu"),
        ("cpu", "auto", [gpu(0), gpu(1)], "cpu"),
        ("cuda", "auto", [gpu(0), gpu(0)], "cuda"),
        ("cuda", "tcp", [gpu(0), gpu(1)], "cuda"),
    ],
)
def test_the_holder_is_on_the_gpu_if_nccl_reaches_everyone_or_it_is_asked_for(
    choice: Any, transport: str, facts: list[dict[str, Any]], place: str
) -> None:
    assert place_holder(choice, transport, facts) == place


@pytest.mark.parametrize(
    ("choice", "transport", "facts", "message"),
    [
        (
            "cuda",
            "auto",
            [],
            r'holder_device="cuda".*rank 0 does not compute on a CUDA device.*Take holder_device="auto"',
        ),
        ("auto", "nccl", [], r'transport="nccl".*rank 0 does not compute on a CUDA device. Take transport="auto"'),
        (
            "auto",
            "nccl",
            [gpu(0), gpu(1), gpu(0)],
            r'rank 2 cannot use it: it shares rank 0\'s GPU. Take transport="auto"',
        ),
        ("auto", "nccl", [gpu(0), gpu(1, nccl="")], "rank 1 cannot use it: torch was built without NCCL"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(
    choice: Any, transport: str, facts: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        place_holder(choice, transport, facts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holder_device": "tpu"}, "holder_device must be one of 'auto', 'cpu', 'cuda', not 'tpu'"),
        ({"transport": "mpi"}, "transport must be one of 'auto', 'shm', 'tcp', 'nccl', not 'mpi'"),
        ({"transport": "nccl", "holder_device": "cpu"}, r"leave holder_device=\"cpu\" out"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExchangeOptions(**options)


@pytest.mark.parametrize("claim", [None, [], "GPU-1", {}, {"nccl": 7}, {"uuid": "GPU-1"}], ids=repr)
def test_what_a_worker_claims_may_be_anything(claim: object) -> None:
    assert nccl_obstacle(gpu(0), claim) is not None


def test_a_gpu_is_known_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "f5b2-11"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr("lightning_async.transport.devices._nccl_version", lambda: (2, 27, 3))
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")

    assert describe_device(torch.device("cuda", 1)) == {"uuid": "f5b2-11", "nccl": "2.27.3", "shares": True}


def test_an_update_counts_its_steps_where_its_parameters_are() -> None:
    elsewhere = torch.nn.Parameter(torch.ones(4, device="meta"))

    update = FusedUpdate(AMSGrad([elsewhere], lr=0.1))

    assert update._counts.device == elsewhere.device


class RecordedStream:
    """Keeps what was entered; what happens outside of it would be on rank 0's own stream."""

    def __init__(self) -> None:
        self.depth = 0
        self.entries = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.depth += 1
        self.entries += 1
        try:
            yield
        finally:
            self.depth -= 1


def test_a_holder_on_a_gpu_does_everything_with_tensors_in_its_lane() -> None:
    public = {name for name, member in vars(Holder).items() if not name.startswith("_") and callable(member)}
    # These touch no tensor.
    public -= {"close", "count", "expect", "leave", "lend", "subscribe", "wait_for_change"}
    # On the host alone: see `joins_pushes`.
    public -= {"push_together"}

    assert public <= set(vars(DeviceHolder)), "a method of Holder that uses the device must enter the stream"


def make(stream: RecordedStream | None, observer: Any = lambda update: None) -> Holder:
    parameter = torch.nn.Parameter(torch.ones(4))
    layout = FlatLayout([[parameter]])
    placement = HolderPlacement(stream=stream)
    template = AMSGrad([parameter], lr=0.1)
    return placement.make_holder(layout, torch.ones(4), [template], StalenessBarrier(None), FailureLatch(), observer)


def test_a_holder_in_a_lane_computes_what_a_holder_computes() -> None:
    stream, depths = RecordedStream(), []
    plain, ours = make(None), make(stream, lambda update: depths.append(stream.depth))
    seen = []

    for holder in (plain, ours):
        out = torch.zeros(4)
        for step in range(3):
            version = holder.try_pull(1, out)
            assert version is not None
            holder.try_push(Push(1, 0, version, [out + step], []))
        snapshot = holder.snapshot()
        holder.restore(7, snapshot.optimizer_states)
        seen.append((holder.read(out), out, snapshot))

    (version, values, snapshot), (other_version, other_values, other) = seen
    assert type(plain) is Holder and type(ours) is DeviceHolder
    assert (version, other_version, depths, stream.depth) == (7, 7, [1, 1, 1], 0)
    assert torch.equal(values, other_values) and torch.equal(snapshot.parameters, other.parameters)
    assert str(snapshot.optimizer_states) == str(other.optimizer_states)


@pytest.mark.parametrize(
    ("devices", "asked", "backend"),
    [
        (["cuda:0", "cuda:1"], None, "nccl"),
        (["cuda:0", "cuda:0"], None, "gloo"),
        (["cuda:0", "cuda:0"], "mpi", "mpi"),
        (["cpu", "cpu"], None, "gloo"),
    ],
)
def test_ranks_that_share_a_gpu_meet_over_gloo(devices: list[str], asked: str | None, backend: str) -> None:
    strategy = AsyncAMSGradStrategy(
        parallel_devices=[torch.device(device) for device in devices],
        cluster_environment=LightningEnvironment(),
        process_group_backend=asked,
    )

    assert strategy._get_process_group_backend() == backend


def test_a_strategy_refuses_what_no_rank_can_have(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="holder_device must be one of"):
        AsyncAMSGradStrategy(holder_device="gpu")  # type: ignore[arg-type]

    strategy = AsyncAMSGradStrategy(holder_device="cuda", start_method="fork")
    with pytest.raises(MisconfigurationException, match=r'cannot train here: holder_device="cuda" was asked for'):
        fork_trainer(tmp_path, 1, strategy).fit(TinyClassifier(), loader())
