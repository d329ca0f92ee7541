"""What a run shows of itself: statistics, metrics, records, timelines, the diagnosis and the report.

What is named here loads neither Lightning nor a plotting library; `loggers`, `recording` and `report` do.
"""

from lightning_async.monitoring.metrics import MetricsLogger
from lightning_async.monitoring.record import RecordError, RunRecord
from lightning_async.monitoring.stats import RunStats

__all__ = ["MetricsLogger", "RecordError", "RunRecord", "RunStats"]
