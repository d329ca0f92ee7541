"""The command and the function behind it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lightning_async.monitoring.record import RECORD_NAME, RecordError, RunRecord
from lightning_async.monitoring.report.live import LivePage, LiveServer
from lightning_async.monitoring.report.page import page

__all__ = ["ReportError", "render", "report_main", "write_report"]


class ReportError(RuntimeError):
    """A report that cannot be written; the message says what to do."""


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run: one HTML file without anything to fetch.

    Args:
        run_dir: folder with the ``async_run.json`` that `AsyncMonitor` wrote, or that file.
        out: the file to write; None for ``report.html`` beside the record.

    Returns:
        The file.

    Raises:
        RecordError: if there is no record, or another kind of file.
        ReportError: if the run was not asynchronous, or matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    text = render(run_dir)
    path = (run_dir if run_dir.is_dir() else run_dir.parent) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def render(run_dir: Path, refresh_s: int | None = None) -> str:
    """The report of a run as HTML.

    Args:
        run_dir: folder with the record, or the record.
        refresh_s: seconds after which the browser asks for it anew while the run goes on.

    Raises:
        RecordError: if there is no record, or another kind of file.
        ReportError: if the run was not asynchronous, or matplotlib is not installed.
    """
    record = RunRecord.read(run_dir)
    if not record.configuration:
        raise ReportError(f"a report shows what asynchrony did, and {record.strategy} is not asynchronous")
    try:
        from lightning_async.monitoring.report import plots
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ReportError("a report draws with matplotlib, which is not installed: pip install matplotlib") from error
    return page(record, plots.draw(record), refresh_s)


def report_main(argv: Sequence[str]) -> int:
    """Runs ``lightning-async report RUN_DIR [--out FILE | --serve [--port PORT]]``.

    Args:
        argv: the arguments after ``report``.

    Returns:
        The exit status: 0; after one line on stderr 2 if that is no run's folder, 1 if the page cannot be written.

    Raises:
        SystemExit: with status 2 if the arguments are wrong, with 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-async report",
        description="Write what asynchrony did in a run as one self-contained HTML page.",
        epilog="The run must have been trained with the callback lightning_async.AsyncMonitor.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help=f"the run's folder, which has {RECORD_NAME}")
    parser.add_argument("--out", metavar="FILE", help="the page to write (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--serve", action="store_true", help="show the page in a browser on this machine; it follows a run that goes on"
    )
    parser.add_argument("--port", type=int, metavar="PORT", help="with --serve: where (default: a free port)")
    arguments = parser.parse_args(list(argv))
    if arguments.serve and arguments.out is not None:
        parser.error("--serve writes no file: leave --out out")
    if arguments.port is not None and not arguments.serve:
        parser.error("--port goes with --serve")
    try:
        if arguments.serve:
            return _serve(Path(arguments.run_dir), arguments.port or 0)
        path = write_report(arguments.run_dir, arguments.out)
    except (RecordError, ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecordError) else 1
    print(path)
    return 0


def _serve(run_dir: Path, port: int) -> int:
    """Shows the page until Ctrl+C."""
    if not run_dir.exists():
        raise RecordError(f"{run_dir} does not exist")
    record = run_dir / RECORD_NAME if run_dir.is_dir() else run_dir
    with LiveServer(LivePage(record, lambda refresh_s: render(run_dir, refresh_s)), port) as server:
        print(f"{server.url} shows the run as it goes on, to this machine; Ctrl+C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
