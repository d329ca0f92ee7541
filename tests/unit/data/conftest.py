"""What tests with real loaders need."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


@pytest.fixture
def no_loader_outlives_its_test() -> Iterator[None]:
    """Dropped loaders end here: their workers would hold up the test in which the garbage is collected."""
    yield
    if multiprocessing.active_children():
        # Iterators that are garbage in a circle end in any order, and their workers wait for 5 s each to be told.
        for thing in gc.get_objects():
            if issubclass(type(thing), _MultiProcessingDataLoaderIter):
                thing._shutdown_workers()
    gc.collect()
