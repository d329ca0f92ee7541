"""The live page follows the record, and only this machine can ask for it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_async.monitoring.record import RECORD_NAME, RunRecord
from lightning_async.monitoring.report import report_main
from lightning_async.monitoring.report.live import LivePage, LiveServer
from tests.harness import eventually
from tests.launch import launch
from tests.unit.monitoring.test_report import record


@contextmanager
def served(page: LivePage) -> Iterator[LiveServer]:
    with LiveServer(page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def test_a_page_is_made_anew_when_the_record_has_changed_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / RECORD_NAME
    made: list[int] = []

    def render(refresh_s: int) -> str:
        made.append(refresh_s)
        return f"page {len(made)} of {RunRecord.read(tmp_path).stats['updates']} updates"

    page = LivePage(path, render)
    record().write(path)
    assert [page.text(), page.text()] == ["page 1 of 310 updates"] * 2

    record(stats={**record().stats, "updates": 1234}).write(path)
    assert page.text() == "page 2 of 1234 updates"
    assert made == [5, 5]


def test_a_record_that_is_not_there_yet_or_damaged_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / RECORD_NAME
    page = LivePage(path, lambda refresh_s: f"{refresh_s} {RunRecord.read(tmp_path).ranks}")

    assert "No report yet" in page.text() and "http-equiv" in page.text()
    path.write_text("{")
    assert "is not JSON" in page.text()
    record().write(path)
    assert page.text() == "5 4"


def test_the_server_shows_the_page_to_this_machine_and_nothing_else(tmp_path: Path) -> None:
    record(finished=False).write(tmp_path / RECORD_NAME)

    with served(LivePage(tmp_path / RECORD_NAME, lambda refresh_s: "the page")) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert fetch(server.url) == fetch(server.url + "?again") == "the page"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(server.url + RECORD_NAME)


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    record(finished=False).write(tmp_path / RECORD_NAME)
    pages = []

    def serve(folder: Path) -> None:
        # A shell's background job, which this may be, ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(report_main([str(folder), "--serve"]))

    def look_and_interrupt(pid: int) -> None:
        said = tmp_path / "output.txt"
        assert eventually(lambda: said.exists() and said.read_text().endswith("\n"), timeout_s=30.0)
        pages.append(fetch(said.read_text().split()[0]))
        os.kill(pid, signal.SIGINT)

    run = launch(serve, tmp_path, meanwhile=look_and_interrupt)

    assert run.returncode == 0, run.output
    (page,) = pages
    assert "Staleness over time" in page
    assert 'http-equiv="refresh"' in page


@pytest.mark.parametrize("arguments", [["--serve", "--out", "page.html"], ["--port", "8000"]])
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        report_main([str(tmp_path), *arguments])
    assert "--serve" in capsys.readouterr().err


def test_a_taken_port_and_a_missing_folder_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(LivePage(tmp_path, str)) as server:
        port = str(server.server_address[1])
        assert report_main([str(tmp_path), "--serve", "--port", port]) == 1
    assert report_main([str(tmp_path / "nowhere"), "--serve"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert ["already in use" in lines[0], "does not exist" in lines[1]] == [True, True]
    assert len(lines) == 2


def test_the_record_that_is_read_is_whole_while_it_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / RECORD_NAME
    record().write(path)
    over = threading.Event()

    def keep_writing() -> None:
        while not over.is_set():
            record().write(path)

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        for _ in range(200):
            json.loads(path.read_text())
    finally:
        over.set()
        thread.join()
