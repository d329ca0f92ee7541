"""The parser of `lightning-async`: LightningCLI with the asynchronous strategies registered, and two commands more."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionSubCommands, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import lightning_async  # registers the strategy names
from lightning_async.cli.compare import compare_main, compare_parser
from lightning_async.cli.compare.config import find_config, is_comparison
from lightning_async.cli.completion import offer_strategy_names
from lightning_async.cli.errors import is_debugging, one_line, told_in_one_line
from lightning_async.cli.report_line import ReportAtTheEnd, add_monitor
from lightning_async.cli.requirements import is_installed
from lightning_async.cli.strategy_argument import accept_options_of_names, checked_strategy, explain_option
from lightning_async.cli.suggestions import with_suggestions

__all__ = ["AsyncCLI", "ConciseParser", "add_working_directory_to_path", "main"]

_PROGRAM = "lightning-async"
_DESCRIPTION = (
    "Asynchronous data-parallel training with bounded staleness. Model and data are named by class path, in a YAML "
    "file or on the command line; classes in the working directory are found."
)
_EPILOGUE = (
    "example: lightning-async demo --trainer.max_epochs=5 "
    "(JSONARGPARSE_DEBUG=1 in the environment shows the traceback behind a one-line error)"
)
_SUMMARIES = {
    "fit": "train a model",
    "validate": "evaluate a model on the validation set",
    "test": "evaluate a model on the test set",
    "predict": "let a model predict",
    "compare": "train one recipe in several variants; write a table and plots",
    "report": "show a run as one HTML page; --serve shows one that goes on",
    "plan": "say what asynchronous training would do with given step times",
    "demo": "train a small network with this strategy and with DDP, side by side",
    "join": "add a worker to a fit that is under way, from any machine",
    "run": "run a command, and start it again when it is killed or fails",
    "chaos": "run a command, and kill a random rank of it every so often",
}


class _Commands(ActionSubCommands):
    """Subcommands with one line of help each, where LightningCLI would show the Trainer's docstrings."""

    @override
    def add_subcommand(self, name: str, parser: Any, **kwargs: Any) -> Any:
        kwargs["help"] = _SUMMARIES.get(name, kwargs.get("help"))
        return super().add_subcommand(name, parser, **kwargs)


class ConciseParser(LightningArgumentParser):
    """A parser that reports what is wrong in one line, without the usage text, which lists every Trainer argument."""

    commands: ActionSubCommands | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Else a misspelt `--trainer.max_epoch` passes for the argument that it abbreviates, which YAML refuses.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def add_subcommands(self, *args: Any, **kwargs: Any) -> ActionSubCommands:
        """Add subcommands, and keep the action that more of them can be added to."""
        heading = {"title": "commands", "metavar": "COMMAND", "description": f"{_PROGRAM} COMMAND --help says more."}
        self.commands = super().add_subcommands(*args, **{"action": _Commands, **heading, **kwargs})
        return self.commands

    @override
    def get_completion_script(self, completion_type: str, **kwargs: Any) -> str:
        """Write what a shell completes the arguments with, strategies by name included.

        Args:
            completion_type: `shtab-bash` and others, as `--print_completion` offers them.
            kwargs: further arguments of jsonargparse.

        Returns:
            The script.
        """
        if self.commands is not None and completion_type.startswith("shtab-"):
            offer_strategy_names(self.commands.choices.values())
        return super().get_completion_script(completion_type, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message to stderr and exit with status 2, or raise where the caller asked for that.

        Args:
            message: what is wrong with the arguments or the configuration.
            ex: the exception behind it.
        """
        if not self.exit_on_error or is_debugging():
            super().error(message, ex)
        if self.commands is not None and "but it was not provided" in message:
            message = f"a command is missing: one of {', '.join(self.commands.choices)}"
        said = explain_option(message) or with_suggestions(one_line(message), getattr(ex, "subcommand_parser", self))
        self.exit(2, f"error: {said}\n")


class AsyncCLI(LightningCLI):
    """LightningCLI that accepts any LightningModule and LightningDataModule by class path.

    Args:
        args: command line arguments without the program's name; `None` takes those of the process.
        run: whether the first argument is a subcommand (`fit`, `validate`, `test`, `predict`) that is
            run. If `False`, only `trainer`, `model` and `datamodule` are built.
        on_fit: is called with the Trainer before a fit.
    """

    def __init__(
        self,
        args: Sequence[str] | None = None,
        run: bool = True,
        on_fit: Callable[[Trainer], None] | None = None,
    ) -> None:
        self._on_fit = on_fit
        commands = {
            name: {
                "usage": f"{_PROGRAM} {name} --config FILE [options]",
                # The Trainer's docstrings begin with half a sentence.
                "description": f"{_SUMMARIES[name].capitalize()}.",
            }
            for name in self.subcommands()
        }
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"strategy": "async_amsgrad"},
            parser_kwargs={
                "description": _DESCRIPTION,
                "epilog": _EPILOGUE,
                "prog": _PROGRAM,
                "version": lightning_async.__version__,
                **commands,
            }
            if run
            else {},
            parser_class=ConciseParser,
            args=None if args is None else list(args),
            run=run,
        )

    @override
    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parser; list the commands that do not run a Trainer beside those that do."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        commands: ActionSubCommands | None = getattr(self.parser, "commands", None)
        if commands is not None:
            # For the help and for shell completion: `main` hands their arguments to their own parsers.
            for name in _OTHER_COMMANDS:
                parser = compare_parser() if name == "compare" else ConciseParser(description=_SUMMARIES[name])
                commands.add_subcommand(name, parser)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let options follow a strategy's name."""
        accept_options_of_names(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; a command that runs no Trainer is not for this class.

        Raises:
            SystemExit: with status 2 if the arguments are wrong.
        """
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            parser.error(f"a configuration file is not text: {error}", error)
        command = self.config.get("subcommand")
        if command in _OTHER_COMMANDS:
            parser.error(f"`{command}` takes no options before it: {_PROGRAM} {command} [options]")

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning reads the checkpoint's hyperparameters, outside of all that reports errors.
        try:
            super()._parse_ckpt_path()
        except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
            path = self.config[self.config.subcommand].ckpt_path
            self.parser.error(f"{path} cannot be read as a checkpoint: {error}", error)

    @override
    def instantiate_classes(self) -> None:
        """Build model, data and Trainer; what they refuse is an error of the configuration.

        Raises:
            SystemExit: with status 2 if an argument's value is refused.
        """
        if _logs_to(self._get(self.config, "trainer.logger"), "WandbLogger") and not is_installed("wandb"):
            self.parser.error("WandbLogger logs with wandb, which is not installed: pip install wandb")
        trainer = self._get(self.config, "trainer")
        try:
            trainer["strategy"] = checked_strategy(trainer["strategy"])
            super().instantiate_classes()
        except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
            self.parser.error(str(error), error)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer; an asynchronous one that fits leaves a record.

        Args:
            kwargs: arguments of the Trainer that override the configuration's.

        Returns:
            The Trainer.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand in (None, "fit"):
            add_monitor(trainer)
        return trainer

    def before_fit(self) -> None:
        """Called by LightningCLI."""
        if self._on_fit is not None:
            self._on_fit(self.trainer)


def _logs_to(loggers: Any, kind: str) -> bool:
    """Whether a logger of the configuration is of a class with this name."""
    paths = [getattr(logger, "class_path", "") for logger in (loggers if isinstance(loggers, list) else [loggers])]
    return any(path.rpartition(".")[2] == kind for path in paths)


def add_working_directory_to_path() -> None:
    """Make class paths such as `recipes.classifier.Classifier` resolve from the working directory.

    A console script has its own directory on `sys.path` instead. The processes that Lightning
    launches run the same script again and so come through here as well.
    """
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _report(args: Sequence[str]) -> int:
    # Imported when it is called: what it needs to draw is of no use to a training rank.
    report: Any = importlib.import_module("lightning_async.monitoring.report")
    return int(report.report_main(list(args)))


def _plan(args: Sequence[str]) -> int:
    # Imported when it is called: training ranks do not need it.
    plan: Any = importlib.import_module("lightning_async.cli.plan")
    return int(plan.plan_main(list(args)))


def _demo(args: Sequence[str]) -> int:
    # Imported when it is called: its trainings are command lines of this module.
    demo: Any = importlib.import_module("lightning_async.cli.demo")
    return int(demo.demo_main(list(args)))


def _join(args: Sequence[str]) -> int:
    # Imported when it is called, as the others.
    join: Any = importlib.import_module("lightning_async.cli.join")
    join.join_main(list(args))
    return 0


def _run(args: Sequence[str]) -> int:
    # Imported when it is called: training ranks do not need it.
    run: Any = importlib.import_module("lightning_async.cli.run")
    return int(run.run_main(list(args)))


def _chaos(args: Sequence[str]) -> int:
    # Imported when it is called: training ranks do not need it.
    chaos: Any = importlib.import_module("lightning_async.chaos.command")
    return int(chaos.chaos_main(list(args)))


_OTHER_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": compare_main,
    "report": _report,
    "plan": _plan,
    "demo": _demo,
    "join": _join,
    "run": _run,
    "chaos": _chaos,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-async fit|validate|test|predict|compare|report|plan|demo|join|run|chaos ...`.

    Args:
        args: arguments without the program's name; `None` takes those of the process.

    Raises:
        SystemExit: with status 2 when the arguments or the configuration are wrong; with the status of
            `compare`, `report`, `demo`, `run` and `chaos` when they are done.
    """
    add_working_directory_to_path()
    given = list(sys.argv[1:] if args is None else args)
    with ReportAtTheEnd() as report, told_in_one_line():
        if given and given[0] in _OTHER_COMMANDS:
            sys.exit(_OTHER_COMMANDS[given[0]](given[1:]))
        if (comparison := find_config(given, is_comparison)) is not None:
            told = f"{comparison} is a comparison, of several runs: lightning-async compare --config {comparison}"
            raise MisconfigurationException(told)
        set_parsing_settings(add_print_completion_argument=True)
        AsyncCLI(args, on_fit=report.expect)
