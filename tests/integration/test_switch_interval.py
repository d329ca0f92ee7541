"""How often a rank's interpreter switches between threads while it trains, and afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_async.runtime.threads import SWITCH_INTERVAL_S
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader


def test_rank_0_switches_promptly_while_it_serves_and_not_afterwards(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        class Module(TinyClassifier):
            def on_train_epoch_end(self) -> None:
                report(folder, self.global_rank, interval=sys.getswitchinterval())

            def teardown(self, stage: str) -> None:
                (folder / f"after{self.global_rank}").write_text(str(sys.getswitchinterval()))

        sys.setswitchinterval(5e-3)
        fork_trainer(folder, 2).fit(Module(), loader(32))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert [rank["interval"] for rank in run.reports()] == pytest.approx([SWITCH_INTERVAL_S, 5e-3])
    assert float((tmp_path / "after0").read_text()) == pytest.approx(5e-3)
