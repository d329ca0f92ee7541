"""What is not installed, said in one line that ends with the command that installs it."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["is_installed", "require"]


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported.

    Args:
        module: name of a top-level module.

    Examples:
        >>> is_installed("json"), is_installed("there_is_no_such_module")
        (True, False)
    """
    try:
        return find_spec(module) is not None
    except ValueError:
        # In sys.modules without a specification, as None is.
        return False


def require(module: str, project: str, purpose: str) -> None:
    """Raises unless a module is installed, for what would otherwise fail in every rank, in the middle of its start.

    Args:
        module: name of a top-level module.
        project: what pip calls it.
        purpose: what it is for; the beginning of a sentence.

    Raises:
        ModuleNotFoundError: with what to install.

    Examples:
        >>> require("there_is_no_such_module", "no-such-project", "the digits come with it")
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: the digits come with it, which is not installed: pip install no-such-project
    """
    if not is_installed(module):
        raise ModuleNotFoundError(f"{purpose}, which is not installed: pip install {project}", name=module)
