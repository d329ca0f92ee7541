"""What runs in the process of a shard that is reached over the network.

Started by `shard_process.py`, on any host.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from lightning_async.exchange.child_process import READY
from lightning_async.runtime.failure import FailureLatch, describe_error
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.shards.follower import unpack_spec
from lightning_async.shards.shard_server import ShardServer
from lightning_async.transport.connection import ControlConnection

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(control: int, heartbeat: int) -> None:
    """Serves until rank 0 says that it is over, or this process's starter is gone.

    Args:
        control: descriptor of the connection to the process that has started this one.
        heartbeat: descriptor of the heartbeat's socket.
    """
    torch.set_num_threads(1)
    connection = Connection(control)
    latch = FailureLatch()
    heartbeats: Heartbeats | None = None
    server: ShardServer | None = None
    try:
        connection.send(READY)
        while (message := connection.recv()) is not None:
            what, *more = message
            if what == "watch":
                rank, shard, timeout_s = more
                heartbeats = Heartbeats(rank, latch, timeout_s, lambda rank: "its process is gone")
                heartbeats.add(rank, ControlConnection(socket.socket(fileno=heartbeat)))
                server = ShardServer(shard, rank, latch)
                continue
            assert server is not None
            try:
                answer = _answer(server, what, more)
            except Exception as error:
                connection.send((describe_error(error), None))
            else:
                connection.send((None, answer))
        if server is not None:
            server.wait_until_over()
            server.close()
    except (EOFError, OSError) as error:
        log.debug("what has started this process is gone: %s", error)
    if heartbeats is not None:
        heartbeats.close()
    sys.stderr.flush()
    # A thread may be in the middle of something.
    os._exit(0)


def _answer(server: ShardServer, what: str, more: list[Any]) -> str | None:
    if what == "listen":
        return server.listen(*more).without_token().as_json()
    number, payload = more
    server.offer(number, unpack_spec(payload))
    return None
