"""Who takes part in a run, and how one failure becomes everyone's end.

`Membership` ties this rank to rank 0; a `FailureLatch` keeps the first failure, which ends all ranks.
"""

from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.membership import Membership

__all__ = ["FailureLatch", "Membership", "RunFailure", "WorkerFailedError"]
