"""``lightning-async report``: a run's record as one self-contained HTML page."""

from lightning_async.monitoring.report.command import report_main, write_report

__all__ = ["report_main", "write_report"]
