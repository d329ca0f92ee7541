"""What every test here begins with."""

from __future__ import annotations

import pytest

from tests.gpu import card


@pytest.fixture(autouse=True)
def without_gpus() -> None:
    """In place of the fixture that hides GPUs from other tests."""


@pytest.fixture(autouse=True)
def gpu_or_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the host in the GPU's place where that is asked for."""
    if card.STANDS_IN:
        card.stand_in(monkeypatch)
