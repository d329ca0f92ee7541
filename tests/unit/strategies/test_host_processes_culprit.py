"""Whose fault it is that the ranks of a host have ended."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_async.runtime.failure import RunFailure
from lightning_async.strategies.host_processes import HostProcesses

pytestmark = pytest.mark.timeout(30)


class Ended:
    """A host whose processes have ended in a given way; None stands for one that did not."""

    def __init__(self, folder: Path, codes: list[int | None], node: int = 0) -> None:
        self.files = [str(folder / f"error-{index}") for index in range(len(codes))]
        self.stuck = [index for index, code in enumerate(codes) if code is None]
        self.processes = HostProcesses([SimpleNamespace(exitcode=code) for code in codes], self.files, node)

    def raised(self, index: int, traceback: str) -> None:
        Path(self.files[index]).write_bytes(pickle.dumps(traceback))

    def failure(self, order: list[int], known: RunFailure | None = None) -> RunFailure:
        return self.processes.failure(known, order, self.stuck)


def test_a_killed_process_is_the_culprit_whoever_ends_first(tmp_path: Path) -> None:
    ended = Ended(tmp_path, [1, 1, -9])

    assert ended.failure([0, 1, 2]) == RunFailure(2, "its process was killed by SIGKILL")


def test_then_one_that_raised(tmp_path: Path) -> None:
    ended = Ended(tmp_path, [1, 1, 1])
    ended.raised(1, "Traceback\nValueError: no")

    assert ended.failure([0, 2, 1]) == RunFailure(1, "its process exited with code 1\n\nTraceback\nValueError: no")


def test_then_one_with_a_code_of_its_own(tmp_path: Path) -> None:
    assert Ended(tmp_path, [1, 1, 3]).failure([0, 1, 2]) == RunFailure(2, "its process exited with code 3")


def test_then_one_that_had_to_be_killed(tmp_path: Path) -> None:
    assert Ended(tmp_path, [1, None, 1]).failure([2, 0]) == RunFailure(1, "its process did not end")


def test_then_the_first(tmp_path: Path) -> None:
    assert Ended(tmp_path, [1, 1, 0]).failure([2, 1, 0]) == RunFailure(1, "its process exited with code 1")


def test_what_rank_0_knows_is_believed_and_completed(tmp_path: Path) -> None:
    ended = Ended(tmp_path, [1, 1, 1])
    ended.raised(0, "Traceback\nWorkerFailedError: rank 2 failed: ValueError: no")
    ended.raised(2, "Traceback\nValueError: no")

    failure = ended.failure([0, 1, 2], known=RunFailure(2, "ValueError: no"))

    assert failure == RunFailure(2, "ValueError: no\n\nTraceback\nValueError: no")


def test_the_signal_says_more_than_a_lost_connection(tmp_path: Path) -> None:
    known = RunFailure(1, "its process is gone: the connection was closed")

    assert Ended(tmp_path, [1, -11]).failure([0, 1], known) == RunFailure(1, "its process was killed by SIGSEGV")
    assert Ended(tmp_path, [1, None]).failure([0], known) == known


def test_ranks_are_counted_over_all_nodes(tmp_path: Path) -> None:
    ended = Ended(tmp_path, [1, -9], node=2)

    assert ended.failure([0, 1]) == RunFailure(5, "its process was killed by SIGKILL")


@pytest.mark.parametrize(("node", "rank"), [(0, 2), (0, 3), (1, 0), (1, 1), (1, 4)])
def test_a_rank_of_another_node_is_named_as_rank_0_knows_it(tmp_path: Path, node: int, rank: int) -> None:
    ended = Ended(tmp_path, [1, 1], node)
    ended.raised(0, "Traceback\nWorkerFailedError: another rank failed")
    known = RunFailure(rank, "ValueError: no")

    assert ended.failure([0, 1], known) == known
