"""What a checkpoint stores of a fit: the holder's parameters, states and version, in torch's own format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.tally import STEPS
from lightning_async.holder.types import Snapshot
from lightning_async.loops.phase import Phase
from lightning_async.policies.registry import describe_policy, kind_of, make_policy
from lightning_async.strategies.by_hand import ByHand
from lightning_async.strategies.clock import SharedClock
from lightning_async.strategies.frozen import tensors_in
from lightning_async.strategies.gradient_exchange import GradientExchange
from lightning_async.strategies.just_in_time import places_in
from lightning_async.strategies.optimizer_proxy import (
    checkpointed_state,
    held_state,
    load_groups,
    snapshot_parameters,
)
from lightning_async.strategies.resume import EpochPlace

__all__ = ["CHECKPOINT_KEY", "Checkpointing"]

# One key for all strategies of this package: their checkpoints load in each other.
CHECKPOINT_KEY = "async_amsgrad"


class Checkpointing:
    """Puts checkpoints together and loads them; one fit's.

    A checkpoint may be put together while the other ranks push. Parameters, optimizer states, counters and applied
    batches come from one snapshot of the holder: taken with the module's state, which Lightning asks for first, and
    given up when the file is written.

    Args:
        module: the module that is trained.
        exchange: this rank's part of the exchange.
        clock: the counts that all ranks share.
        by_hand: what user code does by hand.
        phase: the run's phase.
        scheduled_steps: tells the steps that the learning-rate schedulers have made.
    """

    def __init__(
        self,
        module: LightningModule,
        exchange: GradientExchange,
        clock: SharedClock,
        by_hand: ByHand,
        phase: Phase,
        scheduled_steps: Callable[[], int],
    ) -> None:
        self._module = module
        self._exchange = exchange
        self._clock = clock
        self._by_hand = by_hand
        self._phase = phase
        self._scheduled_steps = scheduled_steps
        self._snapshot: Snapshot | None = None
        # The copies that each optimizer's parameters are in a checkpoint.
        self._copies: list[list[Tensor]] = []
        # The epoch and the order of its batches, as checkpoints record them.
        self._epoch_order: tuple[int, str] | None = None
        # What a checkpoint has said of them.
        self._resumed: EpochPlace | None = None

    # --- where in an epoch -------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, order: str, matches: Callable[[str], bool]) -> EpochPlace | None:
        """Notes which epoch checkpoints are from; returns the place in it that a loaded one has recorded.

        Args:
            epoch: number of the epoch.
            order: digest of the order of its batches.
            matches: whether the order that a digest tells of is this one.
        """
        self._epoch_order = (epoch, order)
        resumed, self._resumed = self._resumed, None
        return None if resumed is None else resumed.within(epoch, matches)

    # --- saving ------------------------------------------------------------------------------------------------------

    @property
    def snapshot_between_batches(self) -> tuple[Snapshot, int] | None:
        """What a checkpoint consists of that is put together while the ranks train, and its step; else None."""
        if self._snapshot is None or not self._phase.is_asynchronous:
            return None
        return self._snapshot, self._clock.step_of(self._snapshot)

    def module_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The module's state dict with the holder's parameters; takes the checkpoint's snapshot.

        Args:
            state: the module's own; may be changed.
        """
        self._snapshot = snapshot = self._exchange.engine.snapshot()
        if snapshot is None:
            return state
        if self._phase.is_asynchronous:
            self._copies = snapshot_parameters(state, self._module, self._exchange.engine, snapshot)
            return state
        # Where the ranks meet the module's are the same, but for what user code has changed. Training writes to them.
        return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """An optimizer's state dict with the holder's state; None where no checkpoint is put together."""
        if self._snapshot is None:
            return None
        return checkpointed_state(optimizer, self._exchange.engine, self._snapshot)

    @property
    def owned(self) -> set[int]:
        """The identities of those tensors of a checkpoint that nobody else has, until it is completed."""
        states = () if self._snapshot is None else tensors_in(self._snapshot.optimizer_states)
        return {id(tensor) for tensor in (*chain(*self._copies), *states)}

    def held(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Where a checkpoint, before it is completed, has what the holder holds; see `bring_up_to_date`."""
        places = places_in(checkpoint, self._copies, self._exchange.engine.optimizers)
        return {"places": places, "counts_steps": self._by_hand.counts_steps}

    def complete(self, checkpoint: dict[str, Any], version: int, world_size: int) -> None:
        """Adds what a resumed run needs, to a checkpoint that is about to be written.

        Args:
            checkpoint: what Lightning has put together.
            version: the version that this rank holds.
            world_size: number of ranks N.
        """
        snapshot, self._snapshot = self._snapshot, None
        self._copies = []
        noted = self.note(version, world_size)
        if snapshot is not None:
            noted |= {"version": snapshot.version, "counts": [*snapshot.counts]}
            noted |= {"policy": snapshot.policy}
            if snapshot.gathered is not None:
                # Applied batches, too, whose gradients are in no parameter yet.
                noted["gathered"] = asdict(snapshot.gathered)
            if self._epoch_order is not None:
                noted |= EpochPlace(*self._epoch_order, self._scheduled_steps(), snapshot.applied).state()
            if self._phase.is_asynchronous:
                # Lightning has read the clock before the snapshot was taken, and others have pushed in between.
                checkpoint["global_step"] = self._clock.step_of(snapshot)
        checkpoint[CHECKPOINT_KEY] = noted

    def note(self, version: int, world_size: int) -> dict[str, Any]:
        """What a checkpoint that has no snapshot notes under `CHECKPOINT_KEY`; see `complete`."""
        counts = [*self._by_hand.tally.totals]
        options = self._exchange.options
        made_of = {
            "gradients_per_update": options.gradients_per_update,
            "staleness_policy": describe_policy(options.staleness_policy),
            "momentum_correction": options.momentum_correction,
            **self._exchange.dial.state(),
        }
        return {"version": version, "world_size": world_size, **made_of, **self._by_hand.state(), "counts": counts}

    # --- loading -----------------------------------------------------------------------------------------------------

    def load(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer], world_size: int) -> None:
        """Gives the holder a checkpoint's optimizer states and version, and this rank the rest.

        Args:
            checkpoint: what was loaded; of this package's strategies, or of any other.
            optimizers: the module's.
            world_size: number of ranks N.
        """
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        self._exchange.load_dial(saved)
        version, gradients, counts = self._progress(checkpoint, saved, world_size)
        self._resumed = EpochPlace.load(saved) if "applied" in saved else None
        engine, states = self._exchange.engine, checkpoint["optimizer_states"]
        held = [held_state(optimizer, state) for optimizer, state in zip(optimizers, states, strict=True)]
        gathered = Gathered(**saved["gathered"]) if "gathered" in saved else None
        # Where they are enough by now, the holder makes an update of them, which is counted already.
        made = gathered is not None and gathered.count >= self._exchange.options.gradients_per_update
        policy = self._policy_state(saved)
        if engine.service is not None and engine.service.restore(version - made, held, gathered, policy):
            rank_zero_warn(
                "The checkpoint is from Adam without AMSGrad; AMSGrad's maximum starts from its `exp_avg_sq`."
            )
        for optimizer, state in zip(optimizers, states, strict=True):
            # The module's optimizer only carries hyperparameters; the state is the holder's.
            load_groups(optimizer, state)
        engine.states.reset()
        engine.worker.version = version
        self._by_hand.load(saved, counts, gradients)

    def _policy_state(self, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a checkpoint's staleness policy had learned, if it is of the class that this run has."""
        options = self._exchange.options
        policy = make_policy(options.staleness_policy)
        state: Mapping[str, Any] | None = saved.get("policy")
        if state is None or state["kind"] == kind_of(policy):
            return state
        rank_zero_info(
            f"The checkpoint is from a run with staleness_policy={saved['staleness_policy']}; this one begins with "
            f"{describe_policy(options.staleness_policy)}, which takes nothing over from it."
        )
        return None

    def _progress(
        self, checkpoint: Mapping[str, Any], saved: Mapping[str, Any], world_size: int
    ) -> tuple[int, int, list[int]]:
        """The version, the gradients and the counts that a checkpoint's training has come to."""
        gradients_per_update = self._exchange.options.gradients_per_update
        if not saved:
            gradients = int(checkpoint["global_step"]) * world_size
            return gradients // gradients_per_update, gradients, []
        version, *counts = (
            # The same clock with another number of ranks is another version.
            count if saved["world_size"] == world_size else count // saved["world_size"] * world_size
            for count in (saved["version"], *saved.get("counts", ()))
        )
        made_of = saved.get("gradients_per_update", 1)
        # "auto" has made versions of unlike numbers of gradients.
        gradients = counts[STEPS] if made_of > 1 or "auto" in saved else version
        same = (made_of, saved["world_size"]) == (gradients_per_update, world_size)
        if not self._by_hand.manual and not (same and ("auto" in saved) == bool(self._exchange.dial.state())):
            version = gradients // gradients_per_update
        return version, gradients, counts
