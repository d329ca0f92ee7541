"""How each kind of logger shows the ``async/`` metrics: one class for each that can do more than scalars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

__all__ = ["ScalarWriter", "TensorBoardWriter", "WandbWriter", "staleness_histogram", "writer_for"]

# wandb takes 512 bins at most; more than a screen has room for says nothing.
_MAX_BINS = 256


class ScalarWriter:
    """Any logger: the metrics, and nothing else.

    Args:
        logger: the logger.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def configure(self, configuration: dict[str, Any]) -> None:
        """Nothing: what loggers do with a configuration differs too much between them."""

    def log(self, metrics: dict[str, float], staleness: Counter[int], step: int) -> None:
        """Writes the metrics."""
        self._logger.log_metrics(metrics, step=step)

    def summarize(self, summary: dict[str, float], metrics: dict[str, float], step: int) -> None:
        """Nothing: the metrics are there."""


class WandbWriter(ScalarWriter):
    """Weights & Biases: metrics over the version, staleness as a histogram, configuration and summary of the run.

    Args:
        logger: the logger.
        prefix: what it puts in front of the names of metrics.
    """

    def __init__(self, logger: WandbLogger, prefix: str) -> None:
        super().__init__(logger)
        self._run = logger.experiment
        self._prefix = prefix

    def configure(self, configuration: dict[str, Any]) -> None:
        """Puts ``async/`` metrics over ``async/version`` and the configuration under ``async`` in the run's config."""
        self._run.define_metric(f"{self._prefix}async/version")
        self._run.define_metric(f"{self._prefix}async/*", step_metric=f"{self._prefix}async/version")
        # A resumed run may go on with another bound.
        self._run.config.update({"async": configuration}, allow_val_change=True)

    def log(self, metrics: dict[str, float], staleness: Counter[int], step: int) -> None:
        """Writes the metrics and the histogram ``async/staleness`` in one row."""
        import wandb

        # wandb's histograms are rows of numbers to it, whatever the logger's signature says.
        row: dict[str, Any] = {
            **metrics,
            "async/staleness": wandb.Histogram(np_histogram=staleness_histogram(staleness)),
        }
        self._logger.log_metrics(row, step=step)

    def summarize(self, summary: dict[str, float], metrics: dict[str, float], step: int) -> None:
        """Puts the final numbers into the run's summary, where wandb keeps the last row's by itself."""
        numbers = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        self._run.summary.update({**numbers, **{f"async_run/{name}": value for name, value in summary.items()}})


class TensorBoardWriter(ScalarWriter):
    """TensorBoard: metrics, staleness as a histogram, configuration and summary as text.

    Args:
        logger: the logger.
    """

    def __init__(self, logger: TensorBoardLogger) -> None:
        super().__init__(logger)
        self._writer = logger.experiment

    def configure(self, configuration: dict[str, Any]) -> None:
        """Writes the configuration as the text ``async/configuration``."""
        self._writer.add_text("async/configuration", _table(configuration))

    def log(self, metrics: dict[str, float], staleness: Counter[int], step: int) -> None:
        """Writes the metrics and the histogram ``async/staleness``."""
        super().log(metrics, staleness, step)
        counts, edges = staleness_histogram(staleness)
        self._writer.add_histogram_raw(
            "async/staleness",
            min=min(staleness),
            max=max(staleness),
            num=staleness.total(),
            sum=sum(age * count for age, count in staleness.items()),
            sum_squares=sum(age * age * count for age, count in staleness.items()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def summarize(self, summary: dict[str, float], metrics: dict[str, float], step: int) -> None:
        """Writes the final numbers as the text ``async/summary``, and as scalars that HPARAMS can show."""
        self._writer.add_text("async/summary", _table({name: f"{value:.4g}" for name, value in summary.items()}))
        self._logger.log_metrics({f"async_run/{name}": value for name, value in summary.items()}, step=step)


def writer_for(logger: Logger, prefix: Callable[[WandbLogger], str]) -> ScalarWriter:
    """What shows the metrics in ``logger``: scalars, and more where it is known how.

    Args:
        logger: one of the trainer's.
        prefix: tells what a `WandbLogger` puts in front of the names of metrics, which Lightning keeps private.
    """
    if isinstance(logger, WandbLogger):
        return WandbWriter(logger, prefix(logger))
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardWriter(logger)
    return ScalarWriter(logger)


def staleness_histogram(staleness: Counter[int], max_bins: int = _MAX_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Counts and bin edges; a bin for each whole number from 0 while they fit, else wider ones.

    Args:
        staleness: staleness -> number of updates; not empty.
        max_bins: the most bins.

    Returns:
        ``(counts, edges)`` as `numpy.histogram` gives them; edges lie half-way between whole numbers.

    Examples:
        >>> counts, edges = staleness_histogram(Counter({0: 3, 2: 1}))
        >>> counts.tolist(), edges.tolist()
        ([3, 0, 1], [-0.5, 0.5, 1.5, 2.5])
        >>> counts, edges = staleness_histogram(Counter({0: 3, 5: 1}), max_bins=3)
        >>> counts.tolist(), edges.tolist()
        ([3, 0, 1], [-0.5, 1.5, 3.5, 5.5])
    """
    values = max(staleness) + 1
    width = -(-values // max_bins)
    edges = np.arange(-(-values // width) + 1) * float(width) - 0.5
    counts, _ = np.histogram(list(staleness), bins=edges, weights=list(staleness.values()))
    return counts.astype(int), edges


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
