"""Shards on hosts of a network: ranks find them there, and each host carries what the rule says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.network import Link
from lightning_async.shards.traffic import busiest_share
from tests.harness import Call
from tests.hosts.network import two_hosts
from tests.unit.shards.rig import parameters_of
from tests.unit.shards.spread_rig import Spread, gradients_of

pytestmark = pytest.mark.timeout(120)

SHAPES = [(500, 300), (300,), (49_700,)]
STEPS = 4


def train(spread: Spread, rank: int) -> None:
    worker = spread.engines[rank].worker
    worker.pull()
    for step in range(STEPS):
        spread.compute(rank, step)
        worker.step(0)
    worker.finish_segment()


def trained(link: Link, shards: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Parameters after a rank on each host has trained, and bytes that rank 0's host has sent and received for it."""
    hosts = (link.a, link.b)
    options = {"max_staleness": 0, "gradients_per_update": 2}
    spread = Spread(shards, 2, lambda rank, call: hosts[rank].run(call), Link.ADDRESS, SHAPES, **options)
    spread.join(1)
    before = link.carried_bytes()
    other = Call(lambda: train(spread, 1))
    train(spread, 0)
    other.outcome()
    after = link.carried_bytes()
    parameters = spread.service.snapshot().parameters
    spread.close()
    return parameters, (after[0] - before[0], after[1] - before[1])


def test_ranks_and_shards_of_two_hosts_find_each_other_and_share_the_load() -> None:
    with two_hosts() as link:
        values, (sent, received) = trained(link, shards=2)

    expected = parameters_of(SHAPES)
    optimizer = torch.optim.Adam(expected, lr=0.05, amsgrad=True, weight_decay=0.01, fused=True)
    for step in range(STEPS):
        for place, parameter in enumerate(expected):
            parameter.grad = (gradients_of(0, step, SHAPES)[place] + gradients_of(1, step, SHAPES)[place]) / 2
        optimizer.step()
    assert torch.equal(values, torch.cat([parameter.detach().reshape(-1) for parameter in expected]))
    # Two gradients a step, and the first parameters.
    gradient_bytes = 4 * values.numel()
    each = busiest_share(2, [1, 1]) * gradient_bytes * 2
    assert received == pytest.approx(STEPS * each + gradient_bytes / 2, rel=0.2)
    assert sent == pytest.approx(STEPS * each + gradient_bytes / 2, rel=0.2)
