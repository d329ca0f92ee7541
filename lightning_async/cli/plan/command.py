"""`lightning-async plan`: reads step times, plays them, and shows a table, advice and a figure."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_async.cli.plan.advice import advise
from lightning_async.cli.plan.model import Costs, Forecast, forecast
from lightning_async.cli.requirements import is_installed
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.monitoring.record import RecordError, RunRecord
from lightning_async.monitoring.tables import printable, text_table
from lightning_async.simulation.step_times import StepSpec, StepTimes

__all__ = ["plan_main"]

_NUMBERS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16_384, 100_000)
_FIGURES = (".png", ".svg", ".pdf")
_EPILOGUE = """examples:
  lightning-async plan --step-seconds 0.1 0.1 0.1 0.4 --parameters 11.2e6
  lightning-async plan --run lightning_logs/version_0 --workers 4 64 --bandwidth-gbit 10 --parameters 11.2e6
"""


def plan_main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        args: arguments after `plan`; None takes those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    given = parser.parse_args(args)
    numbers = sorted(set(given.workers))
    try:
        spec, known, record = _steps(given)
        wanted = given.advise_for or (known if known > 1 else numbers[-1])
        steps = {count: StepTimes.of(spec, workers=count) for count in {*numbers, wanted}}
        costs, rounded = _costs(given, record)
        per_update, bound = _dial(given)
        bounds = {count: resolve_max_staleness(bound, count, per_update) for count in steps}
    except (RecordError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.output is not None and given.output.suffix not in _FIGURES:
        parser.error(f"--output must end in one of {', '.join(_FIGURES)}, not {given.output.name!r}")
    forecasts = [forecast(steps[count], costs, per_update, bounds[count]) for count in numbers]
    print(printable(_table(forecasts)))
    focus = forecast(steps[wanted], costs, per_update, bounds[wanted])
    for line in advise(steps[wanted], focus, forecasts, costs, per_update, bounds[wanted], rounded):
        print(f"- {line}")
    if given.output is not None:
        if not is_installed("matplotlib"):
            print(f"{given.output} is not drawn: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
            return 1
        drawing: Any = importlib.import_module("lightning_async.cli.plan.plot")
        drawing.draw(forecasts, given.output)
        print(f"figure: {given.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-async plan",
        description="How many gradients a second workers would make, asynchronously and under DDP, how stale they "
        "would be, and where the holder or the network is full. Nothing is trained.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--step-seconds", type=float, nargs="+", metavar="S", help="of a step, for each kind of worker")
    source.add_argument("--run", type=Path, metavar="FOLDER", help="a recorded run, whose steps are taken")
    parser.add_argument("--jitter", type=float, default=0.1, metavar="PART", help="relative variation of a step (0.1)")
    parser.add_argument("--workers", type=_count, nargs="+", default=list(_NUMBERS), metavar="N")
    parser.add_argument("--advise-for", type=_count, metavar="N", help="which number of workers the advice is for")
    parser.add_argument("--parameters", type=float, metavar="P", help="trained parameters of the model (11.2e6)")
    parser.add_argument("--bandwidth-gbit", type=float, metavar="G", help="of each host's link; none: all on one host")
    parser.add_argument("--latency-ms", type=float, default=0.05, metavar="MS", help="of a message (0.05)")
    parser.add_argument("--gather-ms", type=float, metavar="MS", help="of the holder for a gradient (estimated)")
    parser.add_argument(
        "--update-ms", type=float, metavar="MS", help="of the holder for an update, besides (estimated)"
    )
    parser.add_argument(
        "--holder-shards",
        type=_count,
        default=1,
        metavar="S",
        help="parts of the holder; with --bandwidth-gbit on several hosts (1)",
    )
    parser.add_argument("--gradients-per-update", type=_count, default=None, metavar="K")
    parser.add_argument("--max-staleness", default=None, metavar="T", help='a number, "auto" or "none"')
    parser.add_argument("--output", type=Path, metavar="FILE", help="a figure: .png, .svg or .pdf")
    return parser


def _steps(given: argparse.Namespace) -> tuple[StepSpec, int, RunRecord | None]:
    """What describes the workers' steps, how many kinds there are, and the record that they come from."""
    if given.run is not None:
        record = RunRecord.read(given.run)
        return given.run, len(record.step_seconds), record
    if not all(seconds > 0 for seconds in given.step_seconds):
        raise ValueError("each step takes a positive number of seconds")
    spec = [{"mean": mean, "spread": given.jitter, "distribution": "lognormal"} for mean in given.step_seconds]
    return spec, len(spec), None


def _costs(given: argparse.Namespace, record: RunRecord | None) -> tuple[Costs, dict[str, Costs]]:
    """With payloads as they are, and with smaller ones."""
    gather_s, update_s = (None if value is None else value / 1e3 for value in (given.gather_ms, given.update_ms))
    bytes_per_s = None if given.bandwidth_gbit is None else given.bandwidth_gbit * 1e9 / 8
    if bytes_per_s is not None and not bytes_per_s > 0:
        raise ValueError(f"--bandwidth-gbit must be positive, not {given.bandwidth_gbit}")
    parameters, all_reduce_s = given.parameters, None
    if parameters is None:
        if bytes_per_s is not None:
            raise ValueError("--bandwidth-gbit needs --parameters: what a gradient takes on the link depends on them")
        parameters = 0.0
    if record is not None and bytes_per_s is None:
        all_reduce_s = record.stats["all_reduce_seconds"] or None
    latency_s = 0.0 if bytes_per_s is None else given.latency_ms / 1e3
    sizes = (parameters, bytes_per_s, latency_s)
    costs = {
        wire_dtype: Costs.of(*sizes, wire_dtype, gather_s, update_s, all_reduce_s, given.holder_shards)
        for wire_dtype in ("fp32", "bf16", "int8")
    }
    full = costs.pop("fp32")
    # What is spread over hosts travels as it is.
    return full, {} if bytes_per_s is None or full.spread > 1 else costs


def _dial(given: argparse.Namespace) -> tuple[int, Any]:
    per_update = given.gradients_per_update or 1
    text = given.max_staleness
    if text is None or text == "auto":
        return per_update, "auto"
    if text == "none":
        return per_update, None
    if not text.isdigit():
        raise ValueError(f'--max-staleness must be a whole number, "auto" or "none", not {text!r}')
    return per_update, int(text)


def _count(text: str) -> int:
    value = int(text.replace(",", "").replace("_", ""))
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 1,000,000")
    return value


def _table(forecasts: Sequence[Forecast]) -> str:
    headings = [
        "workers",
        "gradients/s",
        "limited\nby",
        "staleness\nmean / p95 / max",
        "waiting",
        "holder",
        "link",
        "DDP",
        "times\nDDP",
    ]
    rows = [
        [
            f"{one.workers:,}",
            f"{one.gradients_per_s:.4g}",
            one.limited_by,
            f"{one.mean_staleness:.1f} / {one.p95_staleness} / {one.max_staleness}",
            f"{one.waiting:.0%}",
            f"{one.holder_load:.0%}",
            f"{one.link_load:.0%}",
            f"{one.lock_step_per_s:.4g}",
            f"{one.gain:.2f}",
        ]
        for one in forecasts
    ]
    return text_table(headings, rows)
