"""A shard that is reached over the network: its followers, the sequencing holder's connection, and the workers'."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_async.exchange.described_values import bytes_of
from lightning_async.exchange.shared_payload import SharedPayload, unpack
from lightning_async.runtime.failure import FailureLatch, RunFailure, describe_error
from lightning_async.runtime.handshake import Address, HandshakeError, PeerInfo
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.threads import Errands
from lightning_async.shards import operations as told
from lightning_async.shards.follower_host import FollowerHost
from lightning_async.shards.frames import receive_frame, send_frame
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Goodbye, Part, Welcome, kind_of

__all__ = ["ShardServer", "facts_of"]

log = logging.getLogger(__name__)

_ENDS_S = 1.0


def facts_of(spec: told.ShardSpec) -> dict[str, Any]:
    """What is compared between rank 0's spec of a shard and that of the shard's own host, as plain values."""
    elements = spec.elements
    settings = [sorted(set(group) - {"params"}) for group in spec.attributes["param_groups"]]
    kind = f"{spec.kind.__module__}.{spec.kind.__qualname__}"
    policy = f"{type(spec.policy).__module__}.{type(spec.policy).__qualname__}"
    return {
        "shard": spec.shard,
        "elements": [elements.start, elements.stop],
        "numel": spec.numel,
        "places": [*spec.places],
        "settings": [kind, policy, settings, str(spec.parameters.dtype), str(spec.default_dtype)],
    }


class _Port:
    """A worker's connection to this shard, and the memory of its parts.

    Args:
        worker: its rank.
        numel: size of this shard's part.
        dtype: of the flat vector.
        connection: to it; owned from here on.
        stall_s: seconds without a byte of a payload moved after which it is lost.
        on_arrival: told of the number of a push whose part is there.
        on_lost: told why nothing more comes.
    """

    def __init__(
        self,
        worker: int,
        numel: int,
        dtype: torch.dtype,
        connection: ControlConnection,
        stall_s: float,
        on_arrival: Callable[[int], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.gradient = torch.zeros(numel, dtype=dtype)
        self.parameters = torch.zeros(numel, dtype=dtype)
        self._worker = worker
        self._connection = connection
        self._stall_s = stall_s
        self._on_arrival, self._on_lost = on_arrival, on_lost
        self._receiver = threading.Thread(target=self._receive, name=f"parts-of-{worker}", daemon=True)
        # What one worker is slow to take holds up none of the others.
        self._sender = Errands(f"parts-to-{worker}")

    def start(self) -> None:
        """Begins to receive."""
        self._connection.settimeout(None)
        self._connection.survive_cuts(self._stall_s)
        self._sender.start()
        self._receiver.start()

    def announce(self, version: int) -> None:
        """Sends the parameters that were copied for the worker, soon."""
        self._sender.run(lambda: self._send(version))

    def close(self) -> None:
        """Closes the connection."""
        self._connection.shutdown()
        self._sender.close(_ENDS_S)
        self._connection.close()

    def _send(self, version: int) -> None:
        part = Part(self._worker, version, self.parameters.dtype, self.parameters.nbytes)
        try:
            self._connection.send_payload(part, bytes_of(self.parameters), self._stall_s)
        except ChannelClosedError as error:
            self._on_lost(str(error))

    def _receive(self) -> None:
        try:
            while not isinstance(message := self._connection.receive(), Goodbye):
                expected = (self._worker, self.gradient.dtype, self.gradient.nbytes)
                if not isinstance(message, Part) or (message.worker, message.dtype, message.payload_bytes) != expected:
                    raise WireError(f"it sends {kind_of(message).name} where its part of a gradient is due")
                self._connection.receive_payload(bytes_of(self.gradient), self._stall_s)
                self._on_arrival(message.number)
        except (ChannelClosedError, WireError) as error:
            self._on_lost(str(error))
        except Exception as error:
            self._on_lost(describe_error(error))


class ShardServer:
    """Serves one shard.

    What is to be held comes from two sides. Code (the optimizer's class, the staleness policy) comes from the process
    that has started this one, on the same host; numbers come from rank 0, so that they are the same in all shards.

    Args:
        shard: its number.
        rank: the rank that has started this process, whose failure an error here is.
        latch: the latch of this process.
    """

    def __init__(self, shard: int, rank: int, latch: FailureLatch) -> None:
        self._name = f"its process for shard {shard} of the holder"
        self._rank = rank
        self._latch = latch
        self._host = FollowerHost(latch)
        self._listener: Listener | None = None
        self._stall_s = 60.0
        self._changed = threading.Condition()
        self._offered: dict[int, told.ShardSpec] = {}
        self._serving: dict[int, told.ShardSpec] = {}
        self._ports: dict[tuple[int, int], _Port] = {}
        self._sequencer: ControlConnection | None = None
        self._sending = threading.Lock()
        self._over = threading.Event()
        latch.subscribe(lambda failure: self._wake())

    def listen(self, host: str, workers: int, timeout_s: float, token: str) -> Address:
        """Lets rank 0 and the workers in.

        Args:
            host: the address that they reach this host at.
            workers: number of ranks.
            timeout_s: `worker_timeout`.
            token: the run's.

        Raises:
            OSError: if there is no port to listen at.
        """
        listener = self._listener = Listener(host, workers, None, timeout_s, token)
        self._stall_s = timeout_s
        listener.admits_rank_0 = True
        listener.on_sequencer = self._take_sequencer
        listener.on_control = self._take_worker
        return listener.address

    def offer(self, number: int, spec: told.ShardSpec) -> None:
        """Says what the follower of this number is to hold, as this host has made it."""
        with self._changed:
            self._offered[number] = spec
            self._changed.notify_all()

    def wait_until_over(self) -> None:
        """Returns when rank 0 has said that it needs this shard no more, or is gone; at once if it never came."""
        if self._sequencer is not None:
            self._over.wait()

    def close(self) -> None:
        """Lets nobody in any more and closes all connections."""
        if self._listener is not None:
            self._listener.close()
        for port in [*self._ports.values()]:
            port.close()
        if self._sequencer is not None:
            self._sequencer.shutdown()
            with self._sending:
                self._sequencer.close()

    # --- rank 0 ------------------------------------------------------------------------------------------------------

    def _take_sequencer(self, peer: PeerInfo, connection: ControlConnection) -> None:
        if peer.rank != 0 or self._sequencer is not None:
            raise HandshakeError("a shard of the holder follows rank 0, once")
        connection.send(Welcome(peer.rank))
        connection.settimeout(None)
        connection.survive_cuts(self._stall_s)
        self._sequencer = connection
        threading.Thread(target=self._follow, args=(connection,), name="follower", daemon=True).start()

    def _follow(self, connection: ControlConnection) -> None:
        try:
            while (frame := receive_frame(connection, self._stall_s)) is not None:
                number, place, operation, facts = frame
                try:
                    answer = self._do(number, place, operation, facts)
                except Exception as error:
                    self._say(["done", number, place, describe_error(error), None])
                else:
                    if facts is not None or told.is_reported(operation):
                        self._say(["done", number, place, None, answer])
        except ChannelClosedError as error:
            log.debug("rank 0 is gone: %s", error)
        except Exception as error:
            self._latch.trip(RunFailure(self._rank, f"{self._name} failed: {describe_error(error)}"))
        finally:
            self._over.set()

    def _do(self, number: int, place: int, operation: Any, facts: Any) -> Any:
        if facts is not None:
            self._serve(number, facts)
            return None
        if isinstance(operation, (told.LoadParameters, told.LoadStates, told.Restore)):
            # A value in the place of a shared payload's address.
            with SharedPayload(operation.payload) as payload:
                self._host.do(number, place, operation._replace(payload=payload.address))
            return None
        address = self._host.do(number, place, operation)
        if isinstance(operation, told.CopyOut):
            self._ports[number, operation.worker].announce(operation.version)
        if address is None:
            return None
        answer = unpack(address)
        self._host.do(number, place, told.Forget(place))
        return answer

    def _serve(self, number: int, facts: dict[str, Any]) -> None:
        with self._changed:
            # The rank that offers it builds its part of the exchange at the same time as rank 0. If it fails, so does
            # the run, and this process ends with it.
            self._changed.wait_for(lambda: number in self._offered or self._latch.failure is not None)
            self._latch.check()
            spec = self._offered.pop(number)
        for name, mine in facts_of(spec).items():
            if mine != facts[name]:
                raise ValueError(
                    f"rank {self._rank}, on its host, has {name} {mine}, and rank 0 has {facts[name]}; every rank must "
                    "build the same model, optimizer and strategy"
                )
        numbers = {name: facts[name] for name in told.NUMBERS}
        spec = replace(spec, **numbers)
        self._host.serve(number, spec, lambda attach, spec: self._find_memory(number, attach))
        self._serving[number] = spec

    def _find_memory(self, number: int, attach: told.Attach) -> tuple[Tensor, Tensor]:
        for key in [key for key in self._ports if key[0] < number]:
            self._ports.pop(key).close()
        port = self._ports.get((number, attach.worker))
        if port is None:
            raise LookupError(f"rank {attach.worker} has not come to this shard")
        return port.gradient, port.parameters

    def _say(self, news: list[Any]) -> None:
        connection = self._sequencer
        assert connection is not None
        try:
            with self._sending:
                send_frame(connection, news, self._stall_s)
        except ChannelClosedError as error:
            log.debug("rank 0 is gone: %s", error)
        except TypeError as error:
            # Of an optimizer's state, say.
            with self._sending:
                reason = f"what it holds has {error} in it, which cannot be sent to another host"
                send_frame(connection, [*news[:3], reason, None], self._stall_s)

    # --- workers -----------------------------------------------------------------------------------------------------

    def _take_worker(self, peer: PeerInfo, connection: ControlConnection) -> None:
        number, worker = peer.claims.get("follower"), peer.rank
        spec = self._serving.get(number) if isinstance(number, int) else None
        if spec is None or not isinstance(number, int):
            raise HandshakeError("this shard of the holder does not serve yet")
        port = _Port(
            worker,
            spec.parameters.numel(),
            spec.parameters.dtype,
            connection,
            self._stall_s,
            lambda push: self._say(["part", number, worker, push]),
            lambda reason: self._say(["lost", number, worker, reason]),
        )
        with self._changed:
            if (number, worker) in self._ports:
                raise HandshakeError(f"rank {worker} is here already")
            self._ports[number, worker] = port
        connection.send(Welcome(worker))
        port.start()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._over.set()
