"""``lightning-async report``: the record of a run as one self-contained HTML page.

Drawing needs matplotlib, which is loaded when a report is written.
"""

from lightning_async.monitoring.report.command import ReportError, report_main, write_report

__all__ = ["ReportError", "report_main", "write_report"]
