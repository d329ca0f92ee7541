"""What a misspelt word was probably meant to be."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

__all__ = ["add_suggestion", "did_you_mean", "with_suggestions"]

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_OPTION_OF_CLASS = re.compile(r"class_path '([\w.]+)'.*?Option '([\w.]+)' is not accepted", re.DOTALL)
_OPTION_OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
_OPTION_OF_PARSER = re.compile(r"(?:does not accept option|Option) '([\w.]+)'(?: is not accepted)?")
_NO_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A question that names the candidate closest to a word; empty if none is close.

    Args:
        word: what was written.
        candidates: what could have been written.

    Examples:
        >>> did_you_mean("asnyc", ["ddp", "async", "async_spawn"])
        'did you mean async?'
        >>> did_you_mean("horovod", ["ddp", "async"])
        ''
    """
    close = difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=1)
    return f"did you mean {close[0]}?" if close else ""


def add_suggestion(message: str, suggestion: str) -> str:
    """Appends a question to a message, if there is one.

    Examples:
        >>> add_suggestion("there is no asnyc.", "did you mean async?")
        'there is no asnyc; did you mean async?'
    """
    return f"{message.rstrip().removesuffix('.')}; {suggestion}" if suggestion else message


def with_suggestions(message: str, parser: argparse.ArgumentParser) -> str:
    """Completes a parser's message about an unknown option or command by what was probably meant.

    Args:
        message: what the parser says.
        parser: the parser; knows the options that there are.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--trainer.max_epochs")
        >>> with_suggestions("unrecognized arguments: --trainer.max_epoch=3", parser)
        'unrecognized arguments: --trainer.max_epoch=3; did you mean --trainer.max_epochs?'
    """
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    suggestion = ""
    if found := _UNRECOGNIZED.search(message):
        words = [word.partition("=")[0] for word in found[1].split() if word.startswith("--")]
        suggestion = next(filter(None, (did_you_mean(word, options) for word in words)), "")
    elif found := _OPTION_OF_CLASS.search(message):
        suggestion = did_you_mean(found[2], _arguments_of(found[1]))
    elif found := _OPTION_OF_GROUP.search(message):
        suggestion = did_you_mean(f"{found[1]}.{found[2]}", [option[2:] for option in options])
    elif found := _OPTION_OF_PARSER.search(message):
        suggestion = did_you_mean(found[1], [option[2:] for option in options])
    elif found := _NO_CHOICE.search(message):
        suggestion = did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
    return add_suggestion(message, suggestion)


def _arguments_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
