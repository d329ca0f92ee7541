"""What a run or a benchmark was measured on."""

from __future__ import annotations

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["machine_facts", "package_version"]


@functools.cache
def _facts() -> dict[str, str | int | None]:
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
    }


def machine_facts() -> dict[str, str | int | None]:
    """Number of cores, name of the processor, versions of what computes; ready for JSON.

    Examples:
        >>> list(machine_facts())
        ['cores', 'processor', 'python', 'torch', 'lightning']
    """
    return dict(_facts())


@functools.cache
def package_version() -> str:
    """The version of this package; "unknown" where it runs without being installed."""
    try:
        return version("lightning-async")
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
