"""``--trainer.strategy``: a registered name takes options as a class path does, and a wrong one is explained.

To jsonargparse a name is a text, and only a class path has options. So a name becomes the class path and the arguments
that it stands for where an option of it is given.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import lightning_async
from lightning_async.cli.suggestions import add_suggestion, did_you_mean
from lightning_async.strategies.registration import START_METHODS, STRATEGIES

__all__ = ["StrategyAction", "accept_options_of_names", "checked_strategy", "explain_option", "spell_out"]

_OPTION = "--trainer.strategy"
_CLASSES = ("AsyncAMSGradStrategy", "AsyncStrategy", "SimulatedDelayStrategy")
_OURS = {
    f"{name}{suffix}": (f"lightning_async.{kind}", {"start_method": start_method})
    for name, kind in STRATEGIES.items()
    for suffix, start_method in START_METHODS.items()
} | {kind: (f"lightning_async.{kind}", {}) for kind in _CLASSES}
# What is wrong with an argument's value, in a message about a class of this package.
_WRONG_VALUE = re.compile(
    r"class_path 'lightning_async\.(?P<kind>\w+)'.*?Parser key \"(?P<name>\w+)\".*?"
    r"(?:Given|Got) value: (?P<value>[^\n]*)",
    re.DOTALL,
)


def spell_out(name: str) -> dict[str, Any] | None:
    """The class path and the arguments that a strategy's name stands for; None if it stands for none.

    Args:
        name: a registered name, or the name of a class of this package.

    Examples:
        >>> spell_out("async_amsgrad_spawn")
        {'class_path': 'lightning_async.AsyncAMSGradStrategy', 'init_args': {'start_method': 'spawn'}}
        >>> spell_out("fsdp")
        {'class_path': 'lightning.pytorch.strategies.fsdp.FSDPStrategy', 'init_args': {}}
        >>> spell_out("auto")
    """
    if name in _OURS or name.lower() in _OURS:
        path, arguments = _OURS[name if name in _OURS else name.lower()]
        return {"class_path": path, "init_args": dict(arguments)}
    if name.lower() not in StrategyRegistry.available_strategies():
        return None
    entry = StrategyRegistry[name.lower()]
    kind, arguments = entry["strategy"], dict(entry["init_params"])
    if not isinstance(kind, type) or not arguments.keys() <= inspect.signature(kind).parameters.keys():
        return None
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


class StrategyAction(ActionTypeHint):
    """The argument ``--trainer.strategy`` and its options, as they are met on a command line, one after the other."""

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        take: Any = super().__call__
        if len(args) != 4:
            # jsonargparse makes its actions by a call, too.
            return take(*args, **kwargs)
        parser, config, value, option = args
        if option in self.option_strings:
            named = spell_out(value) if isinstance(value, str) else None
            if named is not None and _options_precede(parser.args, option, value):
                # As a name it would replace them.
                value = named
        else:
            self._spell_out_before(config, option)
        return take(parser, config, value, option, **kwargs)

    @override
    def _check_type_(self, value: Any, cfg: Any = None, **kwargs: Any) -> Any:
        # What YAML files say comes by here, one file after the other.
        previous = None if cfg is None else cfg.get(self.dest)
        check: Any = super()._check_type_
        return check(_with_class_path(value, previous), cfg=cfg, **kwargs)

    def _spell_out_before(self, config: Namespace, option: str) -> None:
        """Makes a class path of the name that an option is for.

        Raises:
            TypeError: if there is no strategy that the option could be for.
        """
        strategy = config.get(self.dest)
        if not isinstance(strategy, str) or "." in strategy:
            return
        spec = spell_out(strategy)
        if spec is None:
            raise argparse.ArgumentError(None, _option_of_nothing(strategy, option))
        config[self.dest] = _namespace(spec)


def _with_class_path(value: Any, previous: Any) -> Any:
    """A strategy's arguments with the class path that a name stands for, their own or that of an earlier file."""
    if not isinstance(value, (dict, Namespace)):
        return value
    given = dict(value) if isinstance(value, dict) else vars(value)
    name = given.get("class_path", previous)
    spec = spell_out(name) if isinstance(name, str) and "." not in name else None
    if spec is None:
        return value
    arguments = given.get("init_args") if {"class_path", "init_args"} & given.keys() else given
    arguments = vars(arguments) if isinstance(arguments, Namespace) else arguments or {}
    return {"class_path": spec["class_path"], "init_args": {**spec["init_args"], **arguments}}


def _namespace(spec: dict[str, Any]) -> Any:
    make: Any = Namespace  # untyped
    return make(class_path=spec["class_path"], init_args=make(**spec["init_args"]))


def _options_precede(args: Sequence[str], option: str, value: str) -> bool:
    at = [index for index, word in enumerate(args) if word in (option, f"{option}={value}")]
    return any(word.startswith(f"{option}.") for word in args[: at[-1] if at else 0])


def _option_of_nothing(strategy: str, option: str) -> str:
    if strategy == "auto":
        return (
            f'{option} is an option of no strategy: trainer.strategy is "auto". Add {_OPTION}=async_amsgrad before it'
        )
    if strategy.lower() in StrategyRegistry.available_strategies():
        kind = StrategyRegistry[strategy.lower()]["strategy"]
        return f"{strategy} takes no {option}; options go to a class: {_OPTION}={kind.__name__} before it"
    return _unknown(strategy)


def accept_options_of_names(parser: argparse.ArgumentParser) -> None:
    """Lets options follow a strategy's name on the command line, wherever the name comes from.

    Args:
        parser: has the Trainer's arguments.
    """
    action = parser._option_string_actions.get(_OPTION)
    if isinstance(action, ActionTypeHint):
        # In place: the parser has it in several tables.
        action.__class__ = StrategyAction


def checked_strategy(strategy: Any) -> Any:
    """The Trainer's argument ``strategy``, with a class path without arguments made one with arguments.

    Args:
        strategy: what was parsed.

    Returns:
        The same, or the class path's namespace: as a text it passes for a name, which Lightning refuses.

    Raises:
        ValueError: if there is no such strategy; the message says which there are, or what is missing.
    """
    if not isinstance(strategy, str):
        return strategy
    path = f"lightning_async.{strategy}" if strategy in _CLASSES else strategy
    if "." in path:
        if problem := _problem(path):
            raise ValueError(f"trainer.strategy: {problem}")
        return _namespace({"class_path": path, "init_args": {}})
    if strategy.lower() not in ("auto", *StrategyRegistry.available_strategies()):
        raise ValueError(_unknown(strategy))
    return strategy


def _unknown(strategy: str) -> str:
    names = [*STRATEGIES, *_OURS, "auto", *StrategyRegistry.available_strategies()]
    suggestion = did_you_mean(strategy, names) or (
        f"there are {', '.join(STRATEGIES)} (and these with {', '.join(filter(None, START_METHODS))}), auto, "
        "ddp and others of Lightning, and class paths"
    )
    return add_suggestion(f"trainer.strategy: there is no strategy {strategy!r}", suggestion)


def _problem(path: str) -> str | None:
    """Why no strategy can be built of a class without arguments."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        suggestion = did_you_mean(name, _CLASSES) if module == "lightning_async" else ""
        return add_suggestion(f"there is no class {path}: {error}", suggestion)
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        return f"{path} is no strategy"
    missing = [
        parameter.name
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return f"{path} needs init_args: {', '.join(missing)}" if missing else None


def explain_option(message: str) -> str | None:
    """What a strategy of this package itself says of a value that the parser has refused; None if nothing.

    Args:
        message: the parser's, which lists types.
    """
    found = _WRONG_VALUE.search(message)
    if found is None or found["kind"] not in STRATEGIES.values() or found["value"].startswith("NestedArg("):
        return None
    try:
        getattr(lightning_async, found["kind"])(**{found["name"]: found["value"]})
    except MisconfigurationException as error:
        return f"trainer.strategy: {error}"
    except Exception:
        # Of arguments that are Lightning's own.
        return None
    return None
