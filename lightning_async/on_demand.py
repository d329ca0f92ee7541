"""Imports when they are needed, and what is to be done when others have been made. Standard library only."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["names_on_demand", "when_imported"]


def names_on_demand(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562) that imports the module of a name when the name is first used.

    Args:
        package: the package's full name.
        homes: name -> full name of the module that defines it.

    Examples:
        >>> names_on_demand("lightning_async", {"AMSGrad": "lightning_async.holder.amsgrad"})("AMSGrad").__name__
        'AMSGrad'
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls ``action`` with the module ``name``: at once if it has been imported, else as the last part of its import.

    Args:
        name: a module's full name. It need not exist: then nothing ever happens.
        action: what to do; an exception of it is one of the import.

    Examples:
        >>> when_imported("json", lambda module: print(module.__name__))
        json
    """
    module = sys.modules.get(name)
    if module is None or getattr(module.__spec__, "_initializing", False):
        sys.meta_path.insert(0, _WhenImported(name, action))
    else:
        action(module)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: has the module's own loader call the action."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Has the finders behind this one find the module, and prolongs its import by the action."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self._action(module)

        loader.exec_module = execute_and_act
        return spec
