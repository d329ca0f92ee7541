"""The hyperparameters that travel with each push: which they are, and how they are read and set."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_async.transport.fields import MAX_HYPERPARAMS, pack_hyperparams

__all__ = ["KERNEL_KEYS", "HyperparamLayout", "HyperparamReader", "make_plain"]

# How an update is computed, not what it is: each side's own affair.
KERNEL_KEYS = ("fused", "foreach", "capturable", "differentiable")
# Which state there is; nothing that a step could change.
_STRUCTURE_KEYS = ("params", "amsgrad")
# What torch's schedulers note in a param group for themselves.
_SCHEDULER_NOTES = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
# Beyond this a whole number is not exactly a double.
_LARGEST_WHOLE = 2**53


class HyperparamLayout:
    """Which hyperparameters of an optimizer travel, and in which order; the same on both sides.

    These are the numbers, flags and tuples of numbers in its param groups as they are when the layout is made, such as
    ``lr``, ``betas`` and ``nesterov``. Texts, None, infinite numbers, the choice of kernel and what schedulers note
    there stay where they are.

    Args:
        optimizer: the optimizer.

    Attributes:
        names: for each param group the keys that travel.
        count: how many doubles they make, over all groups.
        kind: the optimizer's class.

    Raises:
        ValueError: if there are more than `wire.MAX_HYPERPARAMS`.

    Examples:
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> layout = HyperparamLayout(optimizer)
        >>> layout.names[0][:3], layout.read(optimizer.param_groups)[:3]
        (('lr', 'betas', 'eps'), (0.5, 0.9, 0.999))
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.kind = type(optimizer).__name__
        self.names = [
            tuple(key for key, value in group.items() if _travels(key, value, optimizer.defaults))
            for group in optimizer.param_groups
        ]
        # For each double its group, key, and place in the tuple (None where the value is a number).
        self._places = [
            (index, key, place)
            for index, (group, names) in enumerate(zip(optimizer.param_groups, self.names, strict=True))
            for key in names
            for place in (range(len(group[key])) if isinstance(group[key], (tuple, list)) else (None,))
        ]
        self.count = len(self._places)
        if self.count > MAX_HYPERPARAMS:
            raise ValueError(
                f"{self.kind} has {self.count} hyperparameters in its {len(self.names)} param groups, and at most "
                f"{MAX_HYPERPARAMS} can be sent; put parameters with the same ones into one group"
            )

    def read(self, groups: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
        """The present values, over all param groups, which have the form of those that the layout was made from."""
        return tuple(
            float(groups[index][key] if place is None else groups[index][key][place])
            for index, key, place in self._places
        )

    def assign(self, groups: Sequence[dict[str, Any]], values: Sequence[float], before: Sequence[float]) -> None:
        """Sets the values that differ from ``before``, and leaves the others to the optimizer, which may adapt them.

        Args:
            groups: param groups of the same form.
            values: the new values, of length ``count``.
            before: the values that were set last.
        """
        for (index, key, place), value, old in zip(self._places, values, before, strict=True):
            if value == old:
                continue
            group = groups[index]
            if place is None:
                group[key] = _like(group.get(key), value)
            else:
                whole = list(group[key])
                whole[place] = _like(whole[place], value)
                group[key] = tuple(whole)

    def digest(self) -> str:
        """A short text that is the same for two layouts only if all names and lengths are."""
        described = json.dumps([self.kind, self._places])
        return hashlib.sha256(described.encode()).hexdigest()[:12]


class HyperparamReader:
    """Reads an optimizer's hyperparameters for the wire, and converts them only when they have changed.

    Args:
        optimizer: the module's optimizer.
        layout: what to read.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> reader = HyperparamReader(optimizer, HyperparamLayout(optimizer))
        >>> len(reader.packed()) == 8 * HyperparamLayout(optimizer).count
        True
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layout: HyperparamLayout) -> None:
        self._optimizer = optimizer
        self._layout = layout
        self._getters = [itemgetter(*names) if names else _nothing for names in layout.names]
        self._seen: list[Any] | None = None
        self._packed = b""

    def packed(self) -> bytes:
        """The present values as `Push.hyperparams` of `transport/message.py` takes them.

        Raises:
            ValueError: if a param group was added or taken away.
            WireError: if a value is not finite.
        """
        groups = self._optimizer.param_groups
        if len(groups) != len(self._getters):
            raise ValueError(
                f"{self._layout.kind} has {len(groups)} param groups, and had {len(self._getters)} when fit began. "
                "Give it all groups in configure_optimizers, with lr=0 or requires_grad=False for those that are "
                "to be trained later."
            )
        seen = [get(group) for get, group in zip(self._getters, groups, strict=True)]
        if seen != self._seen:
            self._packed = pack_hyperparams(self._layout.read(groups))
            # A tensor or a list may change and still be the same object.
            self._seen = seen if all(map(_is_immutable, seen)) else None
        return self._packed


def make_plain(group: dict[str, Any]) -> None:
    """Makes Python numbers of a param group's one-element tensors, which may be on a worker's device, in place.

    Examples:
        >>> group = {"params": [], "lr": torch.tensor(0.5), "betas": (torch.tensor(0.25), 0.5)}
        >>> make_plain(group)
        >>> group
        {'params': [], 'lr': 0.5, 'betas': (0.25, 0.5)}
    """
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, Tensor) and value.numel() == 1:
            group[key] = value.item()
        elif isinstance(value, tuple) and any(isinstance(item, Tensor) and item.numel() == 1 for item in value):
            group[key] = tuple(item.item() if isinstance(item, Tensor) else item for item in value)


def _travels(key: str, value: object, defaults: Mapping[str, Any]) -> bool:
    if key in KERNEL_KEYS or key in _STRUCTURE_KEYS or (key in _SCHEDULER_NOTES and key not in defaults):
        return False
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and _is_number(value.item())
    if isinstance(value, int):
        return abs(value) <= _LARGEST_WHOLE
    return isinstance(value, Real) and math.isfinite(value)


def _is_immutable(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_immutable, value))
    return isinstance(value, Real)


def _like(old: object, new: float) -> float | bool | int:
    if isinstance(old, bool) and new in (0.0, 1.0):
        return bool(new)
    if isinstance(old, int) and new.is_integer():
        return int(new)
    return new


def _nothing(group: Mapping[str, Any]) -> tuple[()]:
    return ()
