"""A collective that waits for a rank that is stopped, or gone, can be left, and a new group be formed by the others."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_async.runtime.process_groups import (
    break_groups,
    breakable,
    end_groups_of_one_rank,
    forget_inherited_groups,
    open_store,
    reform_default_group,
    reformed_place,
)
from tests.launch import launch, report

pytestmark = pytest.mark.timeout(60)
RANKS = 3
# Far longer than the test.
PATIENCE = timedelta(minutes=10)


def form(port: int, place: int, size: int) -> None:
    """A group of the ranks that come to a store."""
    with breakable():
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        reform_default_group(store, place, size, "gloo", PATIENCE, PATIENCE)


def broken_off(folder: Path, name: str, wait: object) -> str:
    """What a call that waits in vain ends with, once this rank's groups are broken from another thread."""
    assert callable(wait)
    over = threading.Event()

    def break_off() -> None:
        # On a busy machine the first may come before there is something to break.
        while not over.wait(0.3):
            break_groups()

    breaking = threading.Thread(target=break_off, daemon=True)
    breaking.start()
    try:
        wait()
    except RuntimeError as error:
        return f"{name}: {type(error).__name__}"
    finally:
        over.set()
        breaking.join()
    return f"{name}: nothing"


def run_rank(folder: Path, rank: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    form(ports[0], rank, RANKS)
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    # Of which rank 2, which keeps its connections, has no part.
    told = [broken_off(folder, "collective", lambda: dist.all_reduce(torch.ones(4)))]
    # A group that the stopped rank never comes to form.
    told.append(broken_off(folder, "forming", lambda: form(ports[1], rank, RANKS)))
    form(ports[2], rank, 2)
    total = torch.full((4,), float(rank + 1))
    dist.all_reduce(total)
    report(folder, rank, told=told, total=total.tolist(), place=reformed_place())
    dist.barrier()
    dist.destroy_process_group()


def script(folder: Path) -> None:
    stores = [open_store("127.0.0.1") for _ in range(3)]
    ports = [store.port for store in stores]
    ranks: dict[int, int] = {}
    for rank in range(RANKS):
        ranks[rank] = os.fork()
        if not ranks[rank]:
            run_rank(folder, rank, ports)
            os._exit(0)
    try:
        codes = [os.waitpid(ranks[rank], 0)[1] for rank in (0, 1)]
    finally:
        os.kill(ranks[2], signal.SIGKILL)
        os.waitpid(ranks[2], 0)
    assert codes == [0, 0]


def test_what_waits_for_a_stopped_rank_is_left_and_the_others_form_a_group_of_their_own(tmp_path: Path) -> None:
    run = launch(script, tmp_path, timeout_s=45.0)

    assert run.returncode == 0, run.output
    for place, rank in enumerate(run.reports()):
        collective, forming = rank["told"]
        assert collective == "collective: RuntimeError"
        # torch's own errors of a rendezvous are RuntimeErrors, too.
        assert forming.startswith("forming: ") and forming != "forming: nothing"
        assert rank["total"] == [3.0] * 4
        assert rank["place"] == (place, 2)


def test_where_there_is_no_group_nothing_is_broken() -> None:
    assert not dist.is_initialized()

    break_groups()

    assert reformed_place() is None


def test_a_group_that_another_thread_is_leaving_is_nothing_to_break(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_gone(group: object) -> str:
        raise ValueError(f"Process group {group} is not initialized in the world group map.")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=object()))
    monkeypatch.setattr(dist, "get_backend", is_gone)

    break_groups()


def make_group(store: dist.Store, rank: int, size: int) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))


def test_a_fork_forgets_the_group_of_several_ranks_that_it_is_not_in(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        store = dist.FileStore(str(folder / "store"), 2)
        other = os.fork()
        make_group(store, int(other == 0), 2)
        # Of several ranks, so it is others', too.
        end_groups_of_one_rank()
        assert dist.get_world_size() == 2
        fork = os.fork()
        if fork == 0:
            forget_inherited_groups()
            has_group = dist.is_initialized()
            make_group(dist.HashStore(), 0, 1)
            os._exit(int(has_group))
        assert os.waitpid(fork, 0)[1] == 0
        dist.barrier()
        if other == 0:
            os._exit(0)
        assert os.waitpid(other, 0)[1] == 0

    run = launch(script, tmp_path, timeout_s=40.0)

    assert run.returncode == 0, run.output


def test_a_group_of_one_rank_is_ended_before_ranks_are_forked(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        end_groups_of_one_rank()
        make_group(dist.HashStore(), 0, 1)
        end_groups_of_one_rank()
        report(folder, 0, has_group=dist.is_initialized())

    run = launch(script, tmp_path)

    assert run.report(0) == {"has_group": False}, run.output
