"""`lightning-async demo`: has both trainings done and shows them side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_async.cli.compare.plan import argument_list
from lightning_async.cli.compare.progress import RunsDisplay
from lightning_async.cli.compare.runner import LOG_NAME, Job, only_one_at_a_time, run_jobs
from lightning_async.cli.demo.digits import available_source
from lightning_async.cli.demo.results import TEST_NAME, THRESHOLD, Run, comparison_table, rank_table
from lightning_async.cli.report_line import report_line
from lightning_async.monitoring.record import RECORD_NAME

__all__ = ["RunFailedError", "demo_main", "train"]

RUN_LIMIT_S = 300.0
CONFIG = Path(__file__).with_name("digits.yaml")
_INTERRUPTED = 130
_DATA = {
    "scikit-learn": "scikit-learn's handwritten digits",
    "drawn": "digits drawn for this demo (scikit-learn, which has handwritten ones, is not installed)",
}


class RunFailedError(RuntimeError):
    """A training that ended without a result.

    Args:
        message: what to say.
        status: the exit status of its process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def demo_main(args: Sequence[str] | None = None) -> int:
    """Run `lightning-async demo`.

    Args:
        args: arguments without the program's name and `demo`; `None` takes those of the process. What is not an
            option of the demo goes to both runs, for example `--trainer.max_epochs=5`.

    Returns:
        The exit status: 0, that of a run that failed, or 130 after Ctrl+C.

    Raises:
        SystemExit: with status 2 when the arguments are wrong, with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-async demo",
        usage="lightning-async demo [--strategy NAME] [--baseline NAME] [--out FOLDER] [options of fit]",
        description="Train LeNet-5 on digits with two strategies, four CPU ranks of which one is slowed down four "
        "times, and show both side by side. It takes about two minutes and needs no download.",
        epilog="example: lightning-async demo --trainer.max_epochs=5",
        allow_abbrev=False,
    )
    parser.add_argument("--strategy", default="async_amsgrad", help="the strategy to show (default: %(default)s)")
    parser.add_argument("--baseline", default="ddp", help="the strategy to compare it with (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_results"), help="folder for logs and results (default: %(default)s)"
    )
    options, extra = parser.parse_known_args(sys.argv[2:] if args is None else list(args))
    if options.strategy == options.baseline:
        parser.error(f"--strategy and --baseline are both {options.strategy}")
    source = available_source()
    print(f"LeNet-5 on {_DATA[source]}: 4 CPU ranks, rank 3 slowed down four times", flush=True)
    arguments = [f"--data.init_args.source={source}", *extra]
    status = 0
    try:
        with only_one_at_a_time(options.out), RunsDisplay(2) as display:
            run = train(options.strategy, options.out, display, arguments)
            display.say(f"test accuracy with {run.strategy}: {run.test_accuracy:.2%}")
            if run.stats:
                display.say(rank_table(run.stats))
            baseline = train(options.baseline, options.out, display, arguments)
        print(comparison_table(run, baseline))
    except RunFailedError as error:
        print(error)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted")
        status = _INTERRUPTED
    except ValueError as error:
        parser.error(str(error))
    print(f"logs and measurements: {options.out}/")
    folders = [options.out / name for name in (options.strategy, options.baseline)]
    recorded = next((folder for folder in folders if (folder / RECORD_NAME).exists()), None)
    if recorded is not None:
        print(report_line(recorded), flush=True)
    return status


def train(
    strategy: str,
    out: Path,
    display: RunsDisplay,
    extra: Sequence[str] = (),
    config: Path = CONFIG,
    threshold: float = THRESHOLD,
) -> Run:
    """Train and test in processes of their own.

    Args:
        strategy: a strategy name that the Trainer knows.
        out: folder of the run's own folder.
        display: is told how it goes.
        extra: further arguments of the command line.
        config: what to train.
        threshold: the validation accuracy whose time is taken.

    Returns:
        What it measured.

    Raises:
        RunFailedError: after its output has been shown, if the run fails or takes longer than five minutes.
        ValueError: if the folder has something else in it.
    """
    folder = out / strategy
    log = folder / LOG_NAME
    if folder.exists() and not log.exists():
        raise ValueError(f"{folder}, where the results of the run with {strategy} would go, is something else's")
    outcome = run_jobs([_job(strategy, folder, extra, config)], display, parallel=1, timeout_s=RUN_LIMIT_S)[0]
    if outcome.failure is None and (folder / TEST_NAME).exists():
        return Run.read(strategy, folder, threshold)
    display.say(log.read_text(errors="replace").rstrip())
    status = outcome.status if outcome.status > 0 else 1
    raise RunFailedError(f"training with {strategy} failed with status {status}; its output is above", status)


def _job(strategy: str, folder: Path, extra: Sequence[str], config: Path) -> Job:
    record = folder / "record.json"
    record.unlink(missing_ok=True)
    quiet = {
        "trainer.strategy": strategy,
        "trainer.default_root_dir": str(folder),
        "trainer.logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "logs", "version": ""},
        },
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.enable_checkpointing": False,
    }
    callbacks = {
        "lightning_async.cli.compare.recorder.RunRecorder": {"path": str(record)},
        "lightning_async.AsyncMonitor": {"folder": str(folder)},
        "lightning_async.cli.demo.training.TestMetrics": {"path": str(folder / TEST_NAME)},
    }
    added = (
        argument_list({"trainer.callbacks+": {"class_path": kind, "init_args": values}})
        for kind, values in callbacks.items()
    )
    command = [sys.executable, "-m", "lightning_async.cli.demo.training", "--config", str(config)]
    return Job(
        name=strategy,
        command=[*command, *argument_list(quiet), *(word for words in added for word in words), *extra],
        folder=folder,
        # Never taken for what has been run before.
        digest="",
        record=record,
        # One thread for each rank: four ranks that each use all cores would slow each other down.
        environment={"OMP_NUM_THREADS": "1"},
    )
