"""Who takes part in a run, and how one failure becomes everyone's end.

`Membership` ties this rank to rank 0; a `FailureLatch` keeps the first failure, which ends all ranks. The names are
looked up when they are first used: the command line answers Ctrl+C before torch is imported.
"""

from typing import TYPE_CHECKING

from lightning_async.on_demand import names_on_demand

if TYPE_CHECKING:
    from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
    from lightning_async.runtime.membership import Membership

__all__ = ["FailureLatch", "Membership", "RunFailure", "WorkerFailedError"]

__getattr__ = names_on_demand(
    __name__,
    {
        "FailureLatch": "lightning_async.runtime.failure",
        "Membership": "lightning_async.runtime.membership",
        "RunFailure": "lightning_async.runtime.failure",
        "WorkerFailedError": "lightning_async.runtime.failure",
    },
)
