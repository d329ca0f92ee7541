"""A fit that fails before its first batch leaves no folder that it has made and put nothing in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from lightning_async.strategies.new_folders import NewFolders, log_folders


def test_new_folders_with_nothing_in_them_are_removed_with_those_around_them(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "lenet" / "version_0"
    new = NewFolders([folder])
    folder.mkdir(parents=True)

    new.remove_empty()

    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_file_in_it_stays_and_so_do_those_around_it(tmp_path: Path) -> None:
    folder, other = tmp_path / "runs" / "version_0", tmp_path / "runs" / "version_1"
    new = NewFolders([folder, other])
    folder.mkdir(parents=True)
    other.mkdir()
    (folder / "metrics.csv").touch()

    new.remove_empty()

    assert (folder / "metrics.csv").exists()
    assert not other.exists()


def test_an_empty_folder_of_before_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    new = NewFolders([tmp_path / "runs" / "version_0"])
    (tmp_path / "runs" / "version_0").mkdir()

    new.remove_empty()

    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_was_never_made_is_no_error(tmp_path: Path) -> None:
    NewFolders([tmp_path / "runs" / "version_0"]).remove_empty()

    assert list(tmp_path.iterdir()) == []


def test_loggers_without_a_folder_of_their_own_are_left_out() -> None:
    loggers = [SimpleNamespace(log_dir="a"), SimpleNamespace(log_dir=None), SimpleNamespace(save_dir="b")]

    assert log_folders(loggers) == [Path("a")]
