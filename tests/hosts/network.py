"""Two linked hosts for a test, where network namespaces can be made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.network import Link

__all__ = ["Link", "two_hosts"]


@contextmanager
def two_hosts(**options: Any) -> Iterator[Link]:
    """Two linked hosts; skips the test where this user may not make them."""
    if os.name != "posix" or not os.path.exists("/proc/self/ns/net"):
        pytest.skip("no network namespaces: this is not Linux")
    try:
        link = Link(**options)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        pytest.skip(f"no network namespaces here (they take root and iproute2): {said}")
    try:
        yield link
    finally:
        link.close()
