"""The command line `lightning-async`: LightningCLI with the asynchronous strategies registered.

The outermost room: it imports the package and nothing imports it.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_async  # noqa: F401  (registers the strategy names)

__all__ = ["AsyncCLI", "ConciseParser", "add_working_directory_to_path", "main"]


class ConciseParser(LightningArgumentParser):
    """A parser that reports what is wrong without the usage text, which lists every Trainer argument."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message to stderr and exit with status 2, or raise where the caller asked for that.

        Args:
            message: what is wrong with the arguments or the configuration.
            ex: the exception behind it.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {message}\n")


class AsyncCLI(LightningCLI):
    """LightningCLI that accepts any LightningModule and LightningDataModule by class path.

    Args:
        args: command line arguments without the program's name; `None` takes those of the process.
        run: whether the first argument is a subcommand (`fit`, `validate`, `test`, `predict`) that is
            run. If `False`, only `trainer`, `model` and `datamodule` are built.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=ConciseParser,
            args=None if args is None else list(args),
            run=run,
        )


def add_working_directory_to_path() -> None:
    """Make class paths such as `recipes.classifier.Classifier` resolve from the working directory.

    A console script has its own directory on `sys.path` instead. The processes that Lightning
    launches run the same script again and so come through here as well.
    """
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-async fit|validate|test|predict --config FILE ...`.

    Args:
        args: arguments without the program's name; `None` takes those of the process.

    Raises:
        SystemExit: with status 2 when the arguments or the configuration are wrong.
    """
    add_working_directory_to_path()
    AsyncCLI(args)
