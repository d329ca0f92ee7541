"""What users of the twin package ``pytorch_lightning`` are told: to import ``lightning``.

Both packages hold the same code, but their classes and registries are apart, so that neither's Trainer can take the
other's strategies. The names are put into the twin's registry all the same: without them its message would only say
that they are unknown. Above nothing; called when the package is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

__all__ = ["explain_to_twin"]

_TWIN = "pytorch_lightning.strategies"


def explain_to_twin(names: Iterable[str]) -> None:
    """Makes the twin's Trainer explain itself when it is asked for one of our strategies, now or once it is imported.

    Args:
        names: the strategies' names.
    """
    names = tuple(names)
    twin = sys.modules.get(_TWIN)
    if twin is None:
        sys.meta_path.insert(0, _WhenImported(names))
    else:
        _register(twin, names)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself; registers the names when somebody imports the twin's registry."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    @override
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TWIN:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module, self._names)

        loader.exec_module = execute_and_register
        return spec


def _register(twin: Any, names: Sequence[str]) -> None:
    for name in names:
        twin.StrategyRegistry.register(
            name, _refuse, description="works with lightning.pytorch", override=True, strategy_name=name
        )


def _refuse(strategy_name: str) -> NoReturn:
    raise MisconfigurationException(
        f'strategy="{strategy_name}" works with the package `lightning`, and this Trainer is that of its twin '
        "`pytorch_lightning`, whose classes are others. The code is the same: `pip install lightning` and import "
        "`lightning.pytorch` wherever `pytorch_lightning` is imported now."
    )
