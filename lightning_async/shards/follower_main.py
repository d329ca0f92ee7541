"""What runs in a follower's own process.

Started by `process.py`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from multiprocessing.connection import Connection

import torch

from lightning_async.exchange.child_process import READY
from lightning_async.runtime.failure import FailureLatch, describe_error
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.shards.follower import unpack_spec
from lightning_async.shards.follower_host import FollowerHost
from lightning_async.shards.operations import Serve, is_reported
from lightning_async.transport.connection import ControlConnection

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(control: int, heartbeat: int) -> None:
    """Follows until rank 0 says that it is over, or is gone.

    Args:
        control: descriptor of the connection that operations come by.
        heartbeat: descriptor of the heartbeat's socket.
    """
    torch.set_num_threads(1)
    connection = Connection(control)
    latch = FailureLatch()
    host = FollowerHost(latch)
    heartbeats: Heartbeats | None = None
    try:
        connection.send(READY)
        while (message := connection.recv()) is not None:
            number, place, operation = message
            if operation is None:
                heartbeats = Heartbeats(0, latch, place, lambda rank: "its process is gone")
                heartbeats.add(0, ControlConnection(socket.socket(fileno=heartbeat)))
                continue
            try:
                answer = None
                if isinstance(operation, Serve):
                    host.serve(number, unpack_spec(operation.payload))
                else:
                    answer = host.do(number, place, operation)
            except Exception as error:
                connection.send((number, place, describe_error(error), None))
            else:
                if is_reported(operation):
                    connection.send((number, place, None, answer))
    except (EOFError, OSError) as error:
        log.debug("rank 0 is gone: %s", error)
    sys.stderr.flush()
    # A heartbeat's thread may be in the middle of something.
    os._exit(0)
