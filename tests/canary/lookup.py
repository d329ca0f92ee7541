"""What the canary tests look at: the sources of the package, and what they use of Lightning, torch and torchmetrics."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lightning_async

__all__ = ["PACKAGE", "fail", "private_imports", "private_uses", "resolve", "sources"]

PACKAGE = Path(lightning_async.__file__).parent
WATCHED = ("lightning", "torch", "torchmetrics")


def fail(file: str, what: str) -> None:
    pytest.fail(f"lightning_async/{file} relies on {what}; see what it does there and adapt it", pytrace=False)


def resolve(path: str, file: str) -> Any:
    """The object at a dotted path: a module, then attributes."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            if not hasattr(found, name):
                fail(file, f"{path}, and there is no {name}")
            found = inspect.getattr_static(found, name) if isinstance(found, type) else getattr(found, name)
        return found
    return fail(file, f"{path}, which cannot be imported")


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package, by its path in it."""
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def private_imports() -> Iterator[tuple[str, str]]:
    """Every ``from lightning... import _name`` of the package: file, dotted path."""
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in WATCHED:
                names = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                names = [name.name for name in node.names if name.name.split(".")[0] in WATCHED]
            else:
                continue
            yield from ((file, name) for name in names if any(part.startswith("_") for part in name.split(".")))


@cache
def private_uses() -> tuple[tuple[str, str], ...]:
    """Every ``other._name`` of the package, and every ``self._name`` that the package defines nowhere: file, name."""
    return tuple(_find_private_uses())


def _find_private_uses() -> Iterator[tuple[str, str]]:
    own = {name for tree in sources().values() for name in _defined(tree)}
    seen = set()
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if _is_self(node.value) and node.attr in own:
                continue
            if (file, node.attr) not in seen:
                seen.add((file, node.attr))
                yield file, node.attr


def _is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names of functions and classes, of class attributes, and of what is assigned to on ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.target.id
                elif isinstance(statement, ast.Assign):
                    yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
