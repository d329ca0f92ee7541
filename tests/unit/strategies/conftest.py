"""A host of a run that goes on, whose ranks are no processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_async.strategies import host_processes, launching
from tests.launched_host import Host1


@pytest.fixture
def host_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host1]:
    monkeypatch.setattr(host_processes, "_DYING_S", 0.0)
    monkeypatch.setattr(launching, "POLL_S", 0.05)
    host = Host1(tmp_path)
    yield host
    host.close()
