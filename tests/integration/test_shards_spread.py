"""With shards that are reached over the network a fit is the fit without them, bit for bit, on one host and on two."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from lightning_async import AsyncStrategy
from tests.faults.injector import Fault, pid_of
from tests.faults.runs import FORK, WORKER_TIMEOUT_S, explanations
from tests.faults.train import Run, train
from tests.integration.test_shards import Wide
from tests.launch import launch, processes_named, report
from tests.models import fork_trainer, indexed_data, loader
from tests.two_hosts import launch_on_two_hosts, said_on_host_1

pytestmark = pytest.mark.timeout(120)


def fit(folder: Path, name: str, epochs: int, resumed: Path | None = None, nodes: int = 1, **options: Any) -> Path:
    """Trains on two ranks, in lock step: the order in which gradients come makes no difference."""
    seed_everything(3, verbose=False)
    strategy = AsyncStrategy(start_method="fork", gradients_per_update=2, max_staleness=0, summary=False, **options)
    trainer = fork_trainer(folder, 2 // nodes, strategy, max_epochs=epochs, num_nodes=nodes)
    path = folder / f"{name}.ckpt"
    data = DataLoader(indexed_data(), batch_size=4)
    trainer.fit(Wide(path), data, loader(8), ckpt_path=resumed and str(resumed), weights_only=False)
    return path


def differences(one: Path, other: Path) -> list[str]:
    """What of parameters, optimizer states, version and applied tickets is not the same in two checkpoints."""
    first, second = (torch.load(path, weights_only=False) for path in (one, other))
    found = [name for name, value in first["state_dict"].items() if not torch.equal(value, second["state_dict"][name])]
    state, theirs = (found["optimizer_states"][0]["state"] for found in (first, second))
    found += [
        f"{place} {key}"
        for place, entry in state.items()
        for key, value in entry.items()
        if not torch.equal(value, theirs[place][key])
    ]
    found += [key for key in ("version",) if first["async_amsgrad"][key] != second["async_amsgrad"][key]]
    return found + ["places"] * (state.keys() != theirs.keys())


@pytest.mark.soak
def test_on_one_host_it_is_the_fit_without_and_is_resumed_with_another_number(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        whole = fit(folder, "whole", epochs=2)
        half = fit(folder, "half", epochs=1, transport="tcp", holder_shards=3)
        resumed = fit(folder, "resumed", epochs=2, resumed=half, transport="tcp", holder_shards=2)
        report(folder, 0, differences=differences(whole, resumed))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.report(0)["differences"] == []


def test_on_two_hosts_it_is_the_fit_without(tmp_path: Path) -> None:
    def train(folder: Path) -> None:
        fit(folder, "whole", epochs=1, nodes=2)
        # A shard on each host beside the first one.
        fit(folder, "spread", epochs=1, nodes=2, holder_shards=3)

    run = launch_on_two_hosts(train, tmp_path, timeout_s=100.0)

    assert run.returncode == 0, run.output + said_on_host_1(tmp_path)
    assert differences(tmp_path / "whole.ckpt", tmp_path / "spread.ckpt") == []


def shard_servers(session: int) -> list[int]:
    """The processes of a run's shards, in the order in which they were started."""
    return processes_named(session, "shard_server_main")


@pytest.mark.parametrize(
    ("strike", "failure"),
    [
        ("shard", "rank 1 failed: its process for shard 1 of the holder was killed by SIGKILL"),
        pytest.param("raise", "rank 1 failed: InjectedError: injected into training_step", marks=pytest.mark.soak),
        pytest.param("worker", "rank 1 failed: its process ", marks=pytest.mark.soak),
        pytest.param("stop", "rank 1 failed: its process for shard 1 of the holder gave no", marks=pytest.mark.soak),
    ],
)
def test_the_end_of_a_shard_or_of_a_rank_on_another_host_is_named_on_both(
    tmp_path: Path, strike: str, failure: str
) -> None:
    faults = {"worker": (Fault(1, 5, "kill"),), "raise": (Fault(1, 5, "raise"),)}.get(strike, ())
    strategy = FORK | {"holder_shards": 2} | ({"worker_timeout": WORKER_TIMEOUT_S} if strike == "stop" else {})
    run = Run(faults, ranks=1, strategy=strategy, trainer={"max_epochs": 200, "num_nodes": 2})

    def kill(session: int) -> None:
        pid_of(tmp_path, 1)
        time.sleep(0.2)
        (shard,) = shard_servers(session)
        os.kill(shard, signal.SIGSTOP if strike == "stop" else signal.SIGKILL)

    meanwhile = None if faults else kill
    ended = launch_on_two_hosts(lambda folder: train(run, folder), tmp_path, meanwhile=meanwhile)

    other = said_on_host_1(tmp_path)
    assert ended.returncode == 1, ended.output
    for output in (ended.output, other):
        assert explanations(output), output
        assert all(line.startswith(failure) for line in explanations(output)), output
