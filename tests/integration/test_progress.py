"""Progress bars on rank 0, as they come out of its terminal."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_async import AsyncAMSGradStrategy
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader

RANKS, BATCHES = 3, 30
# Rank 0 is fast: alone it computes more batches than its share.
SLEEP_S = (0.002, 0.002, 0.04)


def bar_of(name: str) -> ProgressBar:
    if name == "rich":
        return RichProgressBar(leave=True, console_kwargs={"force_terminal": True, "width": 200})
    return TQDMProgressBar(leave=True, refresh_rate=1 if name == "tqdm" else 4)


def fit_with_summary(folder: Path, name: str) -> None:
    arguments: dict[str, Any] = {"callbacks": [bar_of(name)], "enable_progress_bar": True, "max_epochs": 1}
    trainer = fork_trainer(folder, 2, AsyncAMSGradStrategy(start_method="fork"), **arguments)
    trainer.fit(TinyClassifier(), loader(samples=80))
    print("after the fit")


@pytest.mark.parametrize("name", ["tqdm", "rich"])
def test_the_table_is_whole_and_under_the_last_bar(name: str, tmp_path: Path) -> None:
    run = launch(partial(fit_with_summary, name=name), tmp_path)
    assert run.returncode == 0, run.output

    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", run.output)]
    bar = max(number for number, line in enumerate(lines) if line.lstrip().startswith("Epoch 0"))
    table = [line for line in lines[bar:] if line.startswith(("┌", "│", "├", "└"))]
    assert len(table) == len([line for line in lines if "│" in line or "─┬─" in line or "─┼─" in line or "─┴─" in line])
    # Three rules and a border, two lines of headings, two ranks, all of them.
    assert len(table) == 9
    assert len({len(line) for line in table}) == 1
    assert "after the fit" in lines


def fit(folder: Path, name: str) -> None:
    class Module(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("own", 1.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

        def on_train_end(self) -> None:
            report(folder, self.global_rank, batches=self.batches)

    bar = bar_of(name)
    strategy = AsyncAMSGradStrategy(start_method="fork", summary=False)
    arguments: dict[str, Any] = {"callbacks": [bar], "enable_progress_bar": True, "max_epochs": 2}
    trainer = fork_trainer(folder, RANKS, strategy, **arguments, val_check_interval=0.5, limit_val_batches=2)
    data = loader(samples=4 * RANKS * BATCHES)
    trainer.fit(Module(sleep_s=SLEEP_S), data, data)
    assert not {"on_train_batch_end", "get_metrics"} & vars(bar).keys()


@pytest.mark.compatibility(
    "Tools",
    "RichProgressBar, TQDMProgressBar",
    note="They count the batches of all ranks, over the number of ranks; updates a second, staleness and the slowest "
    "rank stand beside.",
)
@pytest.mark.parametrize("name", ["tqdm", "tqdm, now and then", "rich"])
def test_the_bars_show_all_ranks_and_never_more_than_there_is(name: str, tmp_path: Path) -> None:
    run = launch(partial(fit, name=name), tmp_path)
    assert run.returncode == 0, run.output
    assert run.report(0)["batches"] > 2 * BATCHES  # what the bar would show by itself

    for epoch in range(2):
        lines = [
            line
            for line in re.split(r"[\r\n]", run.output)
            if line.lstrip("\x1b[0123456789;KAm").startswith(f"Epoch {epoch}")
        ]
        counts = [int(count) for line in lines for count in re.findall(rf"(\d+)/{BATCHES}\b", line)]
        assert counts == sorted(counts)
        assert max(counts) == counts[-1] == BATCHES
        assert any(0 < count < BATCHES for count in counts)
    last = lines[-1]
    assert re.search(r"upd/s[=:] ?\d+", last)
    assert re.search(r"staleness[=:] ?\d+\.\d", last)
    # A narrow terminal cuts off what comes last.
    assert last.index("staleness") < last.index("slow") < last.index("upd/s") < last.index("own")
