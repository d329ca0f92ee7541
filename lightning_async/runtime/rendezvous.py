"""How every rank learns where rank 0 listens, and the run's token, which is not said in public."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightning_async.runtime.handshake import Address
from lightning_async.runtime.key_exchange import KeyExchange, KeyExchangeError

__all__ = ["LOOPBACK", "SECRET_VARIABLE", "network_identity", "share_address"]

SECRET_VARIABLE = "LIGHTNING_ASYNC_SECRET"
LOOPBACK = "127.0.0.1"


def share_address(
    rank: int,
    main_address: str,
    listen: Callable[[str], Address],
    broadcast: Callable[[str], str],
    gather: Callable[[str], list[str]],
) -> Address:
    """Gives every rank the address of rank 0's listener; a collective call.

    Where the ranks are decides on it, and not what the trainer was told of nodes.

    Args:
        rank: this rank.
        main_address: what the ranks of other hosts reach rank 0's by.
        listen: opens rank 0's listener, at a host's name or address.
        broadcast: gives every rank rank 0's string, for anyone to read.
        gather: gives every rank each rank's string, for anyone to read.

    Raises:
        KeyExchangeError: if this rank cannot open what rank 0 has sealed for it.
    """
    exchange = KeyExchange(os.environ.get(SECRET_VARIABLE, ""))
    everyone = [json.loads(told) for told in gather(json.dumps([exchange.public, network_identity()]))]
    public = [key for key, _ in everyone]
    if rank == 0:
        address = listen(LOOPBACK if len({network for _, network in everyone}) == 1 else main_address)
        sealed = ["", *(exchange.seal(address.token, theirs) for theirs in public[1:])]
        broadcast(json.dumps([address.without_token().as_json(), sealed]))
        return address
    told, sealed = json.loads(broadcast(""))
    try:
        token = exchange.open(sealed[rank], public[0])
    except KeyExchangeError as error:
        raise KeyExchangeError(
            f"rank {rank} cannot take the run's token: {error}. {SECRET_VARIABLE} must be the same on every host, "
            "or be set on none"
        ) from None
    return replace(Address.from_json(told), token=token)


def network_identity() -> str:
    """What two processes have in common if the loopback address leads from one to the other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/thread-self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()
