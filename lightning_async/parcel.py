"""Large values on their way to another process of this host, in memory that has no name.

Used by `holder_process.py` and `holder_main.py`. Knows no Lightning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["open_parcel", "pack", "unpack"]


@contextmanager
def open_parcel() -> Iterator[str]:
    """Memory to `pack` into: its path, for this process and others of this user; gone with the context.

    What was unpacked lives on.

    Examples:
        >>> with open_parcel() as path:
        ...     pack(path, {"weight": torch.ones(2)})
        ...     value = unpack(path)
        >>> value
        {'weight': tensor([1., 1.])}
    """
    descriptor = os.memfd_create("lightning_async", os.MFD_CLOEXEC)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def pack(path: str, value: Any) -> None:
    """Writes a value: whatever pickle takes, with tensors."""
    torch.save(value, path)


def unpack(path: str) -> Any:
    """The value; its tensors are on the host, and map the memory instead of copying it.

    For what comes from this run's own processes only: it is unpickled.
    """
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
