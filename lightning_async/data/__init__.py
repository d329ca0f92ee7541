"""Which batches an epoch has, which rank may compute them, and which are done.

No Lightning and no I/O but the loaders' own.
"""

from lightning_async.data.epoch_plan import EpochPlan
from lightning_async.data.ledger import Ledger
from lightning_async.data.orders import BatchSource
from lightning_async.data.shared_loader import SharedLoader, share_loader

__all__ = ["BatchSource", "EpochPlan", "Ledger", "SharedLoader", "share_loader"]
