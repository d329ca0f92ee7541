"""A module that runs collectives of its own ends the fit before anything is trained."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tests.launch import launch
from tests.models import TinyClassifier, fork_trainer, loader


def test_a_fit_with_such_a_part_is_refused(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        module = TinyClassifier()
        module.net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(6), *module.net))
        fork_trainer(folder, 3).fit(module, loader())

    run = launch(script, tmp_path)

    assert run.returncode != 0
    assert "async_amsgrad cannot train this module: net.0 is a SyncBatchNorm" in run.output
