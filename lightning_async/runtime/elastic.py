"""What torchrun is told of a failure, so that the "Root Cause" in its report is the rank that failed.

torchrun reads a file of each rank that has ended with an error (``TORCHELASTIC_ERROR_FILE``), and takes the rank with
the earliest time for the cause; a rank without a file has failed at the time that it was seen to end. So the rank at
fault writes its error, and the others whose error they end with: on a host where the rank at fault is not, the report
shows one of these.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from pathlib import Path

from lightning_async.runtime.failure import RunFailure

__all__ = ["forget_failure", "is_supervised", "record_failure"]

log = logging.getLogger(__name__)

_VARIABLE = "TORCHELASTIC_ERROR_FILE"
# What this process has written, so that neither a second failure nor a user's own file is lost.
_written: set[str] = set()


def is_supervised() -> bool:
    """Whether torchrun has started this process, and reports its failure."""
    return bool(os.environ.get(_VARIABLE))


def record_failure(rank: int, failure: RunFailure, error: BaseException | None = None) -> None:
    """Leaves for torchrun why this rank ends; the first call of a run counts.

    Args:
        rank: this rank.
        failure: of the run.
        error: what this rank raises, if it is the one at fault.
    """
    path = os.environ.get(_VARIABLE)
    if not path or path in _written:
        return
    if error is not None and failure.rank == rank:
        message = failure.reason
        told = "".join(traceback.format_exception(error))
    else:
        message = str(failure)
        told = f"{failure}\nThis is rank {rank}, which has ended because of that."
    extra = {"py_callstack": told, "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        _written.add(path)
    except OSError as problem:
        log.debug("torchrun cannot be told: %s", problem)


def forget_failure() -> None:
    """Takes back what was left for torchrun: the process goes on, with another run."""
    while _written:
        Path(_written.pop()).unlink(missing_ok=True)
