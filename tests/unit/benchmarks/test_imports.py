"""What benchmarks and recipes import of the package is there, also inside of functions.

Rooms look their names up when they are first used, so that a type checker believes any name.
"""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted(path.relative_to(ROOT) for folder in ("benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_name_that_is_imported_of_the_package_is_there(path: Path) -> None:
    wanted = [
        (node.module, name.name)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lightning_async"
        for name in node.names
        if node.module != "lightning_async.ray"
    ]

    missing = [
        f"{module}.{name}"
        for module, name in wanted
        if not hasattr(importlib.import_module(module), name) and find_spec(f"{module}.{name}") is None
    ]

    assert missing == []
