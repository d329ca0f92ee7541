"""Imports what the other steps run, so that what is missing is known by name: ``python -m tests.gpu.kit_imports``."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

__all__ = ["main", "modules"]


def main() -> int:
    """Exits with 1 if anything cannot be imported."""
    failed = []
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception:  # noqa: PERF203  # each may fail by itself
            failed.append(name)
            print(f"--- {name}")
            traceback.print_exc()
    print(f"{len(modules()) - len(failed)} modules imported" + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def modules() -> list[str]:
    """The package, the benchmarks that are run, and the tests that need a GPU."""
    benchmarks = [f"benchmarks.{name}" for name in ("ceiling", "floor", "holder", "overhead", "rank0", "scaling")]
    tests = [f"tests.gpu.{path.stem}" for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]
    return ["lightning_async", "lightning_async.cli.app", *benchmarks, *tests]


if __name__ == "__main__":
    sys.exit(main())
