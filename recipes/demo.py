"""Async beside DDP on one machine: `python -m recipes.demo`, from the repository's root.

LeNet-5 on handwritten digits with four CPU ranks, the last one slowed down four times. The recipe
is trained and tested once with each strategy, with the same arguments otherwise.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Run", "comparison_table", "main", "rank_table"]

RECIPE = "recipes/lenet5_digits.yaml"
RUN_LIMIT_S = 300.0


@dataclass
class Run:
    """What one training run measured, as `TimeToAccuracy` wrote it.

    Args:
        strategy: the name that the run was started with.
        batches: training batches over all ranks.
        seconds: duration of training, validations included.
        threshold: the validation accuracy to reach.
        seconds_to_threshold: from the start of training until validation reached it; `None` if never.
        test_accuracy: accuracy on the test set after training.
        stats: the strategy's statistics; empty if it keeps none.
    """

    strategy: str
    batches: int
    seconds: float
    threshold: float
    seconds_to_threshold: float | None
    test_accuracy: float
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def batches_per_second(self) -> float:
        """Training batches over all ranks per second of training."""
        return self.batches / self.seconds

    @classmethod
    def load(cls, strategy: str, path: Path) -> "Run":
        """Read the file that `TimeToAccuracy` wrote.

        Args:
            strategy: the name that the run was started with.
            path: the file.
        """
        results = json.loads(path.read_text())
        return cls(
            strategy=strategy,
            batches=results["batches"],
            seconds=results["seconds"],
            threshold=results["threshold"],
            seconds_to_threshold=results["seconds_to_threshold"],
            test_accuracy=results["test"]["test/acc"],
            stats=results["stats"] or {},
        )


def train(strategy: str, out: Path, console: Console, extra: Sequence[str] = ()) -> Run:
    """Train and test the recipe in processes of their own.

    Args:
        strategy: a strategy name that the Trainer knows.
        out: folder for the output and the results of the run.
        console: where to say how it goes.
        extra: further arguments of the command line.

    Raises:
        SystemExit: with the run's exit status, after printing its output, if it fails or takes longer
            than five minutes.
    """
    results, log = out / f"{strategy}.json", out / f"{strategy}.log"
    results.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "recipes.train_and_test", "--config", RECIPE),
        f"--trainer.strategy={strategy}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_checkpointing=false",
        f"--trainer.logger.init_args.save_dir={out / 'logs'}",
        f"--trainer.logger.init_args.name={strategy}",
        "--trainer.callbacks+=recipes.callbacks.TimeToAccuracy",
        f"--trainer.callbacks.path={results}",
        *extra,
    ]
    # One thread for each rank: four ranks that each use all cores would slow each other down.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    start_s = time.perf_counter()
    with console.status(f"training with {strategy}"), log.open("w") as output:
        # A session of its own, so that a run that is given up takes all its ranks with it.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            # The group is gone where every rank has ended by itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    elapsed_s = time.perf_counter() - start_s
    if status != 0 or not results.exists():
        console.print(log.read_text(), markup=False, highlight=False)
        reason = f"did not end within {RUN_LIMIT_S:.0f} s" if status == 124 else f"ended with status {status}"
        console.print(f"[red]training with {strategy} {reason}[/red]; its output is above and in {log}")
        raise SystemExit(status if status > 0 else 1)
    console.print(f"{strategy}: trained and tested in {elapsed_s:.0f} s, starting the processes included")
    return Run.load(strategy, results)


def rank_table(stats: dict[str, Any]) -> Table:
    """Show what each rank contributed to an asynchronous run.

    Args:
        stats: the strategy's statistics as read from JSON, where the ranks and the staleness values that
            are keys have become strings.
    """
    table = Table(title="What each rank did", title_justify="left")
    for heading in ("rank", "batches", "share", "mean staleness", "max staleness", "waited, s"):
        table.add_column(heading, justify="right")
    batches: dict[str, int] = stats["batches_by_rank"]
    total = sum(batches.values())
    for rank in sorted(batches, key=int):
        staleness = {int(s): count for s, count in stats["staleness_by_rank"].get(rank, {}).items()}
        updates = sum(staleness.values())
        mean = sum(s * count for s, count in staleness.items()) / updates if updates else 0.0
        table.add_row(
            rank,
            str(batches[rank]),
            f"{batches[rank] / total:.1%}" if total else "-",
            f"{mean:.2f}",
            str(max(staleness, default=0)),
            f"{stats['wait_seconds_by_rank'].get(rank, 0.0):.2f}",
        )
    return table


def comparison_table(run: Run, baseline: Run) -> Table:
    """Show two runs side by side.

    Args:
        run: the run that the ratios speak for: more than 1x means that it is faster.
        baseline: the run to compare with.
    """
    times = (run.seconds_to_threshold, baseline.seconds_to_threshold)
    shown = [f"{seconds:.1f} s" if seconds is not None else "not reached" for seconds in times]
    ratio = "-" if times[0] is None or times[1] is None else f"{times[1] / times[0]:.2f}x"

    table = Table(title="Side by side", title_justify="left")
    table.add_column("")
    for heading in (run.strategy, baseline.strategy, "ratio"):
        table.add_column(heading, justify="right")
    table.add_row(
        "training batches per second",
        f"{run.batches_per_second:.1f}",
        f"{baseline.batches_per_second:.1f}",
        f"{run.batches_per_second / baseline.batches_per_second:.2f}x",
    )
    table.add_row(f"time to {run.threshold:.0%} validation accuracy", *shown, ratio)
    table.add_row(
        "training time",
        f"{run.seconds:.1f} s",
        f"{baseline.seconds:.1f} s",
        f"{baseline.seconds / run.seconds:.2f}x",
    )
    table.add_row("test accuracy", f"{run.test_accuracy:.2%}", f"{baseline.test_accuracy:.2%}", "")
    return table


def main(args: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
        args: arguments without the program's name; `None` takes those of the process. What is not an
            option of the demo goes to both runs, for example `--trainer.max_epochs=5`.

    Raises:
        SystemExit: with the status of a run that failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo", description="Train one recipe with two strategies and compare them."
    )
    parser.add_argument("--strategy", default="async_amsgrad", help="the strategy to show")
    parser.add_argument("--baseline", default="ddp", help="the strategy to compare it with")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for logs and results")
    options, extra = parser.parse_known_args(args)

    console = Console()
    console.print("LeNet-5 on handwritten digits: 4 CPU ranks, rank 3 slowed down four times")
    options.out.mkdir(parents=True, exist_ok=True)
    run = train(options.strategy, options.out, console, extra)
    console.print(f"test accuracy with {run.strategy}: [bold]{run.test_accuracy:.2%}[/bold]")
    if run.stats:
        console.print(rank_table(run.stats))
    baseline = train(options.baseline, options.out, console, extra)
    console.print(comparison_table(run, baseline))
    console.print(f"logs and measurements: {options.out}/")


if __name__ == "__main__":
    main()
