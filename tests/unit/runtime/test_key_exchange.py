"""The run's token reaches every rank, and nobody who only listens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from lightning_async.runtime import rendezvous
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.key_exchange import KeyExchange, KeyExchangeError
from lightning_async.runtime.rendezvous import SECRET_VARIABLE, share_address
from tests.harness import Call

TOKEN = "0123456789abcdef0123456789abcdef"


class Rendezvous:
    """Two collective calls of some ranks, each in a thread of its own; ``heard`` is what anyone could read."""

    def __init__(self, ranks: int) -> None:
        self.heard: list[str] = []
        self._ranks = ranks
        self._said: dict[int, str] = {}
        self._meeting = threading.Barrier(ranks)

    def collectives(self, rank: int) -> tuple[Callable[[str], str], Callable[[str], list[str]]]:
        def gather(mine: str) -> list[str]:
            self._said[rank] = mine
            self.heard.append(mine)
            self._meeting.wait(10)
            everyone = [self._said[each] for each in range(self._ranks)]
            self._meeting.wait(10)
            return everyone

        return lambda mine: gather(mine)[0], gather


def share(ranks: int) -> tuple[list[Any], list[str]]:
    meeting = Rendezvous(ranks)

    def take_part(rank: int) -> Address:
        return share_address(rank, "node0", lambda host: Address(host, 29500, TOKEN, 7.0), *meeting.collectives(rank))

    calls = [Call(lambda rank=rank: take_part(rank)) for rank in range(ranks)]  # type: ignore[misc]
    return [call.ended() or call.result for call in calls], meeting.heard


def test_every_rank_learns_the_token_and_it_is_never_said() -> None:
    addresses, heard = share(4)

    assert addresses == [Address("127.0.0.1", 29500, TOKEN, 7.0)] * 4
    assert not any(TOKEN in text for text in heard)


def test_where_the_ranks_are_decides_on_the_address_and_not_what_was_said_of_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "network_identity", lambda: threading.current_thread().name)

    assert {address.host for address in share(2)[0]} == {"node0"}


def test_with_a_secret_on_every_host_it_works_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "of this cluster")

    assert [address.token for address in share(2)[0]] == [TOKEN] * 2


def test_who_does_not_know_the_secret_cannot_open_the_token() -> None:
    """Also one who has taken the place of a rank at the rendezvous."""
    rank_0, stranger = KeyExchange("of this cluster"), KeyExchange("")
    sealed = rank_0.seal(TOKEN, stranger.public)

    with pytest.raises(KeyExchangeError, match="does not open"):
        stranger.open(sealed, rank_0.public)


def test_what_was_sealed_for_one_rank_opens_for_no_other() -> None:
    rank_0, one, other = KeyExchange(), KeyExchange(), KeyExchange()

    with pytest.raises(KeyExchangeError, match="does not open"):
        other.open(rank_0.seal(TOKEN, one.public), rank_0.public)


@pytest.mark.parametrize("public", ["", "no number", "0", "1", f"{-2:x}", "f" * 513])
def test_numbers_that_would_make_a_key_anyone_can_guess_are_refused(public: str) -> None:
    with pytest.raises(KeyExchangeError, match="no public number"):
        KeyExchange().seal(TOKEN, public)


@pytest.mark.parametrize("sealed", ["", "zz", "00" * 16, "00" * 48])
def test_what_was_not_sealed_does_not_open(sealed: str) -> None:
    with pytest.raises(KeyExchangeError, match="does not open"):
        KeyExchange().open(sealed, KeyExchange().public)
