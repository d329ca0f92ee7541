"""What tests with real loaders need."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_loader_outlives_its_test() -> Iterator[None]:
    """Dropped loaders end here: their workers would hold up the test in which the garbage is collected."""
    yield
    gc.collect()
