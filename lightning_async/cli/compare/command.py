"""`lightning-async compare`: reads the configuration, has the runs done, writes the results."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]
from typing_extensions import override

import lightning_async
from lightning_async.cli.compare.config import Comparison, Plot, Sweep, Variant, find_config, is_recipe
from lightning_async.cli.compare.plan import PlannedRun, argument_list, digest, plan_runs
from lightning_async.cli.compare.plots import check_matplotlib, draw
from lightning_async.cli.compare.progress import RunsDisplay
from lightning_async.cli.compare.results import Result, summarize
from lightning_async.cli.compare.runner import Job, Outcome, is_finished, only_one_at_a_time, run_jobs
from lightning_async.cli.compare.tables import console_table, csv_table, markdown_table
from lightning_async.cli.errors import is_debugging, one_line
from lightning_async.cli.suggestions import with_suggestions
from lightning_async.monitoring.machine import machine_facts
from lightning_async.monitoring.record import RecordError, RunRecord
from lightning_async.monitoring.tables import printable

__all__ = ["compare_main", "compare_parser", "fit_command", "read_comparison"]

_INTERRUPTED = 130
_RECORDER = "lightning_async.cli.compare.recorder.RunRecorder"


class _Parser(ArgumentParser):
    """Says what is wrong in one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if is_debugging():
            super().error(message, ex)
        self.exit(2, f"error: {with_suggestions(one_line(message), self)}\n")


def compare_parser() -> ArgumentParser:
    """Make the parser of `lightning-async compare`.

    Returns:
        A parser whose result is for `read_comparison`.
    """
    parser = _Parser(
        prog="lightning-async compare",
        usage="lightning-async compare --config FILE [options]",
        description="Train one recipe in several variants, each run in a process of its own; write a table and plots. "
        "Runs that are finished are left out, so that the same command goes on after an interruption.",
        epilog="example, in a checkout: lightning-async compare --config recipes/compare_strategies.yaml",
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="The comparison, a YAML file.")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands and do nothing.")
    parser.add_argument("--fresh", action="store_true", help="Run again what is finished too.")
    parser.add_argument("--draw_only", action="store_true", help="Write table and plots of the finished runs.")
    parser.add_class_arguments(Comparison)
    return parser


def read_comparison(config: Namespace) -> Comparison:
    """Build the comparison from what the parser has read.

    Args:
        config: the result of `compare_parser().parse_args(...)`.

    Returns:
        The comparison, not yet checked.
    """
    # By hand, since jsonargparse would build the classes that the arguments of a run name.
    given = {field.name: config[field.name] for field in fields(Comparison)}
    given["variants"] = [_variant(variant) for variant in given["variants"]]
    given["grid"] = {name: _axis(axis) for name, axis in given["grid"].items()}
    given["plots"] = [Plot(**vars(plot)) for plot in given["plots"]]
    return Comparison(**given)


def fit_command(comparison: Comparison, run: PlannedRun, folder: Path) -> list[str]:
    """Write the command line of a run.

    Args:
        comparison: what it belongs to.
        run: the run.
        folder: where its files go.

    Returns:
        The words after `lightning-async`. What compare adds itself comes before the run's own arguments, which
        may differ from it; the recorder comes last.
    """
    quiet: dict[str, Any] = {
        "trainer.default_root_dir": str(folder),
        "trainer.logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "logs", "version": ""},
        },
        "trainer.enable_checkpointing": False,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
    }
    own = run.arguments
    recorder = {"class_path": _RECORDER, "init_args": {"path": str(folder / "record.json")}}
    return [
        *("fit", "--config", comparison.recipe),
        *argument_list({name: value for name, value in quiet.items() if name not in own}),
        *argument_list(own),
        *argument_list({"trainer.callbacks+": recorder}),
    ]


def compare_main(args: Sequence[str] | None = None) -> int:
    """Run `lightning-async compare`.

    Args:
        args: arguments without the program's name and `compare`; `None` takes those of the process.

    Returns:
        The exit status: 0; 1 if a run has failed; 130 after Ctrl+C.

    Raises:
        SystemExit: with status 2 when the arguments or the configuration are wrong.
    """
    parser = compare_parser()
    given = list(sys.argv[2:] if args is None else args)
    if (recipe := find_config(given, is_recipe)) is not None:
        parser.error(
            f"{recipe} is a recipe, of one run, and no comparison: `lightning-async fit --config {recipe}` trains it. "
            f"A comparison is a file of its own, with `recipe: {recipe}`, `out`, and `variants` or `grid`"
        )
    try:
        config = parser.parse_args(given)
    except UnicodeDecodeError as error:
        parser.error(f"the configuration is not text: {error}", error)
    comparison = read_comparison(config)
    out = Path(comparison.out)
    jobs: list[Job] = []
    try:
        planned = plan_runs(comparison)
        jobs = _jobs(comparison, planned, out)
        if config.dry_run:
            for job in jobs:
                print(printable(shlex.join(job.command)))
            return 0
        check_matplotlib()
        with only_one_at_a_time(out):
            if not config.fresh:
                _check_records(jobs)
            if config.draw_only:
                outcomes = [Outcome(job, None if is_finished(job) else "it has not been run") for job in jobs]
            else:
                if config.fresh:
                    _forget(jobs)
                outcomes = _run(comparison, jobs)
            _write_results(comparison, planned, outcomes, out)
    except ValueError as error:
        parser.error(str(error), error)
    except KeyboardInterrupt:
        finished = sum(map(is_finished, jobs))
        print(f"interrupted: {finished} of {len(jobs)} runs are finished; the same command goes on with the rest")
        return _INTERRUPTED
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def _variant(given: Any) -> Variant:
    return Variant(name=given["name"], arguments=given["arguments"])


def _axis(given: Any) -> Sweep | list[Variant]:
    if isinstance(given, list):
        return [_variant(variant) for variant in given]
    return Sweep(argument=given["argument"], values=given["values"])


def _jobs(comparison: Comparison, planned: Sequence[PlannedRun], out: Path) -> list[Job]:
    recipe = Path(comparison.recipe).read_text()
    return [
        Job(
            name=run.name,
            command=[sys.executable, "-m", "lightning_async", *fit_command(comparison, run, out / run.folder)],
            folder=out / run.folder,
            digest=digest(recipe, run, comparison.environment),
            record=out / run.folder / "record.json",
            environment=comparison.environment,
        )
        for run in planned
    ]


def _check_records(jobs: Sequence[Job]) -> None:
    """Refuse finished runs that cannot be read, before anything is run."""
    try:
        for job in filter(is_finished, jobs):
            RunRecord.read(job.record)
    except RecordError as error:
        raise ValueError(f"{error} `--fresh` does that for all of them.") from error


def _forget(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.record.unlink(missing_ok=True)


def _run(comparison: Comparison, jobs: Sequence[Job]) -> list[Outcome]:
    with RunsDisplay(len(jobs), lambda job: _result(comparison, job)) as display:
        return run_jobs(jobs, display, comparison.parallel, comparison.timeout_s)


def _result(comparison: Comparison, job: Job) -> str:
    metric = RunRecord.read(job.record).last(comparison.metric)
    return "" if metric is None else f"{comparison.metric} {metric:.4f}"


def _write_results(
    comparison: Comparison, planned: Sequence[PlannedRun], outcomes: Sequence[Outcome], out: Path
) -> None:
    results = [
        Result(run.variant, run.seed, None if outcome.failure else RunRecord.read(outcome.job.record), outcome.failure)
        for run, outcome in zip(planned, outcomes, strict=True)
    ]
    summaries = summarize(results, comparison.metric, comparison.metric_mode, comparison.loss, comparison.target)
    table = markdown_table(comparison, summaries)
    (out / "results.csv").write_text(csv_table(comparison, summaries))
    pictures = draw(comparison, summaries, out)
    (out / "results.md").write_text(_document(comparison, planned, table, pictures))
    print(printable(console_table(comparison, summaries)))
    written = ", ".join([str(out / "results.md"), str(out / "results.csv"), *map(str, pictures)])
    print(printable(f"written: {written}"))


def _document(comparison: Comparison, planned: Sequence[PlannedRun], table: str, pictures: Sequence[Path]) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    facts = machine_facts()
    machine = f"{facts['cores']} CPUs, {facts['processor']}, torch {facts['torch']}"
    first_seed = [run for run in planned if run.seed == comparison.seeds[0]]
    commands = [
        shlex.join(["lightning-async", "fit", "--config", comparison.recipe, *argument_list(run.arguments)])
        for run in first_seed
    ]
    return "\n".join(
        [
            f"# {comparison.title}",
            "",
            f"Recipe `{comparison.recipe}`, seeds {seeds}, {comparison.parallel} run(s) at a time; {machine}, "
            f"lightning-async {lightning_async.__version__}, {datetime.date.today()}. Numbers are means over the "
            "seeds, ± the standard deviation of one seed. Times are of training, without validation and the "
            "start of the processes.",
            "",
            table,
            *(f"![{picture.stem}]({picture.name})\n" for picture in pictures),
            "The bands of the curves span the seeds.",
            "",
            "## Commands",
            "",
            "Each variant by itself, with the first seed:",
            "",
            "```bash",
            *commands,
            "```",
            "",
        ]
    )
