"""Large values on their way to another process of this host, in anonymous memory.

Who sends a value writes it into memory of its own; the other process only ever reads.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from typing_extensions import Self

from lightning_async.transport.memory import AnonymousMemory, open_memory

__all__ = ["SharedPayload", "unpack"]


class SharedPayload:
    """A value that another process may `unpack`, until this is closed; a context that closes it.

    Args:
        value: whatever pickle takes, with tensors.

    Raises:
        pickle.PicklingError: if pickle does not take it; also AttributeError and TypeError.

    Examples:
        >>> with SharedPayload({"weight": torch.ones(2)}) as shared_payload:
        ...     value = unpack(shared_payload.address)
        >>> value
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, value: Any) -> None:
        self._memory = AnonymousMemory()
        try:
            torch.save(value, f"/proc/self/fd/{self._memory.descriptor}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """What `unpack` takes."""
        return self._memory.address

    def close(self) -> None:
        """Lets go of it; what was unpacked lives on."""
        self._memory.close()


def unpack(address: str) -> Any:
    """The value of a shared payload; its tensors are on the host, and map the memory instead of copying it.

    For what comes from this run's own processes only: it is unpickled.

    Raises:
        OSError: if the shared payload was closed.
    """
    descriptor = open_memory(address)
    try:
        return torch.load(f"/proc/self/fd/{descriptor}", map_location="cpu", mmap=True, weights_only=False)
    finally:
        os.close(descriptor)
