"""Epoch-end metrics when ranks have logged different keys.

At the end of an epoch Lightning walks what was logged, in the order of insertion, and reduces entry by entry
(`logger_connector/result.py:473`). Under DDP every rank logs the same keys. Here a rank may have had no batch at all,
and then the walk would pair different entries, or wait for ever. Private API: see the canary tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import nn

__all__ = ["align_results"]

# Key, fields of its metadata, whether it is a tensor, and what it has summed up if nobody reduces it.
_Entry = tuple[str, dict[str, Any], bool, tuple[float, float] | None]


def align_results(
    results: _ResultCollection,
    module: nn.Module,
    gather: Callable[[Any], list[Any]],
    reduce: Callable[..., Any],
) -> None:
    """Gives every rank the same entries in the same order.

    Entries that a rank lacked hold the neutral value, or another rank's where they are not reduced: a callback that
    watches one would take the mean of nothing for a loss that is not finite.

    Args:
        results: what this rank logged in this epoch.
        module: the LightningModule, for entries that are torchmetrics objects.
        gather: collects an object from every rank.
        reduce: the strategy's reduction, for entries that are reduced.
    """
    mine = [_describe(key, metric) for key, metric in results.valid_items()]
    everyone: list[list[_Entry]] = gather(mine)
    if all([entry[0] for entry in entries] == [entry[0] for entry in everyone[0]] for entries in everyone):
        return
    union: dict[str, _Entry] = {entry[0]: entry for entries in everyone for entry in entries}
    logged = {entry[0] for entry in mine}
    ordered = {}
    for key, described in union.items():
        metric = results.get(key)
        if metric is None:
            metric = _neutral(described, module, reduce)
        if key not in logged:
            _make_computable(metric)
            _take_over(metric, described[-1])
        ordered[key] = metric
    rest = {key: metric for key, metric in results.items() if key not in ordered}
    results.clear()
    results.update(ordered | rest)


def _describe(key: str, metric: _ResultMetric) -> _Entry:
    # asdict would copy the reduction, a bound method of the strategy.
    meta = {name: getattr(metric.meta, name) for name in _PLAIN_FIELDS}
    meta["sync_dist"] = metric.meta.sync.should
    meta["rank_zero_only"] = metric.meta.sync.rank_zero_only
    reduced = not metric.is_tensor or (metric.meta.sync.should and not metric.meta.sync.rank_zero_only)
    summed = None if reduced else (float(metric.value), float(getattr(metric, "cumulated_batch_size", 0)))
    return key, meta, metric.is_tensor, summed


def _neutral(described: _Entry, module: nn.Module, reduce: Callable[..., Any]) -> _ResultMetric:
    _, fields, is_tensor, _ = described
    fields = dict(fields)
    sync = _Sync(_should=fields.pop("sync_dist"), fn=reduce, rank_zero_only=fields.pop("rank_zero_only"))
    meta = _Metadata(**fields)
    meta.sync = sync
    metric = _ResultMetric(meta, is_tensor)
    if not is_tensor:
        metric.value = module.get_submodule(meta.metric_attribute or "")
    return metric


def _make_computable(metric: _ResultMetric) -> None:
    """Lets an entry that this rank did not log in this epoch take part in the others' reduction."""
    metric.has_reset = False
    # A torchmetrics entry keeps its last epoch's result until it is updated, and would not meet the other ranks.
    metric._computed = None
    for one in (metric,) if metric.is_tensor else (metric, metric.value):
        # Else torchmetrics warns of a metric that was never updated; other ranks have updated it.
        one._update_count = max(1, one._update_count)


def _take_over(metric: _ResultMetric, summed: tuple[float, float] | None) -> None:
    """Gives an entry that is not reduced what another rank has summed up."""
    if summed is None:
        return
    value, batch_size = summed
    metric.value = torch.full_like(metric.value, value)
    if metric.meta.is_mean_reduction:
        metric.cumulated_batch_size = torch.full_like(metric.cumulated_batch_size, batch_size)


_PLAIN_FIELDS = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "reduce_fx",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)
