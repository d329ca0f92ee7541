"""What a benchmark found, with its configuration: `benchmarks/results/NAME.json`.

The variable BENCHMARK_RESULTS names another folder.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "load", "save"]

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def save(name: str, arguments: dict[str, Any], found: Any) -> None:
    """Writes what was found, with the date and what it was found on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "lightning": version("lightning"),
        },
        "arguments": arguments,
        "found": found,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path.parent.name}/{path.name}")


def load(name: str) -> dict[str, Any] | None:
    """What `save` wrote, or None if that benchmark has not been run."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
