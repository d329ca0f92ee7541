"""A dict that stands in an optimizer's ``state`` during a fit, and fetches the holder's when it is looked at."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["HeldState", "OptimizerStateError", "StateByPlace", "StateElsewhere", "same_state"]

# What an optimizer keeps for each parameter, by the parameter's place among those that travel.
StateByPlace: TypeAlias = Mapping[int, Any]


class OptimizerStateError(RuntimeError):
    """An optimizer's state cannot be read or changed here; the message says where it can."""


class HeldState(defaultdict[Any, Any]):
    """What stands in ``optimizer.state`` during a fit: a dict of the holder's state, which is fetched on first use.

    It is fetched anew when ``stamp`` has moved. Nothing here talks to another rank before user code looks.

    Args:
        fetch: returns the state, by parameter.
        stamp: what the fetched state is good for.
        check_writable: raises where a change would be lost.
    """

    def __init__(
        self, fetch: Callable[[], Mapping[Any, Any]], stamp: Callable[[], Hashable], check_writable: Callable[[], None]
    ) -> None:
        super().__init__(dict)
        self._fetch = fetch
        self._stamp = stamp
        self._check_writable = check_writable
        self._fetched_at: Hashable = None
        self._filling = False
        # What was fetched where changes are lost, to tell them.
        self._before: dict[Any, Any] | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether it holds values that user code may have changed."""
        return self._fetched_at is not None

    def expire(self) -> None:
        """Forgets what was fetched; raises if it was changed where that is lost."""
        before, self._before = self._before, None
        try:
            if before is not None and not same_state(before, dict(dict.items(self))):
                self._check_writable()
        finally:
            self._fetched_at = None
            dict.clear(self)

    @contextmanager
    def lend(self, values: Mapping[Any, Any]) -> Iterator[None]:
        """Shows ``values`` for a while."""
        kept, self._filling = dict(dict.items(self)), True
        self._replace(values)
        try:
            yield
        finally:
            self._replace(kept)
            self._filling = False

    def load(self) -> None:
        """Fetches the state, unless what is there is good still."""
        if self._filling or (self._fetched_at is not None and self._fetched_at == self._stamp()):
            return
        self.expire()
        self._filling = True
        try:
            self._replace(self._fetch())
        finally:
            self._filling = False
        self._fetched_at = self._stamp()
        if not self._is_writable():
            self._before = copy.deepcopy(dict(dict.items(self)), {id(key): key for key in dict.keys(self)})

    def __missing__(self, key: Any) -> Any:
        # As every optimizer's state; in the asynchronous phase what is put there is found, and refused, later.
        value = self._default()
        dict.__setitem__(self, key, value)
        return value

    def __iter__(self) -> Iterator[Any]:
        # Beside its use: C code that copies dicts asks a subclass that has this for its keys and items.
        self.load()
        return dict.__iter__(self)

    def __reduce__(self) -> Any:
        # A copy, or what is unpickled, is a dict with the values.
        self.load()
        return defaultdict, (dict,), None, None, iter(dict.items(self))

    def __copy__(self) -> Any:
        self.load()
        return defaultdict(dict, dict.items(self))

    def copy(self) -> Any:
        """A dict of its own with the values."""
        return self.__copy__()

    def __or__(self, other: Any) -> Any:
        return self.__copy__() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.__copy__()

    def _default(self) -> dict[Any, Any]:
        return {}

    def _replace(self, values: Mapping[Any, Any]) -> None:
        dict.clear(self)
        for key, value in values.items():
            dict.__setitem__(self, key, value)

    def _is_writable(self) -> bool:
        try:
            self._check_writable()
        except OptimizerStateError:
            return False
        return True


class StateElsewhere(HeldState):
    """What stands in ``optimizer.state`` where the state is not, and cannot be fetched any more.

    Args:
        reason: what the error says when user code looks at it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(lambda: _refuse(reason), int, lambda: _refuse(reason))


def _reads(name: str) -> Callable[..., Any]:
    original = getattr(dict, name)

    def read(self: HeldState, *args: Any, **kwargs: Any) -> Any:
        self.load()
        return original(self, *args, **kwargs)

    read.__name__ = name
    return read


def _writes(name: str) -> Callable[..., Any]:
    original = getattr(dict, name)

    def write(self: HeldState, *args: Any, **kwargs: Any) -> Any:
        if not self._filling:
            self._check_writable()
        self.load()
        return original(self, *args, **kwargs)

    write.__name__ = name
    return write


for _name in ("__getitem__", "__contains__", "__len__", "__eq__", "__ne__", "__repr__", "__reversed__"):
    setattr(HeldState, _name, _reads(_name))
for _name in ("get", "keys", "values", "items"):
    setattr(HeldState, _name, _reads(_name))
for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(HeldState, _name, _writes(_name))


def same_state(held: Any, shown: Any) -> bool:
    """Whether a state is still what the holder has; rounded values are, if the holder's own round to them.

    Examples:
        >>> third = torch.tensor(1 / 3)
        >>> same_state({0: {"a": third}}, {0: {"a": third.bfloat16()}}), same_state({0: {"a": third}}, {})
        (True, False)
    """
    if isinstance(held, Tensor) and isinstance(shown, Tensor):
        if held.shape != shown.shape:
            return False
        return torch.equal(held.detach().to(shown.device, shown.dtype), shown.detach())
    if isinstance(held, Tensor) or isinstance(shown, Tensor):
        return False
    if isinstance(held, Mapping) and isinstance(shown, Mapping):
        # A parameter without a state and one with an empty one are the same to an optimizer.
        keys = {key for mapping in (held, shown) for key, value in mapping.items() if not _is_empty(value)}
        return all(key in held and key in shown and same_state(held[key], shown[key]) for key in keys)
    if isinstance(held, (list, tuple)) and isinstance(shown, (list, tuple)):
        return len(held) == len(shown) and all(map(same_state, held, shown))
    return bool(held == shown)


def _is_empty(value: object) -> bool:
    return isinstance(value, Mapping) and not value


def _refuse(elsewhere: str) -> Any:
    raise OptimizerStateError(elsewhere)
