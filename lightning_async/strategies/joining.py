"""How a rank joins a fit that is under way: what rank 0 hands to it, and what the rank makes of it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_async.exchange.auto import Choice
from lightning_async.holder.layout import all_parameters
from lightning_async.holder.tally import STEPS
from lightning_async.loops.joining import SegmentOverError, TrainerState, capture_trainer, restore_trainer
from lightning_async.runtime.membership import Membership
from lightning_async.strategies.by_hand import ByHand
from lightning_async.strategies.gradient_exchange import GradientExchange
from lightning_async.strategies.optimizer_proxy import load_groups

__all__ = ["FitState", "Joining", "capture_fit"]


@dataclass(frozen=True)
class FitState:
    """What a rank that joins takes over.

    Args:
        trainer: where the ranks stand.
        order: digest of the epoch's order of batches; empty where each rank has a stream of its own.
        module: buffers, and parameters of no optimizer, by name.
        groups: of each optimizer its param groups, without parameters.
        version: the holder's when the segment began.
        counted: what the ranks had counted then.
        by_hand: what a checkpoint keeps beside that.
        dial: what "auto" has chosen, and how many rounds it had measured.
    """

    trainer: TrainerState
    order: str
    module: dict[str, Tensor]
    groups: list[list[dict[str, Any]]]
    version: int
    counted: list[int]
    by_hand: dict[str, Any]
    dial: tuple[Choice | None, int]


def capture_fit(trainer: Trainer, order: str, exchange: GradientExchange, by_hand: ByHand) -> bytes:
    """Rank 0's state when a segment has begun, as it is sent.

    Args:
        trainer: the trainer.
        order: digest of the epoch's order of batches.
        exchange: rank 0's part of the exchange.
        by_hand: what user code does by hand.
    """
    module = trainer.lightning_module
    extras = {name: tensor.detach().cpu().clone() for name, tensor in _extras(trainer, module)}
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    state = FitState(
        trainer=capture_trainer(trainer),
        order=order,
        module=extras,
        groups=groups,
        version=exchange.worker.version,
        counted=[*by_hand.tally.totals],
        by_hand=by_hand.state(),
        dial=(exchange.dial.choice, exchange.dial.rounds),
    )
    return pickle.dumps(state)


class Joining:
    """This rank's way into a fit.

    Args:
        trainer: the trainer.
        membership: has asked to join.
        exchange: this rank's part of the exchange.
        by_hand: what user code does by hand.

    Attributes:
        state: what was taken over last.
    """

    def __init__(self, trainer: Trainer, membership: Membership, exchange: GradientExchange, by_hand: ByHand) -> None:
        self._trainer = trainer
        self._membership = membership
        self._exchange = exchange
        self._by_hand = by_hand
        self._segment = 0
        self.state: FitState | None = None

    def take_state(self) -> bool:
        """Takes over what the ranks know, once a segment is under way; False if the run is over."""
        assert self._membership.joining is not None
        found = self._membership.joining.fetch_state()
        if found is None:
            return False
        self._segment, packed = found
        state: FitState = pickle.loads(packed)
        self.state = state
        trainer, module = self._trainer, self._trainer.lightning_module
        own = dict(_extras(trainer, module))
        with torch.no_grad():
            for name, tensor in state.module.items():
                if name in own and own[name].shape == tensor.shape:
                    own[name].copy_(tensor)
        for optimizer, groups in zip(trainer.optimizers, state.groups, strict=True):
            places = _places(optimizer)
            numbered = [group | {"params": place} for group, place in zip(groups, places, strict=True)]
            load_groups(optimizer, {"param_groups": numbered})
        self._exchange.worker.version = state.version
        self._exchange.dial.choice, self._exchange.dial.rounds = state.dial
        self._by_hand.load(state.by_hand, state.counted, state.counted[STEPS])
        restore_trainer(trainer, state.trainer)
        return True

    def come_in(self) -> None:
        """Trains and meets with the others from here on.

        Raises:
            SegmentOverError: if the segment has ended whose state was taken over.
        """
        if not self._membership.come_in(self._segment):
            raise SegmentOverError


def _places(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    places, start = [], 0
    for group in optimizer.param_groups:
        places.append(list(range(start, start + len(group["params"]))))
        start += len(group["params"])
    return places


def _extras(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What the holder does not have."""
    owned = {id(parameter) for optimizer in trainer.optimizers for parameter in all_parameters(optimizer)}
    yield from ((name, one) for name, one in module.named_parameters() if id(one) not in owned)
    yield from module.named_buffers()
