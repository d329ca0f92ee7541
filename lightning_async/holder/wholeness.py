"""Whether what is held is of one version, or was left in the middle of an update."""

from __future__ import annotations

from types import TracebackType

from lightning_async.holder.types import HalfUpdatedError
from lightning_async.runtime.failure import describe_error

__all__ = ["Wholeness"]


class Wholeness:
    """Is entered for each update, under the holder's lock, and refuses what comes while one is not completed.

    Examples:
        >>> whole = Wholeness()
        >>> with whole:
        ...     pass
        >>> whole.check()
    """

    def __init__(self) -> None:
        self._is_changing = False
        self._broken_by = ""

    def __enter__(self) -> None:
        self._is_changing = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._is_changing = False
        elif isinstance(error, Exception):
            self._broken_by = describe_error(error)

    def check(self) -> None:
        """Refuses to go on from what is half updated: this thread's own update was interrupted, or one was broken off.

        Raises:
            HalfUpdatedError: if it was; with the error that has broken it off, which its own thread may yet have to
                tell of.
        """
        if self._broken_by:
            raise HalfUpdatedError(
                f"parameters and optimizer states are half updated: an update was broken off by {self._broken_by}"
            )
        if self._is_changing:
            raise HalfUpdatedError(
                "parameters and optimizer states are half updated: a signal's handler, or an error, came in the middle "
                "of an update. Let the handler set trainer.should_stop = True in place of an exit"
            )
