"""What users of the twin package ``pytorch_lightning`` are told: to import ``lightning``.

Both packages hold the same code, but their classes and registries are apart, so that neither's Trainer can take the
other's strategies. The names are put into the twin's registry all the same: without them its message would only say
that they are unknown.
"""

from __future__ import annotations

from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.strategies.registration import START_METHODS, STRATEGIES

__all__ = ["explain_to_twin"]


def explain_to_twin(strategies: Any) -> None:
    """Makes the twin's Trainer explain itself when it is asked for one of our strategies.

    Args:
        strategies: the module ``pytorch_lightning.strategies``.
    """
    for name in [f"{plain}{suffix}" for plain in STRATEGIES for suffix in START_METHODS]:
        strategies.StrategyRegistry.register(
            name, _refuse, description="works with lightning.pytorch", override=True, strategy_name=name
        )


def _refuse(strategy_name: str) -> NoReturn:
    raise MisconfigurationException(
        f'strategy="{strategy_name}" works with the package `lightning`, and this Trainer is that of its twin '
        "`pytorch_lightning`, whose classes are others. The code is the same: `pip install lightning` and import "
        "`lightning.pytorch` wherever `pytorch_lightning` is imported now."
    )
