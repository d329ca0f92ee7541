"""How launchers end and judge the processes that they have started."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.runtime.handshake import Address
from lightning_async.runtime.launcher_connection import Lost
from lightning_async.runtime.roster import Resilience
from lightning_async.strategies import launching, script_launcher
from lightning_async.strategies import supervisor as ranks
from lightning_async.strategies.launch_errors import refuse_rank_without_device
from lightning_async.strategies.mailbox import Mailbox
from lightning_async.strategies.process_launcher import ProcessLauncher
from lightning_async.strategies.script_launcher import ScriptLauncher
from tests.harness import RankZero, eventually

pytestmark = pytest.mark.timeout(30)


GUARD: Any = SimpleNamespace(goes_on=True, is_out=False)


@pytest.fixture
def script() -> Iterator[Any]:
    """A script launcher without a strategy; its children are the test's."""
    strategy: Any = SimpleNamespace(node_rank=0, num_processes=3, num_nodes=1, cluster_environment=object())
    launcher: Any = ScriptLauncher(strategy, GUARD)
    launcher.procs = []
    yield launcher
    for process in launcher.procs:
        process.kill()
        process.wait()


def child(command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", f"exec {command}"])


def test_children_that_end_in_time_are_left_to_it(script: Any) -> None:
    script.procs = [child("sleep 0.3"), child("true")]

    script.end_children(3600.0)

    assert [process.returncode for process in script.procs] == [0, 0]


def test_a_stopped_child_is_killed(script: Any) -> None:
    script.procs = [child("sleep 60")]
    os.kill(script.procs[0].pid, signal.SIGSTOP)

    script.end_children(0.2)

    assert script.procs[0].returncode == -signal.SIGKILL


def test_a_process_that_must_end_at_once_takes_its_children_with_it(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_launcher, "_EXIT_STATUS_TIMEOUT_S", 0.1)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    script.procs = [child("sleep 60")]

    script.exit_process(1)

    assert codes == [1]
    assert script.procs[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize(("first_of_its_host", "told"), [(True, ["a failure"]), (False, [])])
def test_the_first_rank_of_a_host_says_why_it_must_end(
    first_of_its_host: bool, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its main thread is stuck in a collective, and what has started it sees a status only."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    mailbox = Mailbox(multiprocessing.get_context("fork"))
    launcher: Any = ProcessLauncher.__new__(ProcessLauncher)
    launcher._guard, launcher._told = SimpleNamespace(failure="a failure"), mailbox if first_of_its_host else None

    launcher.exit_process(1)

    assert codes == [1]
    assert mailbox.take() == told
    mailbox.close()


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_a_process_without_a_device_is_told_what_to_set(heterogeneous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if heterogeneous:
        monkeypatch.setenv("SLURM_HET_SIZE", "2")

    with pytest.raises(MisconfigurationException) as refusal:
        refuse_rank_without_device(local_rank=1, devices=1)

    assert "Set devices to the largest number of ranks on one host" in str(refusal.value)
    assert ("put the one with the most tasks on a host last" in str(refusal.value)) == heterogeneous


def test_the_end_of_a_child_is_described(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_launcher, "_EXIT_STATUS_TIMEOUT_S", 1.0)
    script.procs = [child("sh -c 'exit 3'"), child("sh -c 'kill -9 $$'")]

    assert script.describe_end(1) == "its process exited with code 3"
    assert script.describe_end(2) == "its process was killed by SIGKILL"
    # Rank 0 itself, and ranks that were started from somewhere else.
    assert script.describe_end(0) is script.describe_end(3) is script.describe_end(-1) is None


def test_a_child_that_runs_has_no_end(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_launcher, "_EXIT_STATUS_TIMEOUT_S", 0.1)
    script.procs = [child("sleep 60")]

    assert script.describe_end(1) is None


@pytest.mark.parametrize("others", [[], ["sleep 60"]])
def test_a_child_that_ended_before_it_was_watched_is_reported(
    script: Any, monkeypatch: pytest.MonkeyPatch, others: list[str]
) -> None:
    monkeypatch.setattr(script_launcher, "_EXIT_STATUS_TIMEOUT_S", 0.0)
    reported: list[tuple[int, ...]] = []
    script._guard = SimpleNamespace(goes_on=False, report_failure=lambda *end: reported.append(end))
    script.procs = [child("false"), *map(child, others)]
    script.procs[0].wait()

    script._watch(threading.Event())

    assert reported == [(1, 1, 0)]


def test_a_rank_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.05)
    environment = SimpleNamespace(main_address="127.0.0.1", main_port=29500)
    ranks_of_run = {"global_rank": 0, "world_size": 4, "num_nodes": 1}
    strategy: Any = SimpleNamespace(cluster_environment=environment, owner=None, **ranks_of_run)
    supervisor = ranks.RunSupervisor(strategy, "spawn", 60.0, Resilience())

    with supervisor.impatience():
        time.sleep(0.3)
    with supervisor.impatience():
        pass
    time.sleep(0.1)

    (record,) = caplog.records
    assert "rank 0 of 4 has waited" in record.message
    assert "127.0.0.1:29500" in record.message
    assert "they are started from here and may still be importing" in record.message


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ("[127.0.1.1]:17830$1", "at 127.0.1.1, which leads back to this host"),
        ("[10.0.0.2]:17830$1", "process group at 10.0.0.2: that rank has ended, a firewall is between them"),
    ],
)
def test_a_process_group_that_cannot_be_reached_is_told_with_what_to_set(remote: str, told: str) -> None:
    environment = SimpleNamespace(main_address="node1", main_port=29500)
    strategy: Any = SimpleNamespace(
        cluster_environment=environment, global_rank=1, world_size=2, num_nodes=2, owner=None
    )
    supervisor = ranks.RunSupervisor(strategy, "spawn", 60.0, Resilience())

    with pytest.raises(RuntimeError) as failure, supervisor.impatience():
        raise RuntimeError(
            f"Gloo connectFullMesh failed with [pair.cc:152] SO_ERROR: Connection refused, remote={remote}"
        )

    assert told in str(failure.value)
    assert "Set GLOO_SOCKET_IFNAME" in str(failure.value)
    assert "pair.cc" in str(failure.value.__cause__)
    with pytest.raises(RuntimeError, match=r"^another$"), supervisor.impatience():
        raise RuntimeError("another")


@pytest.mark.parametrize("kind", [LightningEnvironment, TorchElasticEnvironment, SLURMEnvironment])
@pytest.mark.parametrize("started_here", [False, True])
@pytest.mark.parametrize("local_rank", [None, "0", "1"])
@pytest.mark.parametrize("launches", ["script", "process"])
def test_local_rank_is_named_only_where_it_keeps_the_ranks_from_being_started(
    kind: Any, started_here: bool, local_rank: str | None, launches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", local_rank), (script_launcher._STARTED_RANKS, "2" if started_here else None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    launcher: Any = (ScriptLauncher if launches == "script" else ProcessLauncher).__new__(
        ScriptLauncher if launches == "script" else ProcessLauncher
    )
    launcher.cluster_environment = kind()

    hint = launcher.describe_start(1)

    by_hand = launches == "script" and kind is LightningEnvironment and local_rank is not None and not started_here
    assert ("LOCAL_RANK is set" in hint) == by_hand
    assert hint.startswith("TorchElastic starts them") == (launches == "script" and kind is TorchElasticEnvironment)
    assert hint.startswith("SLURM starts them") == (launches == "script" and kind is SLURMEnvironment)


def test_over_several_hosts_the_hint_says_what_each_of_them_needs() -> None:
    launcher = ProcessLauncher.__new__(ProcessLauncher)

    assert "must run on all 3 hosts" in launcher.describe_start(3)
    assert "NODE_RANK" in launcher.describe_start(3)


@pytest.mark.parametrize("first_fails", [False, True])
def test_a_later_trainer_of_a_script_watches_the_ranks_that_the_first_has_started(
    script: Any, monkeypatch: pytest.MonkeyPatch, first_fails: bool
) -> None:
    monkeypatch.setattr(script_launcher, "_EXIT_STATUS_TIMEOUT_S", 0.0)
    monkeypatch.setattr(launching, "POLL_S", 0.01)
    monkeypatch.setenv(script_launcher._STARTED_RANKS, "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    reported: list[tuple[int, ...]] = []
    heard = threading.Event()
    script.procs = [child("sh -c 'sleep 0.2; exit 3'" if first_fails else "sleep 60")]
    monkeypatch.setattr(script_launcher, "_started", list(script.procs))
    strategy: Any = SimpleNamespace(cluster_environment=LightningEnvironment(), num_processes=2, num_nodes=1)
    guard: Any = SimpleNamespace(
        guard_run=nullcontext,
        goes_on=False,
        report_failure=lambda *end: (reported.append(end), heard.set()),
    )
    later = ScriptLauncher(strategy, guard)

    def part() -> None:
        if first_fails:
            assert heard.wait(10.0)

    later.launch(part)

    assert later.procs == script.procs
    assert reported == ([(1, 3, 0)] if first_fails else [])
    assert eventually(lambda: "child-watch" not in {thread.name for thread in threading.enumerate()})


def test_a_rank_that_is_started_again_when_the_run_has_just_ended_is_not_left_over(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.procs = [child("true")]
    script.procs[0].wait()
    script._is_over = over = threading.Event()
    lost: set[int] = set()
    monkeypatch.setattr(script_launcher, "_started", list(script.procs))
    monkeypatch.setattr(script_launcher, "_lost", lost)

    def start(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        over.set()
        return child("sleep 60")

    monkeypatch.setattr(script_launcher, "subprocess", SimpleNamespace(Popen=start))

    script._address = Address("127.0.0.1", 1, "token")
    script._start_again(1, Lost(1, "killed", "it is started again", start=1))

    (process,) = script.procs
    assert process.poll() == -signal.SIGKILL
    # The script's next Trainer does not take its end for a failure.
    assert lost == {process.pid}


class HostOfScript:
    """The first rank of a host, which has started the other one; what is started again only sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node: int) -> None:
        self.rank_0 = RankZero()
        strategy: Any = SimpleNamespace(node_rank=node, num_processes=2, num_nodes=2, cluster_environment=object())
        self.launcher: Any = ScriptLauncher(strategy, GUARD)
        self.first = child("sleep 60")
        self.launcher.procs = [self.first]
        self.launcher._is_over = threading.Event()
        self.environments: list[dict[str, str]] = []
        monkeypatch.setattr(script_launcher, "_started", [self.first])
        monkeypatch.setattr(script_launcher, "_launches", 1)
        stand_in = SimpleNamespace(Popen=self._start, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(script_launcher, "subprocess", stand_in)

    def _start(self, command: Any, env: dict[str, str], cwd: Any) -> subprocess.Popen[bytes]:
        self.environments.append(env)
        return child("sleep 60")

    def serve(self) -> None:
        own = self.rank_0.launchers if self.launcher._first_rank == 0 else None
        self.launcher.serve(self.rank_0.address, own)
        assert eventually(lambda: self.rank_0.launchers._launchers)

    def kill(self) -> None:
        self.first.kill()
        self.first.wait()

    def restarted(self) -> bool:
        return eventually(lambda: self.launcher.procs[0] is not self.first)

    def close(self) -> None:
        self.launcher._is_over.set()
        if self.launcher._connection is not None:
            self.launcher._connection.stop()
        self.rank_0.close()
        for process in (self.first, *self.launcher.procs):
            process.kill()
            process.wait()


@pytest.fixture(params=[0, 1])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostOfScript]:
    host = HostOfScript(monkeypatch, request.param)
    yield host
    host.close()


def test_the_first_rank_of_each_host_starts_its_own_again(
    host: HostOfScript, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = host.launcher._first_rank + 1
    host.serve()
    host.serve()

    host.kill()
    host.rank_0.lose(rank, "its process is gone: the connection was closed")

    assert host.restarted()
    (environment,) = host.environments
    invitation = json.loads(environment["LIGHTNING_ASYNC_JOIN"])
    assert (invitation["rank"], invitation["address"]["port"]) == (rank, host.rank_0.address.port)
    assert environment["LOCAL_RANK"] == "1"
    said = capfd.readouterr().err
    theirs = "[rank 2] lightning_async: rank 3 is lost: its process was killed by SIGKILL; it is started again (1 of 3)"
    assert (theirs in said) == (rank == 3)
    assert f"it is started again{' by host 1' if rank == 3 else ''} (1 of 3)" in said


def test_a_rank_that_is_only_stopped_is_ended_first(host: HostOfScript) -> None:
    host.serve()
    os.kill(host.first.pid, signal.SIGSTOP)

    host.rank_0.lose(host.launcher._first_rank + 1, "gave no sign of life for 2 s (worker_timeout)")

    assert host.restarted()
    assert host.first.wait(10.0) == -signal.SIGKILL


def test_a_process_that_ends_before_it_has_joined_is_reported_with_the_start_that_it_was(
    host: HostOfScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_launcher, "_EXIT_STATUS_TIMEOUT_S", 0.0)
    rank, over = host.launcher._first_rank + 1, threading.Event()
    guard = SimpleNamespace(
        goes_on=True, report_failure=lambda local_rank, code, start: host.rank_0.launchers.hear(rank, code, start)
    )
    host.launcher._guard = guard
    host.serve()
    host.rank_0.lose(rank)
    assert host.restarted()
    second = host.launcher.procs[0]
    second.kill()

    watch = threading.Thread(target=host.launcher._watch, args=(over,), daemon=True)
    watch.start()

    # After the back-off of a second start.
    assert eventually(lambda: host.launcher.procs[0] is not second)
    over.set()
    assert [word.start for word in host.rank_0.launchers._words.values()] == [2]


def test_a_later_run_of_a_script_starts_no_rank_again_and_says_why(
    host: HostOfScript, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_launcher, "_launches", 2)
    host.serve()

    host.rank_0.lose(host.launcher._first_rank + 1)

    assert host.first.wait(10.0) == -signal.SIGKILL
    assert "it is not started again, since this is not the script's first run" in capfd.readouterr().err
    assert host.environments == []


@pytest.mark.parametrize("is_out", [False, True])
def test_the_first_rank_of_another_host_takes_the_others_along_only_if_the_run_ends(
    host: HostOfScript, is_out: bool
) -> None:
    host.launcher._guard = SimpleNamespace(is_out=is_out)

    host.launcher.end_children(0.0)

    left_training = is_out and host.launcher._first_rank > 0
    assert (host.first.poll() is None) == left_training


@pytest.mark.parametrize(("started", "refused"), [(None, False), ("2", True), ("3", False)])
def test_a_run_that_would_wait_for_ranks_nobody_starts_is_refused(
    started: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv(script_launcher._STARTED_RANKS, raising=False)
    if started is not None:
        monkeypatch.setenv(script_launcher._STARTED_RANKS, started)
    strategy: Any = SimpleNamespace(
        cluster_environment=LightningEnvironment(), num_processes=3, num_nodes=1, strategy_name="async"
    )
    guard: Any = SimpleNamespace(guard_run=nullcontext)
    launcher = ScriptLauncher(strategy, guard)

    if refused:
        with pytest.raises(MisconfigurationException, match=r'started 2 ranks.* strategy="async_spawn"'):
            launcher.launch(lambda: "ran")
    else:
        assert launcher.launch(lambda: "ran") == "ran"
