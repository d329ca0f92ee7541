"""A staleness policy is one class, one name and one entry; the barrier does the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

import pytest

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import POLICIES, BarrierPolicy, Decision, OnStale, Reader


def test_every_name_that_the_strategy_takes_has_a_policy() -> None:
    assert set(get_args(OnStale)) == set(POLICIES)
    with pytest.raises(ValueError, match="on_stale must be one of 'wait', 'drop', not 'hope'"):
        ExchangeOptions(on_stale="hope")  # type: ignore[arg-type]


class OneAfterTheOther(BarrierPolicy):
    """Lets one worker read at a time, whatever the bound."""

    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader], filled: int = 0) -> bool:
        return not reads

    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int, filled: int = 0) -> Decision:
        return Decision.APPLY


def test_the_barrier_goes_by_a_policy_that_it_has_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "one", OneAfterTheOther)
    barrier = StalenessBarrier(None, "one")  # type: ignore[arg-type]
    for worker in (0, 1):
        barrier.ask(worker)

    barrier.read(1)

    assert not barrier.may_read(0)
    assert barrier.decision(1) is Decision.APPLY
    barrier.apply(1)
    assert barrier.may_read(0)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_policy_takes_no_bound_below_zero(policy: type[BarrierPolicy]) -> None:
    with pytest.raises(ValueError, match="-1"):
        policy(-1)
