"""What ``trainer.model`` is during a fit, where DDP has its wrapper."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

__all__ = ["ModuleWrapper", "call_directly"]


class ModuleWrapper(nn.Module):
    """Stands where DDP's wrapper stands: its ``module`` is the LightningModule; everything else is that one's too.

    User code that was written for DDP reaches through the wrapper (``trainer.model.module``) and may ask it not to
    reduce (``no_sync``); here there is no all-reduce to leave out. The LightningModule itself knows nothing of it.

    Args:
        module: the LightningModule.

    Examples:
        >>> linear = nn.Linear(2, 1)
        >>> wrapper = ModuleWrapper(linear)
        >>> wrapper.module is linear, wrapper.in_features, [*wrapper.state_dict()]
        (True, 2, ['module.weight', 'module.bias'])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # A module that is made is in training mode; the one that is wrapped may not be.
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """As DDP's; does nothing, since gradients stay on their rank until the optimizer steps."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While a copy is being made there is none yet.
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)


def call_directly(wrapper: nn.Module, module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a step of the module without its wrapper's forward, in which DDP would prepare the all-reduce."""
    return getattr(module, method)(*args, **kwargs)
