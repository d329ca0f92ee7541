"""What a comparison is, as its YAML file says it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from jsonargparse.typing import register_type

__all__ = [
    "Arguments",
    "Comparison",
    "Label",
    "Plot",
    "Sweep",
    "Variant",
    "find_config",
    "is_comparison",
    "is_recipe",
]

# Unions as jsonargparse reads them on Python 3.10.
Label = Union[int, float, str]  # noqa: UP007


class Arguments(Mapping[str, Any]):
    """Arguments of `lightning-async fit`, without the dashes, and their values, as they are written.

    A type of its own, since in a dictionary jsonargparse completes everything that has a `class_path`; that is for
    the run's own command line to do.

    Args:
        values: the values by name.

    Raises:
        ValueError: if `values` is not a mapping from names.

    Examples:
        >>> dict(Arguments({"trainer.max_epochs": 3}))
        {'trainer.max_epochs': 3}
    """

    def __init__(self, values: object = None) -> None:
        given = {} if values is None else values
        if not isinstance(given, Mapping):
            raise ValueError(f"expected `argument: value` pairs, got {given!r}")
        self._values = dict(given)
        if wrong := [name for name in self._values if not isinstance(name, str) or name.startswith("-")]:
            raise ValueError(f"arguments are named without dashes, as in `trainer.max_epochs`, got {wrong}")

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


register_type(Arguments, serializer=dict, deserializer=Arguments, fail_already_registered=False)


@dataclass
class Variant:
    """One way to run the recipe.

    Args:
        name: what the table and the plots call it; a number where a plot has it on an axis.
        arguments: arguments of `lightning-async fit`, without the dashes, and their values.
    """

    name: Label
    arguments: Arguments = field(default_factory=Arguments)


@dataclass
class Sweep:
    """Variants that differ in one argument.

    Args:
        argument: an argument of `lightning-async fit`, without the dashes.
        values: its values, which are the variants' names too.
    """

    argument: str
    values: list[Label]


@dataclass
class Plot:
    """One picture.

    Args:
        kind: "curves": losses and metric against epoch, updates and seconds; "final": the metric after
            training, against an axis of the grid; "speedup": how many times as fast an epoch is as the
            baseline's, against an axis of the grid.
        against: the axis of the grid that lies along x; its names must be numbers. For "curves" it colours
            the lines in the order of its names, and may be left out.
        separate: an axis of the grid with a picture for each of its names.
        title: above the picture.
        name: of the file, without the suffix; made from the other arguments if left out.
    """

    kind: Literal["curves", "final", "speedup"] = "curves"
    against: str | None = None
    separate: str | None = None
    title: str = ""
    name: str = ""


@dataclass
class Comparison:
    """One recipe, trained in several variants.

    Args:
        recipe: configuration file of `lightning-async fit`.
        out: folder for the runs, the table and the plots.
        title: heading of the results.
        common: arguments of all variants, without the dashes.
        variants: the variants, if they are a list.
        grid: axes of variants, by name; every combination is run, of `variants` too if there are some.
        seeds: every variant is run with each of them (`seed_everything`).
        metric: the metric to judge by, as validation logs it.
        metric_mode: "max" if more of it is better, "min" if less.
        loss: the validation loss, as it is logged.
        target: value of the metric whose time is taken; no such column without it.
        baseline: name of the variant that the others' speed is related to; no such column without it.
        plots: the pictures; the curves of all variants if none are named.
        parallel: how many runs take place at a time. More than one disturbs the times that are measured.
        timeout_s: a run that takes longer is given up and counts as failed, in seconds.
        environment: environment variables of the runs. One thread per rank is the default, so that ranks
            that share a machine do not slow each other down.
    """

    recipe: str
    out: str
    title: str = "Comparison"
    common: Arguments = field(default_factory=Arguments)
    variants: list[Variant] = field(default_factory=list)
    grid: dict[str, Union[Sweep, list[Variant]]] = field(default_factory=dict)  # noqa: UP007
    seeds: list[int] = field(default_factory=lambda: [0])
    metric: str = "val/acc"
    metric_mode: Literal["max", "min"] = "max"
    loss: str = "val/loss"
    target: float | None = None
    baseline: str | None = None
    plots: list[Plot] = field(default_factory=list)
    parallel: int = 1
    timeout_s: float = 1800.0
    environment: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})

    def axes(self) -> Mapping[str, list[Variant]]:
        """The axes of the grid, the list of variants first, each as its variants.

        Returns:
            The variants of each axis; the list's axis is called "variant".

        Examples:
            >>> delays = Sweep("trainer.strategy.max_delay", [0, 5])
            >>> comparison = Comparison("r.yaml", "out", grid={"delay": delays})
            >>> comparison.axes()["delay"][1]
            Variant(name=5, arguments={'trainer.strategy.max_delay': 5})
        """
        axes = {"variant": self.variants} if self.variants else {}
        for name, axis in self.grid.items():
            if isinstance(axis, Sweep):
                axes[name] = [Variant(value, Arguments({axis.argument: value})) for value in axis.values]
            else:
                axes[name] = axis
        return axes

    def check(self) -> None:
        """Refuse what cannot be run or drawn.

        Raises:
            ValueError: with the field and what to write instead.
        """
        axes = self.axes()
        if not axes:
            raise ValueError("there is nothing to compare: give `variants`, a list, or `grid`, axes by name")
        if "variant" in self.grid:
            raise ValueError('an axis of `grid` cannot be called "variant", which `variants` is called')
        for name, variants in axes.items():
            names = [str(variant.name) for variant in variants]
            if not names:
                raise ValueError(f"axis {name!r} has no variants")
            # 8 and 8.0 would be one point of a plot.
            if min(len(set(names)), len({variant.name for variant in variants})) < len(names):
                raise ValueError(f"axis {name!r} has a name twice: {names}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be different numbers, at least one, got {self.seeds}")
        if self.parallel < 1:
            raise ValueError(f"`parallel` must be at least 1, got {self.parallel}")
        if self.timeout_s <= 0:
            raise ValueError(f"`timeout_s` must be positive, got {self.timeout_s}")
        for plot in self.plots:
            _check_plot(plot, axes)


def _check_plot(plot: Plot, axes: Mapping[str, list[Variant]]) -> None:
    for axis in filter(None, (plot.against, plot.separate)):
        if axis not in axes:
            raise ValueError(f"a plot names the axis {axis!r}; there are {sorted(axes)}")
    if plot.against is not None and plot.against == plot.separate:
        raise ValueError(f"a plot cannot have {plot.against!r} along x and separate pictures for each of it")
    if plot.kind == "curves":
        return
    if plot.against is None:
        raise ValueError(f'a plot of kind "{plot.kind}" needs `against`, one of {sorted(axes)}')
    words = [variant.name for variant in axes[plot.against] if isinstance(variant.name, str)]
    if words:
        raise ValueError(f"a plot has the axis {plot.against!r} along x, but {words} are not numbers")


def is_recipe(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of `lightning-async fit`.

    Examples:
        >>> is_recipe({"trainer": {"devices": 4}}), is_recipe({"recipe": "lenet5.yaml"})
        (True, False)
    """
    return not is_comparison(config) and any(key in config for key in ("trainer", "model", "data", "fit"))


def is_comparison(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of `lightning-async compare`.

    Examples:
        >>> is_comparison({"recipe": "lenet5.yaml", "out": "runs"}), is_comparison({"trainer": {"devices": 4}})
        (True, False)
    """
    return "recipe" in config and any(field.name in config for field in fields(Comparison) if field.name != "recipe")


def find_config(args: Sequence[str], matches: Callable[[Mapping[str, Any]], bool]) -> str | None:
    """The first configuration file that a command line names and that is of a kind; None if there is none.

    What cannot be read is left to the parser, which says why.

    Args:
        args: the command line.
        matches: whether a file's content is of the kind.
    """
    for word, following in itertools.pairwise([*args, ""]):
        option, _, value = word.partition("=")
        path = value or following
        if option not in ("-c", "--config") or not Path(path).is_file():
            continue
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(content, Mapping) and matches(content):
            return path
    return None
