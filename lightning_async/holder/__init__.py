"""The holder: the master parameters, the optimizers' states and the version, on rank 0.

A `Push` goes in and an `Update` says what became of it, as the staleness barrier decides.
"""

from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.holder import Holder
from lightning_async.holder.types import Push, Snapshot, Update

__all__ = ["AMSGrad", "Holder", "Push", "Snapshot", "Update"]
