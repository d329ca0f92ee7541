"""The strategy whose holder's optimizer is AMSGrad, whatever else it could step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.holder.amsgrad import UnsupportedOptimizerError, check_optimizer
from lightning_async.strategies.strategy import AsyncStrategy

__all__ = ["AsyncAMSGradStrategy", "warn_at"]


def warn_at(function: Callable[..., Any] | None, message: str) -> None:
    """Warns at the place where a function is defined, and not where it is called from.

    Args:
        function: the function or method; without one that is written in Python, the caller's place is taken.
        message: the warning.
    """
    code = None if function is None else getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        warnings.warn(message, stacklevel=2)
        return
    warnings.warn_explicit(message, UserWarning, code.co_filename, code.co_firstlineno)


class AsyncAMSGradStrategy(AsyncStrategy):
    """Asynchronous data-parallel training with an AMSGrad holder on rank 0 and bounded staleness.

    `AsyncStrategy` with AMSGrad as the optimizer: ``configure_optimizers`` returns `AMSGrad`, or torch's Adam or AdamW,
    for which ``amsgrad`` is switched on. All arguments are those of `AsyncStrategy`.

    Raises:
        MisconfigurationException: if an argument has no meaning.
    """

    strategy_name = "async_amsgrad"
    _example_optimizer = "lightning_async.AMSGrad(...)"

    @override
    def _accept_optimizer(self, optimizer: Optimizer) -> None:
        try:
            is_amsgrad = check_optimizer(optimizer)
        except UnsupportedOptimizerError as error:
            raise MisconfigurationException(str(error)) from None
        if not is_amsgrad:
            if self.is_global_zero:
                warn_at(
                    getattr(self.lightning_module, "configure_optimizers", None),
                    f"{self.strategy_name} turns AMSGrad on for the {type(optimizer).__name__} that "
                    "configure_optimizers returned. Return it with amsgrad=True, or lightning_async.AMSGrad(...), to "
                    "say so yourself.",
                )
            for group in optimizer.param_groups:
                group["amsgrad"] = True
            # For groups that are added later.
            optimizer.defaults["amsgrad"] = True
