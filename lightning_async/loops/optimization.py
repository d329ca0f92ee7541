"""Automatic optimization where a batch may give no gradient, and plateaus that all ranks see alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from torch import Tensor
from typing_extensions import override

from lightning_async.holder.layout import all_parameters

__all__ = ["AsyncAutomaticOptimization", "flush_accumulated_gradients", "share_plateaus"]


class AsyncAutomaticOptimization(_AutomaticOptimization):
    """Lightning's, without what it owes to DDP's all-reduce."""

    @override
    def _training_step(self, kwargs: OrderedDict[str, Any]) -> ClosureResult:
        """Runs ``training_step``, which may return None.

        Under DDP the other ranks would wait in their backward for this one's. Here nobody does.
        """
        output = call._call_strategy_hook(self.trainer, "training_step", *kwargs.values())
        self.trainer.strategy.post_training_step()
        result = self.output_result_cls.from_training_step_output(output, int(self.trainer.accumulate_grad_batches))
        assert isinstance(result, ClosureResult)
        return result

    @override
    def _optimizer_step(self, batch_idx: int, train_step_and_backward_closure: Callable[[], Tensor | None]) -> None:
        if self._skip_backward:
            # StochasticWeightAveraging's pass for BatchNorm, which it keeps from stepping by a number of batches to
            # accumulate that no rank reaches under DDP. Gradients that are left over from training must not be pushed.
            train_step_and_backward_closure()
        else:
            super()._optimizer_step(batch_idx, train_step_and_backward_closure)


def flush_accumulated_gradients(loop: _TrainingEpochLoop) -> None:
    """Steps on micro-batches that no full accumulation was left for, as Lightning does on an epoch's last batch.

    Args:
        loop: the epoch loop, of which batches were computed since the last step.
    """
    trainer = loop.trainer
    if int(trainer.accumulate_grad_batches) == 1 or not trainer.lightning_module.automatic_optimization:
        return
    if all(parameter.grad is None for parameter in all_parameters(trainer.optimizers[0])):
        # No batch gave a loss; a gradient scaler would complain.
        return
    zero = torch.zeros(())
    loop.automatic_optimization._optimizer_step(loop.batch_idx, lambda: zero)
    trainer.strategy._lightning_optimizers[0].zero_grad()


def share_plateaus(trainer: Trainer, broadcast: Callable[[Any], Any], by_hand: Sequence[Any] = ()) -> None:
    """Gives all ranks what rank 0's plateau schedulers have made of its own values; a collective call.

    Only those that are stepped between stops: each rank steps them by values that the others do not know.

    Args:
        trainer: the trainer.
        broadcast: gives every rank rank 0's object.
        by_hand: those that user code steps.
    """
    chosen = [
        *by_hand,
        *(
            config.scheduler
            for config in trainer.lr_scheduler_configs
            if config.reduce_on_plateau and config.interval == "step"
        ),
    ]
    if not chosen:
        return
    mine: list[Any] = [
        (scheduler.state_dict(), [group["lr"] for group in scheduler.optimizer.param_groups]) for scheduler in chosen
    ]
    for scheduler, (state, rates) in zip(chosen, broadcast(mine), strict=True):
        scheduler.load_state_dict(state)
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
