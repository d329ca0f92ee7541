"""Validation in a run that goes on without ranks that it loses: it is repeated by those that are left.

What Lightning does with its result (loggers, `ModelCheckpoint`, `EarlyStopping`) comes once, after the whole of it.
Private API: see the canary tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from torchmetrics import Metric

from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.protocols import Collectives

__all__ = ["validate_whole"]


def validate_whole(trainer: Trainer, loop: _EvaluationLoop, collectives: Collectives) -> None:
    """Validates; again, if a rank was lost meanwhile. A collective call.

    Args:
        trainer: the trainer.
        loop: its validation loop.
        collectives: the strategy's own.
    """
    if not collectives.outlives_ranks:
        loop.run()
        return
    untyped: Any = loop
    before = [(metric, metric._copy_state_dict()) for metric in _metrics(trainer)]
    deferred: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
    swapped: list[WeightAveraging] = []

    def body() -> None:
        if collectives.take_changed_members():
            # The samplers of evaluation have shares for other ranks.
            untyped._combined_loader = None
        loop.run()

    def restore() -> None:
        deferred.clear()
        # Module and callbacks as they were: weights that are averaged, modes, what metrics have summed up.
        for callback in swapped:
            type(callback)._swap_models(callback, trainer.lightning_module)
        swapped.clear()
        if untyped._module_mode.mode:
            type(loop)._on_evaluation_model_train(loop)
        untyped._results.reset()
        for metric, state in before:
            metric.reset()
            for name, value in state.items():
                # A copy, for metrics sum up in place, and the repetition may have to be undone, too.
                setattr(metric, name, copy.deepcopy(value))

    with ExitStack() as undo:
        for owner, name in (
            (trainer._logger_connector, "log_eval_end_metrics"),
            (loop, "_on_evaluation_end"),
            (loop, "_on_evaluation_model_train"),
        ):
            own = getattr(owner, name)
            set_until_closed(undo, owner, name, lambda *arguments, own=own: deferred.append((own, arguments)))
        for callback in _averaging(trainer):
            set_until_closed(undo, callback, "_swap_models", _noting(callback, swapped))
        collectives.repeat_if_lost(body, restore)
    for act, arguments in deferred:
        act(*arguments)


def _noting(callback: WeightAveraging, swapped: list[WeightAveraging]) -> Callable[[Any], None]:
    def swap(module: Any) -> None:
        type(callback)._swap_models(callback, module)
        if callback in swapped:
            swapped.remove(callback)
        else:
            swapped.append(callback)

    return swap


def _averaging(trainer: Trainer) -> Iterator[WeightAveraging]:
    callbacks: Any = trainer  # attributes that connectors set are unknown to type checkers
    return (callback for callback in callbacks.callbacks if isinstance(callback, WeightAveraging))


def _metrics(trainer: Trainer) -> Iterator[Metric]:
    return (part for part in trainer.lightning_module.modules() if isinstance(part, Metric))
