"""What becomes of a run whose hosts lose a rank or each other: the table of docs/faults.md.

Each test prints its row: ``pytest -m soak -s tests/hosts/test_cut_off.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.injector import Fault
from tests.faults.runs import explanations
from tests.faults.train import Run
from tests.hosts.forks import TwoHosts
from tests.hosts.network import Link, two_hosts

pytestmark = [pytest.mark.soak, pytest.mark.timeout(240)]

WORKER_TIMEOUT_S = 20.0
# From the loss of sight to the end of every process: ranks in a collective are given some seconds to come out of it.
END_S = WORKER_TIMEOUT_S + 40.0
POLICIES = ("stop", "continue")


@pytest.fixture
def link() -> Iterator[Link]:
    with two_hosts() as link:
        yield link


@pytest.fixture
def runs() -> Iterator[list[TwoHosts]]:
    runs: list[TwoHosts] = []
    yield runs
    for run in runs:
        run.close()


def start(runs: list[TwoHosts], link: Link, folder: Path, policy: str, faults: tuple[Fault, ...] = ()) -> TwoHosts:
    """Two ranks on each host, which have trained for a moment."""
    strategy = {"on_worker_failure": policy, "worker_timeout": WORKER_TIMEOUT_S}
    run = TwoHosts(link, Run(faults, ranks=2, strategy=strategy, sleep_s=(0.02,) * 4), folder)
    runs.append(run)
    run.wait_for_progress(60.0)
    return run


def row(run: TwoHosts, since_s: float, policy: str, what: str) -> None:
    """Prints what was seen, and when."""
    for host in "ab":
        said = [line for line in run.lines if line.host == host and line.at_s >= since_s and "rank " in line.text]
        told = [f"{line.at_s - since_s:.1f} s: {line.text}" for line in said if not line.text.startswith("epoch")]
        ended = (
            f"ended with {run.status[host]} at {run.ended_at_s[host] - since_s:.1f} s"
            if host in run.status
            else "goes on"
        )
        print(f"\n{policy}, {what}, host {host}: {ended}", *told, sep="\n    ")


def assert_goes_on(run: TwoHosts, ranks: int) -> None:
    """Training goes on with as many ranks, and ends well when asked to."""
    run.wait_for_progress()
    assert f"of {ranks} ranks" in [line.text for line in run.lines if line.text.startswith("epoch ")][-1]
    run.stop()
    run.wait_for(lambda: "a" in run.status, 30.0)
    assert run.status["a"] == 0, run.output("a")


def assert_ended(run: TwoHosts, host: str, at_fault: set[str]) -> None:
    """A host has ended, and all that it says names a rank that is really at fault."""
    run.wait_for(lambda: host in run.status, END_S)
    assert run.status[host] == 1, run.output(host)
    said = explanations(run.output(host))
    assert said, run.output(host)
    assert {line.split(" failed")[0] for line in said} <= at_fault, run.output(host)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_is_killed(link: Link, runs: list[TwoHosts], tmp_path: Path, policy: str) -> None:
    run = start(runs, link, tmp_path, policy, (Fault(3, 60, "kill"),))
    struck = run.wait_for(lambda: run.first("rank 3", "b"), 60.0).at_s

    if policy == "stop":
        assert_ended(run, "a", {"rank 3"})
        assert_ended(run, "b", {"rank 3"})
    else:
        # Its own host starts it again.
        assert run.wait_for(lambda: run.first("rank 3 is lost: its process is gone", "a"), 30.0)
        assert run.wait_for(lambda: run.first("rank 3 has joined; 4 ranks train", "a"), 60.0)
        assert run.first("rank 3 is lost: its process was killed by SIGKILL; it is started again (1 of 3)", "b")
        assert_goes_on(run, ranks=4)
        assert run.wait_for(lambda: "b" in run.status, 30.0)
        assert run.status["b"] == 0, run.output("b")
    row(run, struck, policy, "a worker is killed")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_cut_of_two_seconds_is_survived(
    link: Link, runs: list[TwoHosts], tmp_path: Path, policy: str, host: str
) -> None:
    run = start(runs, link, tmp_path, policy)
    cut = time.monotonic()

    link.cut(host)
    time.sleep(2.0)
    link.mend(host)

    run.wait_for_progress()
    row(run, cut, policy, f"host {host} is cut off for 2 s; the next two epochs end at {time.monotonic() - cut:.1f} s")
    assert_goes_on(run, ranks=4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("cut_s", [60.0, None], ids=["60s", "for_ever"])
def test_a_host_that_is_cut_off_for_longer_is_lost(
    link: Link, runs: list[TwoHosts], tmp_path: Path, policy: str, host: str, cut_s: float | None
) -> None:
    """With two hosts it is for the switch to say which of them is cut off; rank 0 is on host a."""
    run = start(runs, link, tmp_path, policy)
    cut = time.monotonic()

    link.cut(host)
    if cut_s is not None:
        time.sleep(cut_s)
        link.mend(host)

    assert_ended(run, "b", {"rank 0"})
    if policy == "stop":
        assert_ended(run, "a", {"rank 2", "rank 3"})
    else:
        run.wait_for(lambda: run.first("2 ranks go on without it", "a"), END_S)
        assert_goes_on(run, ranks=2)
    row(run, cut, policy, f"host {host} is cut off {'for ever' if cut_s is None else f'for {cut_s:g} s'}")


@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("late_s", [0.0, 13.0], ids=["at_once", "after_its_connection_has_ended"])
def test_a_host_that_is_back_soon_after_it_was_lost_takes_part_again(
    link: Link, runs: list[TwoHosts], tmp_path: Path, host: str, late_s: float
) -> None:
    run = start(runs, link, tmp_path, "continue")
    cut = time.monotonic()

    link.cut(host)
    run.wait_for(lambda: run.first("rank 0 cannot be reached", "b"), END_S)
    time.sleep(late_s)
    link.mend(host)

    run.wait_for(lambda: run.first("4 ranks train", "a", after_s=cut), END_S)
    assert_goes_on(run, ranks=4)
    run.wait_for(lambda: "b" in run.status, 30.0)
    row(run, cut, "continue", f"host {host} is cut off until its ranks have ended")
    assert run.status["b"] == 0, run.output("b")
