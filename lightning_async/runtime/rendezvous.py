"""How every rank learns where rank 0 listens, and the run's token, which is not said in public."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace

from lightning_async.runtime.handshake import Address
from lightning_async.runtime.key_exchange import KeyExchange, KeyExchangeError

__all__ = ["SECRET_VARIABLE", "share_address"]

SECRET_VARIABLE = "LIGHTNING_ASYNC_SECRET"


def share_address(
    rank: int, address: Address | None, broadcast: Callable[[str], str], gather: Callable[[str], list[str]]
) -> Address:
    """Gives every rank the address of rank 0's listener; a collective call.

    Args:
        rank: this rank.
        address: rank 0's, on rank 0.
        broadcast: gives every rank rank 0's string, for anyone to read.
        gather: gives every rank each rank's string, for anyone to read.

    Raises:
        KeyExchangeError: if this rank cannot open what rank 0 has sealed for it.
    """
    exchange = KeyExchange(os.environ.get(SECRET_VARIABLE, ""))
    public = gather(exchange.public)
    if address is not None:
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
