"""With shards that are reached over the network a fit is the fit without them, bit for bit, on one host and on two."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from lightning_async import AsyncStrategy
from lightning_async.runtime.listening import reserved
from tests.integration.test_shards import Wide
from tests.launch import launch, report
from tests.models import fork_trainer, indexed_data, loader

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
    found += [key for key in ("version", "epoch") if first["async_amsgrad"][key] != second["async_amsgrad"][key]]
    return found + ["places"] * (state.keys() != theirs.keys())


def test_on_one_host_it_is_the_fit_without_and_is_resumed_with_another_number(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        whole = fit(folder, "whole", epochs=2)
        half = fit(folder, "half", epochs=1, transport="tcp", holder_shards=3)
        resumed = fit(folder, "resumed", epochs=2, resumed=half, transport="tcp", holder_shards=2)
        report(folder, 0, differences=differences(whole, resumed))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.report(0)["differences"] == []
