"""A name for each attempt of a job that torchrun starts again, so that no rank hears of those that came before.

torchrun's agent keeps one store for a job's whole life, and torch forms the default group of every attempt under the
same keys of it. A rank that reads before its peer has written finds the address of that peer's predecessor, which is
dead: "Gloo connectFullMesh failed ... Connection refused". The count of restarts would not do as a name: each agent
counts its own.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

__all__ = ["agree_on_attempt", "keeps_its_store"]

_ROOM = "lightning_async/attempts"
# Looks and not waits: a wait in the store is a call that no signal interrupts, and torch logs each that times out.
_LOOK_S = 0.02


def keeps_its_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the ranks find each other in a store that outlives them."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that these ranks have in common with each other, and with none that has been in the store before.

    Each rank says hello with a word of its own, and rank 0 answers each hello with a word of its own, the name, which
    the rank confirms. A hello of before is answered, too, but nobody hears that. Who dies on the way is replaced by one
    that says hello anew; so all go on only when rank 0 has seen every last hello confirmed.

    Args:
        store: that they all have come to.
        rank: this rank.
        world_size: number of ranks.
        timeout: for all of them to come.

    Raises:
        TimeoutError: if they do not; names who is missing.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        _answer_all(store, own, range(1, world_size), deadline, timeout)
        return own
    store.set(_hello(rank), own)
    confirmed = b""
    while True:
        answer = _read(store, _answer(own))
        if answer is not None and answer != confirmed:
            confirmed = answer
            store.set(_confirmation(answer, rank), own)
        if answer is not None and store.check([_all_are_here(answer)]):
            return answer.decode()
        _wait_before(deadline, [0], timeout)


def _answer_all(store: dist.Store, own: str, ranks: range, deadline: float, timeout: timedelta) -> None:
    name = own.encode()
    answered: dict[int, bytes] = {}
    while True:
        missing = []
        for rank in ranks:
            hello = _read(store, _hello(rank))
            if hello is not None and answered.get(rank) != hello:
                answered[rank] = hello
                store.set(_answer(hello.decode()), own)
            if hello is None or _read(store, _confirmation(name, rank)) != hello:
                missing.append(rank)
        if not missing:
            store.set(_all_are_here(name), own)
            return
        _wait_before(deadline, missing, timeout)


def _hello(rank: int) -> str:
    return f"{_ROOM}/hello/{rank}"


def _answer(hello: str) -> str:
    return f"{_ROOM}/answer/{hello}"


def _confirmation(name: bytes, rank: int) -> str:
    return f"{_ROOM}/{name.decode()}/{rank}"


def _all_are_here(name: bytes) -> str:
    return f"{_ROOM}/{name.decode()}/all"


def _read(store: dist.Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _wait_before(deadline: float, missing: list[int], timeout: timedelta) -> None:
    if time.monotonic() > deadline:
        named = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
        raise TimeoutError(
            f"{named} not come to torchrun's store within {timeout.total_seconds():g} s. What torchrun prints on the "
            "host of a missing rank says why; the strategy's timeout lets the others wait for longer"
        )
    time.sleep(_LOOK_S)
