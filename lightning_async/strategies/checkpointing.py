"""What the ranks' strategy saves and loads: the holder's parameters, states and version, in torch's own format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.exchange.engine import Engine
from lightning_async.exchange.worker import Worker
from lightning_async.holder.tally import STEPS
from lightning_async.holder.types import Snapshot
from lightning_async.loops import fit_loop as loops
from lightning_async.loops.phase import Phase
from lightning_async.strategies.by_hand import ByHand
from lightning_async.strategies.optimizer_proxy import (
    bare_state,
    checkpointed_state,
    held_state,
    load_groups,
    snapshot_parameters,
)
from lightning_async.strategies.resume import EpochPlace
from lightning_async.strategies.supervisor import StartedRanks

__all__ = ["CheckpointedRanks"]

# One key for all strategies of this package: their checkpoints load in each other.
_CHECKPOINT_KEY = "async_amsgrad"


class CheckpointedRanks(StartedRanks):
    """Started ranks that exchange gradients, as far as checkpoints and the version are concerned."""

    _engine: Engine | None = None
    by_hand: ByHand | None = None
    _snapshot: Snapshot | None = None
    _version = 0
    # The epoch and the order of its batches, as checkpoints record them; what a checkpoint said of them.
    _epoch_order: tuple[int, str] | None = None
    _resumed: EpochPlace | None = None

    @property
    def worker(self) -> Worker:
        """This rank's worker; exists during fit."""
        assert self._engine is not None
        return self._engine.worker

    @property
    def version(self) -> int:
        """The version k of the parameters that this rank holds: updates applied by all ranks."""
        return self._version if self._engine is None else self.worker.version

    @property
    def clock(self) -> int:
        """The global clock: what ``trainer.global_step`` shows.

        It is k // N; under manual optimization the steps that Lightning counts, which user code may have a hand in.
        """
        return self.version // self.world_size if self._by_hand is None else self._by_hand.clock

    @property
    def log_clock(self) -> int:
        """What loggers take as their x-axis: the clock; under manual optimization batches, as Lightning does."""
        return self.clock if self._by_hand is None else self._by_hand.batch_clock

    @property
    def _hand(self) -> ByHand:
        assert self.by_hand is not None
        return self.by_hand

    @property
    def _by_hand(self) -> ByHand | None:
        return self.by_hand if self.by_hand is not None and self.by_hand.manual else None

    def clock_of(self, snapshot: Snapshot) -> int:
        """The clock of what a checkpoint consists of."""
        steps = snapshot.counts[STEPS] if self._by_hand is not None and snapshot.counts else snapshot.version
        return steps // self.world_size

    @property
    def snapshot_in_progress(self) -> Snapshot | None:
        """What a checkpoint that is being put together consists of, on rank 0."""
        return self._snapshot

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = super().lightning_module_state_dict()
        if self._engine is None:
            return state
        # Parameters, optimizer states and applied batches of one checkpoint come from one version.
        self._snapshot = snapshot = self._engine.snapshot()
        if snapshot is None:
            return state
        assert self.lightning_module is not None
        if Phase.asynchronous:
            snapshot_parameters(state, self.lightning_module, self._engine, snapshot)
            return state
        # Where the ranks meet the module's are the same, but for what user code has changed. Training writes to them.
        return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = getattr(optimizer, "_optimizer", optimizer)
        if self._engine is not None and self._snapshot is not None:
            return checkpointed_state(own, self._engine, self._snapshot)
        if not self.is_global_zero:
            # It is not written, and would have to be fetched.
            return bare_state(own)
        return super().optimizer_state(own)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        snapshot, self._snapshot = self._snapshot, None
        version = self.version if snapshot is None else snapshot.version
        noted: dict[str, Any] = {"version": version, "world_size": self.world_size}
        if snapshot is not None and self._epoch_order is not None:
            clock = loops.scheduler_clock(self._trainer)
            noted |= EpochPlace(*self._epoch_order, clock, snapshot.applied).state()
        if self.by_hand is not None:
            noted |= self.by_hand.state()
            noted["counts"] = [*(self.by_hand.tally.totals if snapshot is None else snapshot.counts)]
        checkpoint[_CHECKPOINT_KEY] = noted
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._engine is not None
        saved = checkpoint.get(_CHECKPOINT_KEY, {})
        version = int(checkpoint["global_step"]) * self.world_size
        counts: list[int] = []
        if saved:
            version, *counts = (
                # The same clock with another number of ranks is another version.
                count if saved["world_size"] == self.world_size else count // saved["world_size"] * self.world_size
                for count in (saved["version"], *saved.get("counts", ()))
            )
        self._resumed = EpochPlace.load(saved) if "applied" in saved else None
        states = [
            held_state(optimizer, state)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        if self._engine.service is not None and self._engine.service.restore(version, states):
            rank_zero_warn(
                "The checkpoint is from Adam without AMSGrad; AMSGrad's maximum starts from its `exp_avg_sq`."
            )
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # The module's optimizer only carries hyperparameters; the state is the holder's.
            load_groups(optimizer, state)
        self._engine.states.reset()
        self.worker.version = version
        if self.by_hand is not None:
            self.by_hand.load(saved, counts, version)

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer
