"""A measurement: what a benchmark found over its runs, with its arguments, the date and the machine.

One JSON file for each benchmark, `benchmarks/results/NAME.json`; the variable BENCHMARK_RESULTS names another folder.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from lightning_async.monitoring.machine import machine_facts
from lightning_async.monitoring.versioned import Format

__all__ = ["RESULTS", "load", "save"]

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
_FORMAT = Format("lightning_async measurement", 1, "a benchmark's measurement", "Run the benchmark anew.")


def save(name: str, arguments: dict[str, Any], found: Any) -> None:
    """Writes what was found, with the date and what it was found on."""
    path = RESULTS / f"{name}.json"
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine_facts(),
        "arguments": arguments,
        "found": found,
    }
    _FORMAT.write(path, content, indent=1)
    print(f"written to {path.parent.name}/{path.name}")


def load(name: str) -> dict[str, Any] | None:
    """What `save` wrote, or None if that benchmark has not been run."""
    path = RESULTS / f"{name}.json"
    return _FORMAT.read(path, unnamed=True) if path.exists() else None
