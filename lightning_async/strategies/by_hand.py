"""What user code does by hand: optimizer steps under manual optimization, and steps of learning-rate schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_async.data.rhythm import Rhythm, Seen, usual_group
from lightning_async.exchange.worker import Worker
from lightning_async.holder.layout import all_parameters
from lightning_async.holder.tally import BATCHES, STEPS, Tally
from lightning_async.loops.phase import Phase
from lightning_async.loops.step_counter import StepCounter, batches_that_stepped
from lightning_async.strategies.schedulers import SharedSchedulers, schedulers_in

__all__ = ["ByHand", "Leftover"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A rank's batches at the end of a segment whose gradients no step of user code was made for.

    Args:
        seen: the rhythm of user code's steps that the rank has seen.
        pushed: batches whose gradient was pushed as an update of its own.
        lost: batches whose gradient was not.
    """

    seen: Seen
    pushed: int = 0
    lost: int = 0


class ByHand:
    """What user code does by hand in one fit, on this rank.

    Args:
        trainer: the trainer.
        name: the strategy's name, for messages.
        gradients: how many the fit begins with.
        phase: the run's phase.
        world_size: number of ranks N.
        counts_gradients: whether the gradients are counted, since a version is made of several.

    Attributes:
        manual: whether the module optimizes manually.
        counts_steps: whether steps are counted in the tally; else each is a version.
        group: batches that make one step, as all ranks have agreed; None while nobody knows.
        steps: steps that one such group makes, of those that the trainer counts.
    """

    def __init__(
        self,
        trainer: Trainer,
        name: str,
        gradients: int,
        phase: Phase,
        world_size: int,
        counts_gradients: bool = False,
    ) -> None:
        self._world_size = world_size
        module: LightningModule = trainer.lightning_module
        self.manual = not module.automatic_optimization
        self.counts_steps = self.manual or counts_gradients
        self.group: int | None = None
        self.steps = 1
        self._trainer = trainer
        self._name = name
        self._module = module
        self._counter = StepCounter(trainer)
        self._rhythm = Rhythm()
        self._steps_to_make: float = inf
        self._version_at_backward = 0
        self._moved = False
        self._warned = False
        self._pushes_leftover = False
        self.tally = Tally(self._counts_at(gradients))
        self.schedulers = SharedSchedulers(world_size, BATCHES + 1, phase)

    def _counts_at(self, gradients: int) -> list[int]:
        return [gradients, batches_that_stepped(self._trainer) * self._world_size or gradients]

    # --- counts that all ranks share ----------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """Steps per rank, as Lightning counts them."""
        return self.tally.total(STEPS) // self._world_size

    @property
    def batch_clock(self) -> int:
        """Batches per rank: what Lightning's loggers take as their x-axis."""
        return self.tally.total(BATCHES) // self._world_size

    def prepare(self, worker: Worker) -> bool:
        """Has the worker report what is counted; to be called before each segment.

        Returns:
            Whether anything is counted.
        """
        if self._trainer.max_steps != -1:
            self._steps_to_make = self._rhythm.counted + self._trainer.max_steps - self.clock
        if self._world_size > 1:
            self.schedulers.share(self._stepped_by_hand())
        self.tally.extend(BATCHES + 1 + len(self.schedulers))
        if self.counts_steps or len(self.schedulers):
            worker.tally = self.schedulers.tally = self.tally
        return worker.tally is not None

    def restart_count(self) -> None:
        """To be called where Lightning's own count of steps was set to that of all ranks."""
        self._counter.restart()

    def _stepped_by_hand(self) -> Iterator[Any]:
        configured = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        # Lightning steps the configured ones itself under automatic optimization, and those that they have inside.
        stepped = set() if self.manual else set(map(id, _with_parts(configured)))
        if self.manual:
            yield from configured
        callbacks: Any = self._trainer  # attributes that connectors set are unknown to type checkers
        for owner in (self._module, *callbacks.callbacks):
            for scheduler in schedulers_in(vars(owner), self._trainer.optimizers):
                if id(scheduler) not in stepped:
                    yield scheduler

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the counts themselves."""
        return {"scheduled": self.schedulers.made, "group": self.group} if self.manual or self.schedulers.made else {}

    def load(self, saved: Mapping[str, Any], counts: Sequence[int], gradients: int) -> None:
        """Goes on from a checkpoint.

        Args:
            saved: what `state` has returned, or nothing.
            counts: the counts, for the present number of ranks; empty if the checkpoint has none.
            gradients: how many the checkpoint has been trained on; each is a step, but under manual optimization.
        """
        counts = [*counts] or self._counts_at(gradients)
        if not self.manual:
            counts[STEPS] = gradients
        self.tally.hear(counts)
        self.schedulers.made = saved.get("scheduled", [])
        self.group = saved.get("group")
        self._counter.restart()

    # --- one batch ----------------------------------------------------------------------------------------------------

    def begin_batch(self) -> None:
        """Notes that a batch begins."""
        self._moved = False
        if self.manual:
            self._rhythm.begin_batch()
            self.tally.add(BATCHES)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """While a `LightningOptimizer` steps."""
        self._counter.is_stepping = True
        try:
            yield
        finally:
            self._counter.is_stepping = False

    def before_backward(self, version: int) -> None:
        """Notes the version that a gradient is computed at."""
        self._version_at_backward = version

    def before_push(self, index: int, optimizers: int, version: int) -> None:
        """Counts a step that is about to be pushed.

        Raises:
            MisconfigurationException: if its gradient is from before another optimizer's step.
        """
        # Alone, nobody else has moved this optimizer's parameters.
        if optimizers > 1 and self._version_at_backward != version and self._world_size > 1:
            raise MisconfigurationException(
                f"optimizer {index} steps on a gradient from before another optimizer's step, which has refreshed all "
                f"parameters. With {self._name} call manual_backward and step for one optimizer after the other."
            )
        if self.manual and not self._pushes_leftover:
            counted = self._counter.take(index)
            self.tally.add(STEPS, counted)
            self._rhythm.step(counted)
        elif self.counts_steps and not self.manual:
            self.tally.add(STEPS)

    def after_push(self) -> None:
        """Notes that fresh parameters have landed, and steps the schedulers that are due by now."""
        self._moved = True
        self.schedulers.catch_up()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """While a backward pass runs: says what to do about a graph from before a step.

        Raises:
            MisconfigurationException: if there was such a graph.
        """
        try:
            yield
        except RuntimeError as error:
            moved = self._moved and self._world_size > 1
            if moved and "modified by an inplace operation" in str(error):
                raise self._old_graph() from error
            raise

    def _old_graph(self) -> MisconfigurationException:
        return MisconfigurationException(
            f"This loss was computed through a graph from before an optimizer's step. With {self._name} each step "
            "refreshes all parameters, also those that another optimizer has (other ranks have moved them meanwhile), "
            "so what autograd has kept of them is gone. Compute what the loss depends on again after the step (of a "
            'GAN: `fake = self.generator(z)` once more before the generator\'s loss), or use strategy="ddp".'
        )

    # --- batches that make one step -----------------------------------------------------------------------------------

    @property
    def has_learned(self) -> bool:
        """Whether this rank has seen how many batches make a step, or has made all steps that the fit is to make."""
        return self._rhythm.is_shown or self._rhythm.counted >= self._steps_to_make

    @property
    def must_learn(self) -> bool:
        """Whether batches are to be handed out in equal shares until every rank has learned.

        How many batches make a step is known then; a count of steps can end exactly, and batches of one step go to one
        rank.
        """
        ends_by_steps = self._trainer.max_steps != -1
        return self.manual and self.group is None and (self._world_size > 1 or ends_by_steps)

    def finish_segment(self, worker: Worker) -> Leftover:
        """Pushes the gradient of batches that user code makes no step for any more, as far as it is one to push."""
        if not self.manual:
            return Leftover(self._rhythm.seen)
        batches = self._rhythm.open_batches
        own = usual_group([self._rhythm.seen]) or 1
        accumulates = not self._rhythm.is_shown or max(own, self.group or 1) > 1
        pushed = lost = 0
        # Alone, the parameters stay as they are, and the gradient stays good for the next step, as under DDP. One that
        # user code has left out a step for, where it steps in each batch, was not meant to be applied.
        if batches and accumulates and self._world_size > 1:
            gradients = [
                p.grad for each in self._trainer.optimizers for p in all_parameters(each) if p.grad is not None
            ]
            if any(bool(gradient.count_nonzero()) for gradient in gradients):
                pushed, lost = (batches, 0) if self._push_leftover(gradients) else (0, batches)
        if self._world_size > 1:
            self._rhythm.end_segment()
        self.tally.add(STEPS, self._counter.take())
        return Leftover(self._rhythm.seen, pushed, lost)

    def _push_leftover(self, gradients: list[torch.Tensor]) -> bool:
        (optimizer, *others) = self._trainer.strategy._lightning_optimizers
        if others or not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return False
        self._pushes_leftover = True
        try:
            # Lightning counts a step while it runs `training_step` only.
            self.tally.add(STEPS)
            optimizer.step()
        finally:
            self._pushes_leftover = False
        optimizer.zero_grad()
        return True

    def agree(self, ranks: Iterable[Leftover]) -> None:
        """Takes over what all ranks together have seen, and tells what became of batches without a step."""
        ranks = [*ranks]
        self.group = usual_group([rank.seen for rank in ranks]) or self.group
        self.steps = max(rank.seen.steps for rank in ranks)
        # Every rank's calls are known now.
        self.schedulers.catch_up()
        pushed, lost = sum(rank.pushed for rank in ranks), sum(rank.lost for rank in ranks)
        if self._warned or not pushed + lost:
            return
        self._warned = True
        known = self.group is not None and self.group > 1
        rhythm = f"steps once in {self.group} batches" if known else "does not step in each batch"
        multiple = f"a multiple of {self.group} batches" if known else "a multiple of what makes a step"
        advice = f"To leave none, give the epoch {multiple} over all ranks (limit_train_batches, drop_last)"
        if pushed:
            rank_zero_warn(
                f"`training_step` {rhythm}, and {pushed} of the last segment's batches were "
                f"left over. Their gradient, scaled as `training_step` has scaled it and not clipped, was applied as "
                "an update of its own, as Lightning does with the last batches under `accumulate_grad_batches`. "
                f"{advice}. This is said once."
            )
        else:
            rank_zero_warn(
                f"`training_step` {rhythm}, and {lost} of the last segment's batches were "
                "left over. Their gradient was NOT applied: there are several optimizers, or it is not finite. "
                f"{advice}, or step in each batch. This is said once."
            )

    def release(self) -> None:
        """Leaves the schedulers as they were."""
        self.schedulers.release()


def _with_parts(schedulers: Iterable[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _with_parts(getattr(scheduler, "_schedulers", ()))
