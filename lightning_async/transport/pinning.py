"""Page-locked host memory: what a GPU copies to and from at full speed, and without its host waiting.

A channel's buffers exist already (a shared segment, say), so they are registered with CUDA where they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

__all__ = ["pin", "unpin"]

log = logging.getLogger(__name__)


def pin(tensor: Tensor) -> bool:
    """Page-locks the memory of a host tensor until `unpin`.

    Returns:
        False if that is impossible here (no CUDA, a limit on locked memory): copies are then slower, not wrong.
    """
    if tensor.device.type != "cpu" or not torch.cuda.is_available():
        return False
    status = _cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status) != 0:
        log.info("lightning_async: %d bytes of host memory could not be pinned (%s)", tensor.nbytes, status)
        return False
    return True


def unpin(tensor: Tensor) -> None:
    """Ends `pin`; to be called before the memory is given back, and only where `pin` returned True."""
    status = _cudart().cudaHostUnregister(tensor.data_ptr())
    if int(status) != 0:
        log.warning("lightning_async: pinned memory could not be released (%s)", status)


def _cudart() -> Any:
    cuda: Any = torch.cuda
    return cuda.cudart()
