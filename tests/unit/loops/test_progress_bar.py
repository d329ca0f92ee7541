"""What a progress bar says of the ranks."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from tqdm import tqdm

from lightning_async.holder.types import Push, Update
from lightning_async.loops.progress_bar import BarMetrics, say
from lightning_async.monitoring import stats as monitor
from lightning_async.monitoring.stats import RunStats


def test_a_bar_tells_the_last_stretch_and_the_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    stats = RunStats(workers=4)
    metrics = BarMetrics(lambda: stats)
    assert metrics.current() == {}

    def train(staleness: int, ticks: int = 400) -> None:
        stats.start_segment()
        for tick in range(ticks):
            now[0] += 0.005
            for rank, every in enumerate((2, 2, 4, 10)):
                if tick % every == 0:
                    push = Push(rank, 0, version_read=0, gradients=[], groups=[])
                    stats.record(Update(push, 0, staleness, applied=True, parked_s=0.0, at_ns=round(now[0] * 1e9)))
        stats.end_segment()

    train(staleness=2)
    assert metrics.current() == {"staleness": "2.0", "slow": "rank3+1 5.0x", "upd/s": "270"}
    # The first to be cut off comes last.
    assert list(metrics.current()) == ["staleness", "slow", "upd/s"]
    now[0] += 1000.0  # a validation
    train(staleness=4)
    assert metrics.current() == {"staleness": "4.0", "slow": "rank3+1 5.0x", "upd/s": "270"}
    train(staleness=9, ticks=10)
    assert metrics.current()["staleness"] == "4.0"  # too soon to be read


def test_equally_fast_ranks_are_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    stats = RunStats(workers=2)
    stats.start_segment()
    for _ in range(10):
        now[0] += 1.0
        for rank in range(2):
            push = Push(rank, 0, version_read=0, gradients=[], groups=[])
            stats.record(Update(push, 0, staleness=0, applied=True, parked_s=0.0, at_ns=round(now[0] * 1e9)))

    assert BarMetrics(lambda: stats).current() == {"upd/s": "2", "staleness": "0.0"}


@pytest.mark.parametrize("kind", ["rich", "tqdm", "none"])
def test_a_line_in_the_middle_of_a_fit_stands_whole(
    kind: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bar: Any = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}.get(kind, lambda: None)()
    if isinstance(bar, RichProgressBar):
        console = Console(width=200, force_terminal=False)
        bar.progress = SimpleNamespace(console=console)  # type: ignore[assignment]
    elif bar is not None:
        bar._train_progress_bar = tqdm(disable=False, file=io.StringIO())  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(is_global_zero=True, callbacks=[] if bar is None else [bar])

    with caplog.at_level("INFO"):
        say(trainer, "[auto]: chosen")
        say(SimpleNamespace(is_global_zero=False, callbacks=[bar]), "of another rank")  # type: ignore[arg-type]

    said = capsys.readouterr().out + caplog.text
    assert "[auto]: chosen\n" in said
    assert "another rank" not in said
