"""Both sides of a handshake prove that they have the token; what was heard of one is worth nothing in another."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lightning_async.runtime.handshake import (
    CONTROL,
    HEARTBEAT,
    Address,
    HandshakeError,
    Introduction,
    _Newcomer,
    handshake,
)
from lightning_async.transport.codec import encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Challenge, Hello, Proof
from tests.harness import Call

TOKEN = "the token of this run"


def newcomer(token: str = TOKEN, rank: int = 3, role: str = CONTROL) -> _Newcomer:
    return _Newcomer(token, rank, role, incarnation=2)


def challenge(rank_0: Introduction, hello: Hello) -> Challenge:
    answer = rank_0.hear(hello)
    assert isinstance(answer, Challenge)
    return answer


def test_a_rank_of_the_run_is_who_it_says() -> None:
    rank_0, rank = Introduction(TOKEN), newcomer()
    asked = challenge(rank_0, rank.hello)

    peer: Any = rank_0.hear(rank.answer(asked, {"slot": 1}))

    assert (peer.rank, peer.incarnation, peer.slot, rank_0.role) == (3, 2, 1, CONTROL)


def test_the_token_is_in_nothing_that_is_said() -> None:
    rank_0, rank = Introduction(TOKEN), newcomer()
    asked = challenge(rank_0, rank.hello)

    for message in (rank.hello, asked, rank.answer(asked, {})):
        assert TOKEN.encode() not in encode(message)


def test_a_recorded_handshake_is_worth_nothing_the_next_time() -> None:
    heard, rank = Introduction(TOKEN), newcomer()
    proof = rank.answer(challenge(heard, rank.hello), {})
    heard.hear(proof)

    again = Introduction(TOKEN)
    challenge(again, rank.hello)
    with pytest.raises(HandshakeError, match="does not know this run's token"):
        again.hear(proof)


@pytest.mark.parametrize(
    "change",
    [
        lambda proof: proof._replace(text=proof.text.replace('"slot": 0', '"slot": 1')),
        lambda proof: proof._replace(text=proof.text[:64]),
        lambda proof: proof._replace(text="0" * 64 + proof.text[64:]),
    ],
)
def test_nothing_that_a_rank_says_of_itself_can_be_changed_on_the_way(change: Any) -> None:
    rank_0, rank = Introduction(TOKEN), newcomer()
    proof = rank.answer(challenge(rank_0, rank.hello), {"slot": 0})

    with pytest.raises(HandshakeError, match="does not know this run's token"):
        rank_0.hear(change(proof))


def test_nor_can_its_rank_its_incarnation_or_its_role() -> None:
    rank = newcomer()
    for hello in (
        rank.hello._replace(worker=1),
        rank.hello._replace(incarnation=0),
        rank.hello._replace(claims=rank.hello.claims.replace(CONTROL, HEARTBEAT)),
    ):
        rank_0 = Introduction(TOKEN)
        asked = challenge(rank_0, hello)
        with pytest.raises(HandshakeError, match="does not know this run's token"):
            rank.answer(asked, {})


def test_rank_0_cannot_be_answered_with_what_it_has_said_itself() -> None:
    """A stranger asks rank 0 for the proof that it owes to rank 0."""
    rank_0, rank = Introduction(TOKEN), newcomer()
    asked = challenge(rank_0, rank.hello)

    with pytest.raises(HandshakeError, match="does not know this run's token"):
        rank_0.hear(Proof(rank.hello.worker, asked.text[32:]))


def test_a_rank_says_nothing_of_itself_to_what_is_not_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1], TOKEN, 1.0)
        coming = Call(lambda: handshake(address, 1, CONTROL, model="a secret"))
        stranger = ControlConnection(server.accept()[0])
        hello = stranger.receive()
        stranger.send(Challenge(1, "0" * 96))

        error = coming.ended()
        assert isinstance(error, HandshakeError)
        assert f"at 127.0.0.1:{address.port} is not rank 0 of this run" in str(error)
        assert "a secret" not in str(hello)
        stranger.close()


def test_a_rank_that_is_sent_away_unheard_tries_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1], TOKEN, 1.0)
        coming = Call(lambda: handshake(address, 1, CONTROL))
        # As where strangers flood rank 0.
        server.accept()[0].close()
        second = ControlConnection(server.accept()[0])
        assert isinstance(second.receive(), Hello)
        second.send(Challenge(1, "0" * 96))

        assert isinstance(coming.ended(), HandshakeError)
        second.close()
