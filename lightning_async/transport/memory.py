"""Memory that has no name in any folder, and which another process of this host can open."""

from __future__ import annotations

import os
import secrets

__all__ = ["AnonymousMemory", "open_memory"]


class AnonymousMemory:
    """Anonymous memory of this process; it cannot outlive the processes that have it open or mapped.

    Args:
        size_bytes: how much is reserved; it grows as it is written to.

    Attributes:
        descriptor: an open file descriptor, until `close`.

    Raises:
        OSError: if the host has not enough memory left.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self._name = f"lightning_async-{secrets.token_hex(8)}"
        self.descriptor = os.memfd_create(self._name, os.MFD_CLOEXEC)
        try:
            if size_bytes:
                # Without this, a lack of memory would show as a SIGBUS at some write, much later.
                os.posix_fallocate(self.descriptor, 0, size_bytes)
        except OSError:
            self.close()
            raise

    @property
    def address(self) -> str:
        """What `open_memory` takes, in another process of this user, until `close`."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}:{self._name}"

    def close(self) -> None:
        """Closes the way in; who has it open or mapped keeps it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def open_memory(address: str, flags: int = os.O_RDONLY) -> int:
    """Opens another process's memory; returns a file descriptor.

    Args:
        address: from `AnonymousMemory.address`.
        flags: of ``os.open``.

    Raises:
        OSError: if it cannot be opened from here, or was closed: its descriptor may stand for any other file by then,
            a user's data for instance, which must not be taken for it.

    Examples:
        >>> memory = AnonymousMemory(4096)
        >>> os.close(open_memory(memory.address))
        >>> memory.close()
    """
    path, _, name = address.rpartition(":")
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    found = os.readlink(f"/proc/self/fd/{descriptor}")
    if found != f"/memfd:{name} (deleted)":
        os.close(descriptor)
        raise OSError(f"{path}: it was closed, and {found} is there now")
    return descriptor
