"""How messages and tensors travel between a worker and the holder.

A `Channel` is one side of an exchange; which of its kinds two sides have is agreed on in `exchange`.
"""

from lightning_async.transport.base import Buffers, Channel, ChannelClosedError

__all__ = ["Buffers", "Channel", "ChannelClosedError"]
