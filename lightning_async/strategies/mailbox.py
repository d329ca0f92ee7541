"""What the first rank of a host tells the process that it was forked or spawned from."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["Mailbox"]

log = logging.getLogger(__name__)


class Mailbox:
    """Where the first rank of a host tells the process that has started it what that needs to know.

    It may be killed at any moment, and another one take its place: so there is no lock that it could leave locked, and
    nobody else writes. What is written when the reader is gone is dropped.

    Args:
        context: of multiprocessing, that the ranks are started in.
    """

    def __init__(self, context: Any) -> None:
        self.reader, self._writer = context.Pipe(duplex=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"_writer": self._writer, "reader": None}

    def put(self, value: object) -> None:
        """Tells the address of rank 0, when training begins; why the run has failed; or the fit's result."""
        try:
            self._writer.send(value)
        except BrokenPipeError:
            log.debug("what has started this rank is gone")

    def only_write(self) -> None:
        """Called by each rank: as long as it could read itself, it could not see that the reader is gone."""
        if self.reader is not None:
            self.reader.close()

    def take(self) -> list[Any]:
        """What has come since the last time."""
        values = []
        while self.reader.poll():
            # Also while its sender runs: a result that is larger than a pipe's buffer waits for its reader.
            values.append(self.reader.recv())
        return values

    def close(self) -> None:
        """Reads no more."""
        self.reader.close()
        self._writer.close()
