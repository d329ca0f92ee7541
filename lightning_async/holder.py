"""The holder: master parameters, optimizer state and version, in rank 0.

Above `staleness.py` (the rule of who may proceed) and `amsgrad.py` (the update); below `server.py`, whose sessions
are its only callers. Does no I/O and imports no Lightning.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_async.amsgrad import GroupHyper, adopt_amsgrad_state, holder_optimizer
from lightning_async.failure import FailureLatch
from lightning_async.layout import FlatLayout
from lightning_async.staleness import Barrier, Verdict
from lightning_async.update import FusedUpdate

__all__ = ["Holder", "Push", "Snapshot", "Update"]


@dataclass(frozen=True, slots=True)
class Push:
    """A gradient and what is needed to apply it.

    Args:
        worker: the worker that computed it.
        optimizer: index of the optimizer that owns the parameters.
        version_read: version of the parameters that it was computed at.
        gradients: one tensor per parameter of the optimizer, None where the parameter took no part.
        groups: the worker's current hyper-parameters, one entry per param group.
        tickets: number of batches that the gradient covers.
        samples: number of samples in them.
        waited_s: seconds that the worker's previous push and pull took.
    """

    worker: int
    optimizer: int
    version_read: int
    gradients: Sequence[Tensor | None]
    groups: Sequence[GroupHyper]
    tickets: int = 1
    samples: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Update:
    """What became of a push.

    Args:
        push: the push.
        version: the holder's version after it.
        staleness: updates applied between the read and this push, k - r.
        applied: False if it was dropped as too stale.
        parked_s: seconds that the barrier held it back.
    """

    push: Push
    version: int
    staleness: int
    applied: bool
    parked_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters and optimizer states of one version; owns its memory."""

    version: int
    parameters: Tensor
    optimizer_states: list[dict[str, Any]]


class Holder:
    """Master parameters, optimizer state and version; a monitor that does no I/O.

    Every public method takes the lock, leaves the state consistent, and returns or fills copies. A push or a pull
    that the barrier holds back blocks its caller, and nobody else, until it may proceed or the run fails.

    Args:
        layout: where each parameter lies.
        parameters: initial values, a flat buffer of ``layout``; copied.
        optimizers: the optimizers to stand in for (AMSGrad, Adam or AdamW), in the layout's order.
        barrier: who may proceed; owned by the holder from here on.
        latch: the run's failure latch.
        observer: called under the lock with every applied or dropped push; must be quick.
    """

    def __init__(
        self,
        layout: FlatLayout,
        parameters: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        barrier: Barrier,
        latch: FailureLatch,
        observer: Callable[[Update], None] = lambda update: None,
    ) -> None:
        self._layout = layout
        self._flat = parameters.detach().clone()
        self._barrier = barrier
        self._latch = latch
        self._observer = observer
        self._changed = threading.Condition()
        self._optimizers: list[torch.optim.Optimizer] = []
        for index, template in enumerate(optimizers):
            views = iter(layout.views(self._flat, index))
            groups = [[torch.nn.Parameter(next(views)) for _ in group["params"]] for group in template.param_groups]
            self._optimizers.append(holder_optimizer(template, groups))
        self._updates = [FusedUpdate(optimizer) for optimizer in self._optimizers]
        latch.subscribe(lambda failure: self._wake())

    @property
    def version(self) -> int:
        """Number of updates applied so far, k."""
        with self._changed:
            return self._barrier.version

    def pull(self, worker: int, out: Tensor) -> int:
        """Copies the parameters into ``out`` once the barrier lets ``worker`` read; returns their version.

        Raises:
            WorkerFailedError: if the run fails while the worker waits.
        """
        with self._changed:
            self._barrier.ask(worker)
            self._wait(lambda: self._barrier.may_read(worker))
            version = self._barrier.read(worker)
            out.copy_(self._flat)
            # The next reader in the queue may go too: nobody else would tell it.
            self._changed.notify_all()
            return version

    def push(self, push: Push) -> Update:
        """Applies a gradient once the barrier lets it, or drops it; returns what became of it.

        Raises:
            ValueError: if the worker does not hold the version that it says it read.
            WorkerFailedError: if the run fails while the push waits.
        """
        with self._changed:
            worker = push.worker
            held = self._barrier.outstanding.get(worker)
            if held != push.version_read:
                raise ValueError(f"worker {worker} pushes a gradient of version {push.version_read} but holds {held}")
            started = time.monotonic()
            self._wait(lambda: self._barrier.verdict(worker) is not Verdict.WAIT)
            parked_s = time.monotonic() - started
            applied = self._barrier.verdict(worker) is Verdict.APPLY
            if applied:
                self._step(push)
                staleness = self._barrier.apply(worker)
            else:
                staleness = self._barrier.discard(worker)
            update = Update(push, self._barrier.version, staleness, applied, parked_s)
            self._observer(update)
            self._changed.notify_all()
            return update

    def adopt(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        """Takes over parameters that differ from its own; nobody may be computing.

        Args:
            parameters: for each optimizer its parameters. Where they are rounded (a module in bfloat16), the holder
                keeps its own values as long as they round to these.
        """
        with self._changed:
            for index, owned in enumerate(parameters):
                for view, parameter in zip(self._layout.views(self._flat, index), owned, strict=True):
                    own = view.to(device=parameter.device, dtype=parameter.dtype)
                    if not torch.equal(own, parameter.detach()):
                        view.copy_(parameter.detach())

    def leave(self, worker: int) -> None:
        """Takes ``worker`` out of the barrier: it computes nothing more, or is dead."""
        with self._changed:
            self._barrier.leave(worker)
            self._changed.notify_all()

    def read(self, out: Tensor) -> int:
        """Copies the parameters into ``out`` past the barrier, for the synchronous phase; returns their version."""
        with self._changed:
            out.copy_(self._flat)
            return self._barrier.version

    def snapshot(self) -> Snapshot:
        """Parameters and optimizer states of one version."""
        with self._changed:
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self._optimizers]
            return Snapshot(self._barrier.version, self._flat.clone(), states)

    def restore(self, version: int, optimizer_states: Sequence[Mapping[str, Any]]) -> bool:
        """Loads optimizer states, in torch's format, and the version; nobody may be computing.

        Returns:
            True if a state came from Adam without AMSGrad, whose maximum was then started from its ``exp_avg_sq``.
        """
        adopted = False
        with self._changed:
            for optimizer, state in zip(self._optimizers, optimizer_states, strict=True):
                own = copy.deepcopy(dict(state))
                adopted |= adopt_amsgrad_state(own)
                optimizer.load_state_dict(own)
            for update in self._updates:
                update.forget()
            self._barrier.version = version
        return adopted

    def _step(self, push: Push) -> None:
        self._updates[push.optimizer](push.gradients, push.groups)

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._latch.check()
            self._changed.wait()
        self._latch.check()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
