"""The strategy whose holder's optimizer is AMSGrad, whatever else it could step."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.holder.amsgrad import UnsupportedOptimizerError, check_optimizer
from lightning_async.strategies.strategy import AsyncStrategy

__all__ = ["AsyncAMSGradStrategy"]


class AsyncAMSGradStrategy(AsyncStrategy):
    """Asynchronous data-parallel training with an AMSGrad holder on rank 0 and bounded staleness.

    `AsyncStrategy` with AMSGrad as the optimizer: ``configure_optimizers`` returns `AMSGrad`, or torch's Adam or AdamW,
    for which ``amsgrad`` is switched on. All arguments are those of `AsyncStrategy`.

    Raises:
        MisconfigurationException: if an argument has no meaning.
    """

    strategy_name = "async_amsgrad"

    @override
    def _accept_optimizer(self, optimizer: Optimizer) -> None:
        try:
            is_amsgrad = check_optimizer(optimizer)
        except UnsupportedOptimizerError as error:
            raise MisconfigurationException(str(error)) from error
        if not is_amsgrad:
            rank_zero_warn(
                f"{self.strategy_name} turns AMSGrad on for the {type(optimizer).__name__} that configure_optimizers "
                "returned. Return it with amsgrad=True, or lightning_async.AMSGrad(...), to say so yourself."
            )
            for group in optimizer.param_groups:
                group["amsgrad"] = True
            # For groups that are added later.
            optimizer.defaults["amsgrad"] = True
