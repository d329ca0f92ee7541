"""How a record's names and values read on a page. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_async.monitoring.number_runs import runs_of
from lightning_async.monitoring.series import Evaluation

__all__ = ["metric_names", "ranges", "readable"]


def metric_names(evaluations: Iterable[Evaluation]) -> list[str]:
    """All metrics that were logged; those of validation come first.

    Examples:
        >>> one = Evaluation(1.0, 1, 1, 1.0, 1.0, None, {"lr": 0.1, "val/loss": 2.0, "val_acc": 0.5})
        >>> metric_names([one])
        ['val/loss', 'val_acc', 'lr']
    """
    names = {name for evaluation in evaluations for name in evaluation.metrics}
    return sorted(names, key=lambda name: (not name.startswith("val"), name))


def readable(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in which each value says what was asked for, where it is another one.

    Examples:
        >>> readable({"transport": "shm", "transport_by_rank": ["in process", "shm", "shm"], "overlap": False,
        ...           "requested": {"transport": "auto"}})
        {'transport': 'auto -> shm (in process: 0; shm: 1 to 2)', 'overlap': False}
    """
    asked: Mapping[str, Any] = configuration.get("requested", {})
    by_rank: Sequence[str] = configuration.get("transport_by_rank", ())
    shown = {}
    for name, value in configuration.items():
        if name in ("requested", "transport_by_rank"):
            continue
        if name == "auto":
            shown["what auto has chosen"] = value["why"]
            continue
        shown[name] = f"{asked[name]} -> {value}" if name in asked else value
        if name == "transport" and len(by_rank) > 1:
            parts = [f"{kind}: {ranges(_ranks_of(kind, by_rank))}" for kind in dict.fromkeys(by_rank)]
            shown[name] = f"{shown[name]} ({'; '.join(parts)})"
    return shown


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words.

    Examples:
        >>> ranges([1, 2, 3, 7]), ranges([0])
        ('1 to 3, 7', '0')
    """
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs_of(numbers))


def _ranks_of(kind: str, by_rank: Sequence[str]) -> list[int]:
    return [rank for rank, own in enumerate(by_rank) if own == kind]
