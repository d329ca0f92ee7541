"""An optimizer's state as its user sees it: the holder's, fetched when looked at, taken over when changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder.held_state import HeldState, OptimizerStateError, StateByPlace, StateElsewhere
from lightning_async.holder.layout import exchanged_parameters, laid_out_like

__all__ = ["OptimizerStates", "state_by_place"]

_WHERE_THE_RANKS_MEET = (
    "Do it where the ranks meet, for example in on_train_epoch_start, on_validation_end or on_train_epoch_end: the "
    "holder takes it over there, from rank 0"
)


class OptimizerStates:
    """The states of a fit's optimizers as the user sees them, on one rank.

    Where the ranks meet, a state that was looked at stays until the next segment begins, and rank 0's goes to the
    holder if it was changed. During a segment a state is as new as this rank's parameters, and changes are refused.

    Args:
        optimizers: the module's optimizers.
        fetch: returns the holder's state of one of them.
        version: the version of the parameters that this rank holds.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        fetch: Callable[[int], StateByPlace],
        version: Callable[[], int],
    ) -> None:
        self._optimizers = list(optimizers)
        self._owned = [exchanged_parameters(optimizer) for optimizer in optimizers]
        self._fetch = fetch
        self._version = version
        self._meetings = 0
        self._in_segment = False
        self._shown: list[HeldState | None] = []
        self._handles: list[Any] = []
        for index, optimizer in enumerate(self._optimizers):
            # A wrapper around another optimizer may have none of its own.
            shown = self._show(index) if "state" in vars(optimizer) else None
            self._shown.append(shown)
            if shown is not None:
                self._install(optimizer, shown)
                self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_loading))

    def begin_segment(self) -> None:
        """The ranks train from here on; what was looked at is forgotten."""
        self.reset()
        self._in_segment = True

    def end_segment(self) -> None:
        """The ranks meet.

        Raises:
            OptimizerStateError: if user code has changed a state meanwhile.
        """
        self.check_untouched()
        try:
            for shown in self._shown:
                if shown is not None:
                    shown.expire()
        finally:
            self._in_segment = False
            self._meetings += 1

    def load(self) -> None:
        """Fetches every state, for the time after the last meeting: nobody can be asked then."""
        for shown in self._shown:
            if shown is not None:
                shown.load()

    def reset(self) -> None:
        """Shows the holder's states, whatever the optimizers have in their place."""
        for optimizer, shown in zip(self._optimizers, self._shown, strict=True):
            if shown is not None:
                shown.expire()
                self._install(optimizer, shown)

    def check_untouched(self) -> None:
        """Refuses a state that was assigned during a segment."""
        for optimizer, shown in zip(self._optimizers, self._shown, strict=True):
            if shown is not None and vars(optimizer)["state"] is not shown:
                self._install(optimizer, shown)
                self._refuse_changes()

    def changes(self) -> list[dict[int, Any] | None]:
        """For each optimizer the state that it has here, None where nobody looked at it: what may have been changed."""
        changed: list[dict[int, Any] | None] = []
        for optimizer, shown, owned in zip(self._optimizers, self._shown, self._owned, strict=True):
            if shown is None or (vars(optimizer)["state"] is shown and not shown.is_loaded):
                changed.append(None)
            else:
                changed.append(state_by_place(optimizer, owned))
        return changed

    def show(self, index: int, state: StateByPlace) -> Any:
        """A context in which an optimizer shows ``state``, unless user code has looked at it where the ranks meet."""
        optimizer, shown = self._optimizers[index], self._shown[index]
        if shown is None or (not self._in_segment and (vars(optimizer)["state"] is not shown or shown.is_loaded)):
            return _nothing()
        return shown.lend(self._by_parameter(index, state))

    def release(
        self,
        state_of: Callable[[int], StateByPlace] | None,
        elsewhere: str,
        kept: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """Gives the optimizers dicts of their own again.

        Args:
            state_of: the last state of each optimizer; None if it cannot be had here.
            elsewhere: where it is then.
            kept: optimizers that go on showing what they show.
        """
        for handle in self._handles:
            handle.remove()
        known = set(map(id, kept))
        for index, (optimizer, shown) in enumerate(zip(self._optimizers, self._shown, strict=True)):
            if shown is None or vars(optimizer)["state"] is not shown or id(optimizer) in known:
                continue
            own: defaultdict[Any, Any]
            if shown.is_loaded and not self._in_segment:
                own = defaultdict(dict, dict.items(shown))
            elif state_of is None:
                own = StateElsewhere(elsewhere)
            else:
                own = defaultdict(dict, self._by_parameter(index, state_of(index)))
            vars(optimizer)["state"] = own

    def _show(self, index: int) -> HeldState:
        return HeldState(
            lambda: self._by_parameter(index, self._fetch(index)),
            lambda: (self._meetings, self._version() if self._in_segment else None),
            self._check_writable,
        )

    def _by_parameter(self, index: int, state: StateByPlace) -> dict[Any, Any]:
        owned = self._owned[index]
        return {
            owned[key] if isinstance(key, int) and key < len(owned) else key: _beside(value, owned, key)
            for key, value in state.items()
        }

    def _install(self, optimizer: torch.optim.Optimizer, shown: HeldState) -> None:
        vars(optimizer)["state"] = shown

    def _check_writable(self) -> None:
        if self._in_segment:
            self._refuse_changes()

    def _before_loading(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        self._check_writable()

    def _refuse_changes(self) -> None:
        names = " and ".join(type(optimizer).__name__ for optimizer in self._optimizers)
        raise OptimizerStateError(
            f"the state of {names} was changed between two batches, and the holder, which has it, is steps on by then. "
            f"{_WHERE_THE_RANKS_MEET}"
        )


def state_by_place(optimizer: torch.optim.Optimizer, owned: Sequence[Tensor] | None = None) -> dict[int, Any]:
    """What an optimizer keeps, by the places of its parameters that travel.

    Args:
        optimizer: the optimizer.
        owned: these parameters, if they are not those that it has now.
    """
    places = {id(parameter): place for place, parameter in enumerate(owned or exchanged_parameters(optimizer))}
    return {
        places[id(key)] if isinstance(key, Tensor) else key: value
        for key, value in optimizer.state.items()
        if not isinstance(key, Tensor) or id(key) in places
    }


def _beside(value: Any, owned: Sequence[Tensor], key: Any) -> Any:
    """The value with its tensors where and as the parameter is, but for the step, which is counted on the host."""
    if not isinstance(value, Mapping) or not isinstance(key, int) or key >= len(owned):
        return value
    own = owned[key]
    return {
        name: laid_out_like(item.to(own.device), own) if isinstance(item, Tensor) and name != "step" else item
        for name, item in value.items()
    }


@contextmanager
def _nothing() -> Iterator[None]:
    yield
