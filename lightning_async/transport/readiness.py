"""A reader's word that it is ready for a payload, where it may be long in coming."""

from __future__ import annotations

from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Ack, kind_of

__all__ = ["say_ready", "wait_until_ready"]


def say_ready(control: ControlConnection) -> None:
    """Tells the sender that the receive of its payload is about to be posted.

    Raises:
        ChannelClosedError: if the sender is gone.
    """
    control.send(Ack())


def wait_until_ready(control: ControlConnection) -> None:
    """Waits for `say_ready`, for as long as it takes: on the control connection, where the reader's end is noticed.

    Raises:
        ChannelClosedError: if the reader is gone.
        WireError: if it says something else.
    """
    answer = control.receive()
    if not isinstance(answer, Ack):
        raise WireError(f"it sends {kind_of(answer).name} where it is to take a payload")
