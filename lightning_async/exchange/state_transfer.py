"""An optimizer's state on its way from the holder to a rank that has asked for it, over a connection of its own.

It is no collective: any rank asks when it wants to, and the listener's thread for that peer answers. A description
in JSON goes first, then the bytes of the tensors, in its order; nothing that arrives is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from torch import Tensor

from lightning_async.exchange.described_values import bytes_of, describe, rebuild, receive_tensors
from lightning_async.holder.held_state import StateByPlace
from lightning_async.runtime.handshake import STATE, Address, handshake
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError, fit_text
from lightning_async.transport.message import Refuse, Welcome

__all__ = ["fetch_state", "send_state"]

# Room for a million tensors.
_MAX_DESCRIPTION_BYTES = 256 << 20


def send_state(connection: ControlConnection, read: Callable[[], StateByPlace], stall_s: float = 60.0) -> None:
    """Answers a peer who has asked for a state, and closes the connection.

    Args:
        connection: to the peer.
        read: returns a copy of the state, in host memory.
        stall_s: seconds in which the peer takes nothing after which it is lost.

    Raises:
        ChannelClosedError: if the peer is gone.
    """
    tensors: list[Tensor] = []
    try:
        text = json.dumps(describe(dict(read()), tensors)).encode()
    except (TypeError, IndexError) as error:
        reason = f"the optimizer's state has {error} in it, which cannot be sent to another rank; read it on rank 0"
        connection.send(Refuse(reason=fit_text(reason)))
    else:
        connection.settimeout(None)
        connection.survive_cuts(stall_s)
        connection.send_payload(Welcome(offer=str(len(text))), memoryview(text), stall_s)
        for tensor in tensors:
            connection.send_payload(None, bytes_of(tensor.contiguous()), stall_s)
    finally:
        connection.close()


def fetch_state(address: Address, rank: int, optimizer: int) -> StateByPlace:
    """Asks the holder for an optimizer's state.

    Args:
        address: of the holder's listener.
        rank: this rank.
        optimizer: which one.

    Returns:
        What it keeps for each parameter, in host memory.

    Raises:
        HandshakeError: if the holder refuses, with its reason.
        ChannelClosedError: if it cannot be reached, or says nothing for `worker_timeout`.
        WireError: if its answer is none.
    """
    connection, size = handshake(address, rank, STATE, optimizer=optimizer)
    try:
        connection.survive_cuts(address.timeout_s)
        if not 0 < int(size) <= _MAX_DESCRIPTION_BYTES:
            raise WireError(f"the holder describes an optimizer's state in {size} bytes")
        text = bytearray(int(size))
        connection.receive_payload(memoryview(text), address.timeout_s)

        state: StateByPlace = rebuild(json.loads(text), receive_tensors(connection, address.timeout_s))
        return state
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the holder's answer is no optimizer's state: {error!r}") from error
    finally:
        connection.close()
