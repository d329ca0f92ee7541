"""From a comparison to the runs that it consists of: names, arguments, digests. Pure."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_async.cli.compare.config import Comparison, Label

__all__ = ["PlannedRun", "PlannedVariant", "argument_list", "digest", "joined", "plan_runs", "plan_variants"]


@dataclass(frozen=True)
class PlannedVariant:
    """One combination of the axes.

    Args:
        name: the names along the axes, joined; a number with its axis before it.
        labels: the name on each axis.
        arguments: of `lightning-async fit`, in the order in which they are given.
    """

    name: str
    labels: Mapping[str, Label]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One training.

    Args:
        variant: what is trained.
        seed: of the random numbers.
        folder: where its files go, relative to the comparison's folder.
    """

    variant: PlannedVariant
    seed: int
    folder: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The variant's arguments, and the seed."""
        return {**self.variant.arguments, "seed_everything": self.seed}


def joined(labels: Mapping[str, Label]) -> str:
    """Make a name of the names along the axes.

    Args:
        labels: the name on each axis.

    Returns:
        The names, with the axis before a number.

    Examples:
        >>> joined({"optimizer": "SGD", "delay": 5})
        'SGD, delay 5'
    """
    return ", ".join(label if isinstance(label, str) else f"{axis} {label}" for axis, label in labels.items())


def plan_variants(comparison: Comparison) -> list[PlannedVariant]:
    """Combine the axes.

    Later axes change fastest. An argument that several name has the value of the last one: the common ones come
    first, then the axes in their order.

    Args:
        comparison: what to compare.

    Returns:
        All combinations.

    Raises:
        ValueError: if the comparison cannot be run, or two combinations have one name.
    """
    comparison.check()
    axes = comparison.axes()
    planned = []
    for combination in itertools.product(*axes.values()):
        arguments = dict(comparison.common)
        for variant in combination:
            for key, value in variant.arguments.items():
                # At its new place: a class path must come before the arguments of its class.
                arguments.pop(key, None)
                arguments[key] = value
        labels = {axis: variant.name for axis, variant in zip(axes, combination, strict=True)}
        planned.append(PlannedVariant(joined(labels), labels, arguments))
    folders = [_slug(variant.name) for variant in planned]
    if len(set(folders)) < len(folders):
        raise ValueError(f"variants need names that differ in letters or digits, got {[v.name for v in planned]}")
    if comparison.baseline is not None and comparison.baseline not in [variant.name for variant in planned]:
        raise ValueError(f"`baseline` is {comparison.baseline!r}; the variants are {[v.name for v in planned]}")
    return planned


def plan_runs(comparison: Comparison) -> list[PlannedRun]:
    """List the runs: all variants with the first seed, then with the next, so that an early end leaves something.

    Args:
        comparison: what to compare.

    Returns:
        The runs, each with a folder of its own.
    """
    variants = plan_variants(comparison)
    return [
        PlannedRun(variant, seed, f"runs/{_slug(variant.name)}/seed-{seed}")
        for seed in comparison.seeds
        for variant in variants
    ]


def argument_list(arguments: Mapping[str, Any]) -> list[str]:
    """Write arguments as a command line has them.

    Args:
        arguments: values by name, without the dashes.

    Returns:
        One word for each argument.

    Examples:
        >>> argument_list({"trainer.strategy": "ddp", "trainer.logger": False, "model.betas": [0.9, 0.99]})
        ['--trainer.strategy=ddp', '--trainer.logger=false', '--model.betas=[0.9, 0.99]']
    """
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in arguments.items()
    ]


def digest(recipe: str, run: PlannedRun, environment: Mapping[str, str]) -> str:
    """Tell whether two runs are the same by what goes into them.

    Args:
        recipe: the recipe's text.
        run: the run.
        environment: the environment variables that are set for it.

    Returns:
        A fingerprint of the recipe, the arguments in their order, and the environment; not of the code.
    """
    parts = [recipe, argument_list(run.arguments), sorted(environment.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _slug(name: str) -> str:
    # A negative number must not end up in the folder of its absolute value.
    return re.sub(r"[^\w.]+", "-", name.replace(" -", " minus ")).strip("-.").lower()
