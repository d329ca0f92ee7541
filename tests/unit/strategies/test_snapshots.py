"""A snapshot is taken when it is due, replaces its own run's, and is found by the job that it is of."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async import AsyncStrategy
from lightning_async.exchange.last_state import LastState, LastStateFile
from lightning_async.runtime import whole_file
from lightning_async.runtime.job import Job
from lightning_async.strategies import snapshots, start_choice
from lightning_async.strategies.snapshot_file import SnapshotFile
from lightning_async.strategies.snapshots import SnapshotPlace, Snapshots
from tests.harness import eventually

FIRST = Job(slurm="17")
AGAIN = Job(slurm="17", restarted_by=("SLURM",))


class Alone:
    """The collectives of one rank."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def gather_objects(self, mine: Any) -> list[Any]:
        return [mine]


class Rig:
    """Snapshots of a trainer that does nothing, and what is said to its user."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, job: Job = FIRST, fit: int = 1) -> None:
        self.said: list[str] = []
        monkeypatch.setattr(snapshots, "_fits", snapshots.Counter({path: fit - 1}))
        monkeypatch.setattr(snapshots, "say", lambda trainer, line: self.said.append(line))
        monkeypatch.setattr(start_choice, "rank_zero_info", self.said.append)
        self.module = torch.nn.Linear(2, 1)
        self.trainer: Any = SimpleNamespace(
            is_global_zero=True, lightning_module=self.module, save_checkpoint=self._save
        )
        collectives: Any = Alone()
        self.snapshots = Snapshots(self.trainer, path, 60.0, collectives, lambda: False, job)
        self.content: dict[str, Any] = {}
        self.asked = 0

    def _save(self, path: Path, weights_only: bool) -> None:
        assert self.snapshots.is_taking
        self.asked += 1
        checkpoint = {"epoch": 2, "async_amsgrad": {"version": self.asked}, **self.content}
        self.snapshots.write(checkpoint, (), step=40)

    def take(self) -> None:
        self.snapshots._next = 0.0
        self.snapshots.take_if_due()

    def take_and_wait(self) -> None:
        self.take()
        assert eventually(lambda: not self.snapshots._writer.is_busy)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lightning_async" / "snapshot.ckpt"


def version_in(path: Path) -> int:
    return int(torch.load(path)["async_amsgrad"]["version"])


def test_a_snapshot_is_taken_when_it_is_due_and_not_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(path, monkeypatch)
    rig.snapshots.take_if_due()
    asked_early = rig.asked
    rig.take_and_wait()
    rig.snapshots.take_if_due()

    assert (asked_early, rig.asked, rig.snapshots.written) == (0, 1, 1)
    assert version_in(path) == 1
    assert [found.name for found in path.parent.iterdir()] == ["snapshot.ckpt"]


class Holder:
    """The holder's side, in a process of its own or not."""

    def __init__(self, is_apart: bool) -> None:
        self.is_apart = is_apart
        self.asked: list[tuple[str, str]] = []
        self.expected: list[str] = []
        self.saved: list[str] = []

    def save_on_loss(self, snapshot: str, segment: str) -> bool:
        self.asked.append((snapshot, segment))
        return self.is_apart

    def expect_snapshot(self, segment: str) -> None:
        self.expected.append(segment)

    def note_saved(self, segment: str) -> None:
        assert segment == self.expected[-1]
        self.saved.append(segment)


def test_a_segment_has_a_snapshot_of_its_own_where_the_holder_outlives_rank_0(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(path, monkeypatch)
    with_rank_0: Any = Holder(is_apart=False)
    apart: Any = Holder(is_apart=True)
    rig.snapshots.begin_segment(with_rank_0)
    rig.snapshots.take_if_due()
    assert rig.asked == 0

    rig.snapshots.begin_segment(apart)
    rig.snapshots.take_if_due()
    assert eventually(lambda: rig.snapshots.written == 1)
    assert apart.asked[0][0] == str(path)
    assert torch.load(path)["async_amsgrad"]["snapshot"]["segment"] == apart.asked[0][1]
    # It is told once, between two batches or when they are over.
    rig.snapshots.take_if_due()
    rig.snapshots.end_segment()
    assert apart.saved == [apart.asked[0][1]]

    # The writer of a large model would do nothing else.
    rig.snapshots._writer.rests_until_s = time.monotonic() + 5.0
    rig.snapshots.begin_segment(apart)
    rig.snapshots.take_if_due()
    rig.snapshots.end_segment()
    assert rig.asked == 1
    assert apart.asked[0][1] != apart.asked[1][1]
    assert (with_rank_0.expected, apart.expected) == ([], [apart.asked[0][1]])
    assert (with_rank_0.saved, apart.saved) == ([], [apart.asked[0][1]])


def test_a_snapshot_that_is_there_only_after_its_segment_is_told_then(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, may_write = Rig(path, monkeypatch), threading.Event()
    write = rig.snapshots._file.write
    rig.snapshots._file.write = lambda content: may_write.wait() and write(content)  # type: ignore[method-assign]
    apart: Any = Holder(is_apart=True)
    rig.snapshots.begin_segment(apart)
    rig.snapshots.take_if_due()
    rig.snapshots.end_segment()
    rig.snapshots.begin_segment(apart)
    rig.snapshots.take_if_due()
    (first, _), (second, _) = ((segment, snapshot) for snapshot, segment in apart.asked)
    assert (apart.expected, apart.saved) == ([first], [])

    may_write.set()
    assert eventually(lambda: not rig.snapshots._writer.is_busy)
    # The second segment's comes due.
    rig.take_and_wait()
    rig.snapshots.end_segment()
    assert (apart.expected, apart.saved) == ([first, second], [first, second])


def test_while_one_is_written_the_next_is_put_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, may_write = Rig(path, monkeypatch), threading.Event()
    sync = os.fsync
    monkeypatch.setattr(whole_file.os, "fsync", lambda descriptor: may_write.wait(10) and sync(descriptor))
    rig.take()
    rig.take()
    asked_meanwhile = rig.asked
    may_write.set()
    assert eventually(lambda: not rig.snapshots._writer.is_busy)
    rig.take_and_wait()

    assert (asked_meanwhile, rig.asked, version_in(path)) == (1, 2, 2)


def test_a_full_disk_is_told_of_once_and_the_snapshot_before_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, write = Rig(path, monkeypatch), os.write
    rig.take_and_wait()

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_file.os, "write", full)
    rig.take_and_wait()
    rig.take_and_wait()
    version, beside = version_in(path), [found.name for found in path.parent.iterdir()]
    monkeypatch.setattr(whole_file.os, "write", write)
    rig.take_and_wait()
    rig.snapshots.finish(1.0)

    assert (version, beside) == (1, ["snapshot.ckpt"])
    assert version_in(path) == 4
    assert rig.said == [
        f"A snapshot could not be written to {path}: OSError: [Errno 28] No space left on device. Training goes on, "
        "the snapshot before it stays, and the next one is tried as usual.",
        f"Snapshots are written to {path} again.",
    ]


def test_what_cannot_be_copied_ends_the_snapshots_and_not_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(path, monkeypatch)
    rig.content = {"callbacks": {"Mine": threading.Lock()}}
    rig.take()
    rig.take()

    assert rig.asked == 1
    assert rig.said[0].startswith(
        "No more snapshots are written: something in the checkpoint cannot be copied (TypeErr"
    )


def test_a_write_that_outlasts_the_fit_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, may_write, write = Rig(path, monkeypatch), threading.Event(), os.write
    rig.take_and_wait()

    def slow(descriptor: int, data: Any) -> int:
        may_write.wait(10)
        return write(descriptor, data)

    monkeypatch.setattr(whole_file.os, "write", slow)
    rig.take()
    rig.snapshots.finish(0.01)
    may_write.set()
    assert eventually(lambda: not rig.snapshots._writer.is_busy)

    assert version_in(path) == 1
    assert [found.name for found in path.parent.iterdir()] == ["snapshot.ckpt"]
    assert rig.said == [
        f"The snapshot was not written to {path} within 0.01 s after the fit's end, and is given up. The one before it "
        "stays."
    ]


def test_a_restarted_job_goes_on_from_its_own_snapshot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Rig(path, monkeypatch).take_and_wait()
    again = Rig(path, monkeypatch, AGAIN)
    chosen = again.snapshots.start.choose(None, is_requeued=False)
    again.take_and_wait()

    assert chosen == path
    assert again.said == [
        f"This job was restarted by SLURM and goes on from the snapshot {path}: epoch 2, step 40, 0 s old."
    ]
    # It was its own: nothing is kept beside it.
    assert [found.name for found in path.parent.iterdir()] == ["snapshot.ckpt"]


@pytest.mark.parametrize(
    ("job", "width", "reason"),
    [
        (Job(slurm="18", restarted_by=("SLURM",)), 1, "it is from another job"),
        (AGAIN, 3, "its module has parameters of other names or shapes"),
    ],
)
def test_another_runs_snapshot_is_left_alone_and_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, job: Job, width: int, reason: str
) -> None:
    first = Rig(path, monkeypatch)
    first.take_and_wait()
    first.take_and_wait()
    again = Rig(path, monkeypatch, job)
    again.trainer.lightning_module = torch.nn.Linear(2, width)
    chosen = again.snapshots.start.choose(None, is_requeued=False)
    again.take_and_wait()

    assert chosen is None
    assert again.said == [f"The snapshot {path} is left alone: {reason}."]
    assert version_in(path.with_name("snapshot.previous.ckpt")) == 2
    assert version_in(path) == 1


def test_each_fit_of_a_script_goes_on_from_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fit in (1, 2):
        Rig(path, monkeypatch, fit=fit).take_and_wait()
    again = [Rig(path, monkeypatch, AGAIN, fit).snapshots.start for fit in (1, 2, 3)]

    chosen = [start.choose(None, is_requeued=False) for start in again]
    assert chosen == [path, path.with_name("snapshot.fit2.ckpt"), None]


def test_a_run_that_begins_anew_says_that_there_is_a_snapshot_and_keeps_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Rig(path, monkeypatch).take_and_wait()
    os.utime(path, (time.time() - 7_260,) * 2)
    anew = Rig(path, monkeypatch)

    assert anew.snapshots.start.choose(None, is_requeued=False) is None
    assert anew.said == [
        f"{path} is the snapshot of an earlier run, 2 h old; trainer.fit(ckpt_path=...) goes on from it. This run "
        "begins anew, and keeps it as snapshot.previous.ckpt when it writes its own."
    ]


def test_an_unreadable_snapshot_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no checkpoint")
    again = Rig(path, monkeypatch, AGAIN)

    assert again.snapshots.start.choose(None, is_requeued=False) is None
    assert again.said[0].startswith(f"The snapshot {path} cannot be read and is left alone: ")


def test_a_checkpoint_that_the_fit_was_given_goes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Rig(path, monkeypatch).take_and_wait()
    mine = path.with_name("mine.ckpt")
    mine.write_bytes(path.read_bytes())
    again = Rig(path, monkeypatch, AGAIN)
    by_hand = Rig(path, monkeypatch)
    chosen = by_hand.snapshots.start.choose(path, is_requeued=False)
    by_hand.take_and_wait()

    assert again.snapshots.start.choose(mine, is_requeued=False) == mine
    assert (again.said, by_hand.said) == ([], [])
    assert chosen == path
    # What it has begun from is its own.
    assert not path.with_name("snapshot.previous.ckpt").exists()


def test_a_restart_of_a_fit_that_was_given_a_checkpoint_goes_on_from_the_snapshot(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same script with the same ckpt_path runs again: what it has done since would be lost."""
    pretrained, other = path.with_name("pretrained.ckpt"), path.with_name("last.ckpt")
    first = Rig(path, monkeypatch)
    assert first.snapshots.start.choose(pretrained, is_requeued=False) == pretrained
    first.take_and_wait()

    again, by_hand = Rig(path, monkeypatch, AGAIN), Rig(path, monkeypatch)
    assert again.snapshots.start.choose(other, is_requeued=False) == other
    assert again.snapshots.start.choose(None, is_requeued=False) == path
    assert again.snapshots.start.choose(pretrained, is_requeued=False) == path
    assert by_hand.snapshots.start.choose(pretrained, is_requeued=False) == pretrained


def last_state(segment: str, version: int) -> LastState:
    return LastState(segment, version, [], [], [], (), (), None, {})


@pytest.mark.parametrize(("segment", "version"), [("another", 9), ("", 9), ("own", 0)])
def test_what_a_holder_has_left_of_another_segment_or_of_before_is_not_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch, segment: str, version: int
) -> None:
    rig, apart = Rig(path, monkeypatch), Holder(is_apart=True)
    holder: Any = apart
    rig.snapshots.begin_segment(holder)
    rig.take_and_wait()
    own = apart.asked[0][1]
    before = path.read_bytes()
    LastStateFile(path).write([last_state(own if segment == "own" else segment, version)])

    again = Rig(path, monkeypatch, AGAIN)
    assert again.snapshots.start.choose(None, is_requeued=False) == path
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["snapshot.ckpt"]


def test_what_a_holder_has_left_and_cannot_be_read_stays_and_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Rig(path, monkeypatch).take_and_wait()
    left = path.with_name("snapshot.last.pt")
    left.write_bytes(b"half of it")
    again = Rig(path, monkeypatch, AGAIN)

    assert again.snapshots.start.choose(None, is_requeued=False) == path
    assert again.said[0].startswith("What the holder's process had when rank 0 was lost cannot be used (")
    assert again.said[0].endswith(f"): {left} stays, and the snapshot {path} is as it was.")
    assert left.exists()


def test_of_lightnings_requeue_and_the_snapshot_the_newer_one_is_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Rig(path, monkeypatch).take_and_wait()
    requeued = path.with_name("hpc_ckpt_1.ckpt")
    requeued.write_bytes(path.read_bytes())
    os.utime(requeued, (time.time() + 60,) * 2)
    newer = Rig(path, monkeypatch, AGAIN).snapshots.start.choose(requeued, is_requeued=True)
    os.utime(requeued, (time.time() - 60,) * 2)
    older = Rig(path, monkeypatch, AGAIN).snapshots.start.choose(requeued, is_requeued=True)

    assert (newer, older) == (requeued, path)


def test_two_runs_that_write_to_one_place_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Rig(path, monkeypatch), Rig(path, monkeypatch)
    monkeypatch.setattr(snapshots, "say", lambda trainer, line: one.said.append(line))
    one.take_and_wait()
    other.take_and_wait()
    one.take_and_wait()
    one.snapshots.finish(1.0)

    assert len(one.said) == 1
    assert one.said[0].startswith(f"Another run writes its snapshots to {path}, too")


def test_leftovers_of_killed_writers_are_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    part = path.with_name(f".async-{whole_file._digest(path.name)}-{whole_file._digest('there')}-7.part")
    part.touch()
    Rig(path, monkeypatch).snapshots.start.choose(None, is_requeued=False)

    assert not part.exists()


def test_a_large_tensor_goes_to_the_file_in_pieces_and_comes_back_whole(tmp_path: Path) -> None:
    whole = torch.arange(1_000_000)
    SnapshotFile(tmp_path / "a.ckpt").write({"whole": whole})

    assert torch.equal(torch.load(tmp_path / "a.ckpt")["whole"], whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"snapshot_every_s": 0}, "snapshot_every_s=0 must be a number of seconds above 0"),
        ({"snapshot_every_s": True}, "snapshot_every_s=True must be"),
        ({"snapshot_every_s": float("inf")}, "snapshot_every_s=inf must be"),
        ({"snapshot_path": "a.ckpt"}, "Pass snapshot_every_s=60, for instance"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        AsyncStrategy(**options)


def test_a_place_that_cannot_rename_is_refused(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(default_root_dir="s3://bucket/run")
    collectives: Any = Alone()

    with pytest.raises(MisconfigurationException, match="Pass a snapshot_path in a folder"):
        SnapshotPlace(60).open(trainer, collectives, lambda: False)
