"""An epoch covers every sample once, over real ranks of unlike speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader


@pytest.mark.parametrize("batches", ["shared", "sharded"])
@pytest.mark.parametrize(
    ("ranks", "workers", "overlap"),
    [
        (2, 0, False),
        pytest.param(2, 2, False, marks=pytest.mark.soak),
        pytest.param(4, 0, False, marks=pytest.mark.soak),
        (4, 2, False),
        (4, 0, True),
        pytest.param(2, 2, True, marks=pytest.mark.soak),
    ],
)
def test_an_epoch_covers_every_sample_once(
    tmp_path: Path, ranks: int, workers: int, overlap: bool, batches: str
) -> None:
    def script(folder: Path) -> None:
        from lightning_async import AsyncAMSGradStrategy

        class Module(TinyClassifier):
            def on_train_end(self) -> None:
                report(folder, self.global_rank, seen=self.seen, step=self.trainer.global_step)

        strategy = AsyncAMSGradStrategy(batches=batches, overlap=overlap, start_method="fork")
        trainer = fork_trainer(folder, ranks, strategy, max_epochs=2)
        trainer.fit(Module(sleep_s=(0.0, 0.01)), loader(samples=61, num_workers=workers, shuffle=True))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    for epoch in range(2):
        seen = sorted(index for rank in run.reports() for index in rank["seen"][epoch])
        assert seen == list(range(61))


def test_a_rank_that_overlaps_may_compute_longer_than_a_payload_may_stand_still(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        from lightning_async import AsyncAMSGradStrategy

        class Module(TinyClassifier):
            def on_train_end(self) -> None:
                report(folder, self.global_rank, seen=self.seen)

        strategy = AsyncAMSGradStrategy(transport="tcp", overlap=True, start_method="fork", worker_timeout=1.0)
        fork_trainer(folder, 2, strategy).fit(Module(sleep_s=(2.0, 2.0)), loader(samples=16))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert sorted(index for rank in run.reports() for index in rank["seen"][0]) == list(range(16))
