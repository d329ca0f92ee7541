"""The strategy's checkpoints are whole files: a save that fails leaves what was there, and says so."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_async import AsyncStrategy
from lightning_async.strategies.checkpoint_io import WholeFileIO


def files_in(folder: Path) -> list[str]:
    return sorted(found.name for found in folder.iterdir())


def test_a_checkpoint_goes_to_its_folder_and_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no folder"))
    for path in (tmp_path / "new" / "a.ckpt", f"file://{tmp_path}/new/b.ckpt"):
        WholeFileIO().save_checkpoint({"number": 1}, path)

    assert files_in(tmp_path / "new") == ["a.ckpt", "b.ckpt"]
    assert [WholeFileIO().load_checkpoint(tmp_path / "new" / name) for name in ("a.ckpt", "b.ckpt")] == [
        {"number": 1}
    ] * 2


def test_a_full_disk_leaves_the_checkpoint_before_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, written = tmp_path / "a.ckpt", os.write, 0
    WholeFileIO().save_checkpoint({"number": 1}, path)

    def fill(descriptor: int, data: Any) -> int:
        nonlocal written
        if written > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[:50_000])
        written += done
        return done

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(OSError, match="the checkpoint was not saved, and a file of that name") as full:
        WholeFileIO().save_checkpoint({"number": torch.zeros(1_000_000)}, path)

    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path))
    assert written > 100_000
    assert files_in(tmp_path) == ["a.ckpt"]
    assert torch.load(path) == {"number": 1}


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_file_system_that_knows_no_sync_of_folders_is_no_reason_to_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    original = getattr(os, call)

    def refuse_folders(what: Any, *arguments: Any) -> Any:
        is_folder = os.path.isdir(f"/proc/self/fd/{what}" if call == "fsync" else what)
        if is_folder and call == "fsync":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if is_folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(what, *arguments)

    monkeypatch.setattr(os, call, refuse_folders)
    WholeFileIO().save_checkpoint({"number": 1}, tmp_path / "a.ckpt")
    monkeypatch.undo()

    assert torch.load(tmp_path / "a.ckpt") == {"number": 1}
    assert files_in(tmp_path) == ["a.ckpt"]


def test_what_a_killed_process_has_left_is_no_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    for name in ("last.ckpt", "hpc_ckpt_1.ckpt"):
        pid = os.fork()
        if pid == 0:
            os.fsync = lambda descriptor: os._exit(7)  # type: ignore[assignment]
            WholeFileIO().save_checkpoint({"number": 1}, tmp_path / name)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    left = files_in(tmp_path)
    for name in ("last.ckpt", "hpc_ckpt_1.ckpt"):
        WholeFileIO().save_checkpoint({"number": 2}, tmp_path / name)

    # By these Lightning takes a file for one to go on from.
    assert len(left) == 2
    assert not [name for name in left if "last" in name or "ckpt" in name]
    assert files_in(tmp_path) == ["hpc_ckpt_1.ckpt", "last.ckpt"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    parts: list[str] = []

    class Meanwhile:
        def __reduce__(self) -> Any:
            WholeFileIO().save_checkpoint({"number": 2}, tmp_path / "b.ckpt")
            parts.extend(name for name in files_in(tmp_path) if name.endswith(".part"))
            return int, ()

    WholeFileIO().save_checkpoint({"number": Meanwhile()}, tmp_path / "a.ckpt")

    assert len(parts) == 1
    assert files_in(tmp_path) == ["a.ckpt", "b.ckpt"]


def test_a_remote_checkpoint_goes_lightnings_way() -> None:
    WholeFileIO().save_checkpoint({"number": 1}, "memory://checkpoints/a.ckpt")

    assert WholeFileIO().load_checkpoint("memory://checkpoints/a.ckpt") == {"number": 1}
    fsspec.filesystem("memory").rm("/checkpoints", recursive=True)


def test_storage_options_are_refused_as_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        WholeFileIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"key": 1})


def test_the_strategy_saves_by_it_unless_the_user_has_another_way() -> None:
    mine, within = TorchCheckpointIO(), AsyncStrategy(checkpoint_io=AsyncCheckpointIO()).checkpoint_io

    assert type(AsyncStrategy().checkpoint_io) is WholeFileIO
    assert AsyncStrategy(checkpoint_io=mine).checkpoint_io is mine
    assert isinstance(within, AsyncCheckpointIO)
    assert type(within.checkpoint_io) is WholeFileIO
    assert AsyncStrategy(checkpoint_io=AsyncCheckpointIO(mine)).checkpoint_io.checkpoint_io is mine  # type: ignore[attr-defined]
