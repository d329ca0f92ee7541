"""The ready comparisons are what `fit` accepts."""

import sys
from pathlib import Path

import pytest

from lightning_async.cli.app import AsyncCLI
from lightning_async.cli.compare.command import compare_parser, fit_command, read_comparison
from lightning_async.cli.compare.plan import plan_runs

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "recipes").glob("compare_*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_fit_accepts_every_variant_of_a_ready_comparison(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-async"])
    compared = read_comparison(compare_parser().parse_args(["--config", str(config)]))
    # One run for each value of each axis.
    seen: set[tuple[str, object]] = set()
    runs = []
    for run in plan_runs(compared):
        if new := set(run.variant.labels.items()) - seen:
            seen |= new
            runs.append(run)

    for run in runs:
        cli = AsyncCLI(fit_command(compared, run, tmp_path)[1:], run=False)

        assert cli.trainer.max_epochs == compared.common["trainer.max_epochs"]
        optimizer = run.variant.labels.get("optimizer")
        if optimizer is not None:
            assert optimizer in type(cli.model.configure_optimizers()).__name__
