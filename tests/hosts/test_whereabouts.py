"""Where the ranks are decides on rank 0's address, whatever the Trainer was told of nodes."""

from __future__ import annotations

import pytest

from lightning_async.runtime.membership import Membership
from tests.harness import Call
from tests.hosts.network import two_hosts
from tests.unit.runtime.test_key_exchange import Rendezvous

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(("hosts", "address"), [("aabb", "10.77.0.1"), ("ab", "10.77.0.1"), ("aa", "127.0.0.1")])
def test_rank_0_is_reached_by_its_hosts_address_if_a_rank_is_elsewhere(hosts: str, address: str) -> None:
    meeting = Rendezvous(len(hosts))
    members = [Membership(rank, 30.0, exit_process=lambda code: None) for rank in range(len(hosts))]

    def meet(member: Membership) -> None:
        member.meet(len(hosts), "10.77.0.1", *meeting.collectives(member.rank))

    with two_hosts() as link:

        def start(rank: int) -> Call:
            host = link.a if hosts[rank] == "a" else link.b
            return host.run(lambda: Call(lambda: meet(members[rank])))

        errors = [call.ended() for call in [start(rank) for rank in range(len(hosts))]]
        found = {member.address and member.address.host for member in members}
        for member in members:
            member._leave()

    assert errors == [None] * len(hosts)
    assert found == {address}
