"""``--trainer.strategy`` takes a name with options, from wherever the name comes, and explains what is wrong."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

import lightning_async
from lightning_async import AsyncAMSGradStrategy, AsyncStrategy
from lightning_async.cli.app import AsyncCLI, main
from lightning_async.cli.strategy_argument import spell_out
from lightning_async.strategies.registration import START_METHODS, STRATEGIES

RECIPE = str(Path(__file__).parents[3] / "recipes" / "lenet5_digits.yaml")
NAMED = "{trainer: {strategy: async_fork}}"
BOUND = "{trainer: {strategy: {init_args: {max_staleness: 3}}}}"


@pytest.fixture(autouse=True)
def no_arguments_of_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)


def strategy_of(*arguments: str) -> Any:
    return AsyncCLI(["--config", RECIPE, *arguments], run=False).trainer.strategy


def file_of(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return f"--config={folder / name}"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    lines = [line for line in message.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", [f"{plain}{suffix}" for plain in STRATEGIES for suffix in START_METHODS])
def test_a_name_spelt_out_makes_what_the_name_makes(name: str) -> None:
    by_name = StrategyRegistry.get(name)

    spec = spell_out(name)

    assert spec is not None
    spelt_out = getattr(lightning_async, spec["class_path"].rpartition(".")[2])(**spec["init_args"])
    assert type(spelt_out) is type(by_name)
    assert spelt_out._start_method == by_name._start_method


@pytest.mark.parametrize(
    ("arguments", "kind", "bound", "start_method"),
    [
        # The recipe says `strategy: async_amsgrad`.
        (["--trainer.strategy.max_staleness=4"], AsyncAMSGradStrategy, 4, "popen"),
        (["--trainer.strategy.init_args.max_staleness=4"], AsyncAMSGradStrategy, 4, "popen"),
        (["--trainer.strategy=async_amsgrad", "--trainer.strategy.max_staleness=4"], AsyncAMSGradStrategy, 4, "popen"),
        (["--trainer.strategy", "async_spawn", "--trainer.strategy.max_staleness", "4"], AsyncStrategy, 4, "spawn"),
        (["--trainer.strategy=async_amsgrad_fork"], AsyncAMSGradStrategy, "auto", "fork"),
        (["--trainer.strategy=AsyncStrategy", "--trainer.strategy.max_staleness=null"], AsyncStrategy, None, "popen"),
        # A name after its options does not drop them.
        (["--trainer.strategy.max_staleness=4", "--trainer.strategy=async_fork"], AsyncStrategy, 4, "fork"),
    ],
)
def test_options_follow_a_name_on_the_command_line(
    arguments: list[str], kind: type, bound: int | str | None, start_method: str
) -> None:
    strategy = strategy_of(*arguments)

    assert type(strategy) is kind
    assert strategy.options.max_staleness == bound
    assert strategy._start_method == start_method


def test_a_name_on_the_command_line_replaces_the_options_of_a_file(tmp_path: Path) -> None:
    spec = "{class_path: lightning_async.AsyncStrategy, init_args: {max_staleness: 3, on_stale: drop}}"
    file = file_of(tmp_path, "a.yaml", f"{{trainer: {{strategy: {spec}}}}}")

    strategy = strategy_of(file, "--trainer.strategy=async_amsgrad", "--trainer.strategy.max_staleness=4")

    assert type(strategy) is AsyncAMSGradStrategy
    assert (strategy.options.max_staleness, strategy.options.on_stale) == (4, "wait")


@pytest.mark.parametrize(
    "files",
    [
        [NAMED, BOUND],
        ["{trainer: {strategy: {class_path: async_fork, init_args: {max_staleness: 3}}}}"],
        [NAMED, "{trainer: {strategy: {max_staleness: 3}}}"],
    ],
    ids=["file after file", "as a class path", "without init_args"],
)
def test_options_follow_a_name_in_files(tmp_path: Path, files: list[str]) -> None:
    given = [file_of(tmp_path, f"{index}.yaml", text) for index, text in enumerate(files)]

    strategy = strategy_of(*given, "--trainer.strategy.on_stale=drop")

    assert type(strategy) is AsyncStrategy
    assert (strategy.options.max_staleness, strategy.options.on_stale) == (3, "drop")
    assert strategy._start_method == "fork"


def test_a_name_of_lightning_takes_options_too() -> None:
    strategy = strategy_of("--trainer.strategy=ddp_fork", "--trainer.strategy.process_group_backend=gloo")

    assert type(strategy) is DDPStrategy
    assert (strategy.process_group_backend, strategy._start_method) == ("gloo", "fork")


def test_the_printed_configuration_of_a_name_with_options_is_valid_and_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.strategy=async_fork", "--trainer.strategy.max_staleness=4"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", RECIPE, *options, "--print_config"])
    printed = capsys.readouterr().out

    with pytest.raises(SystemExit):
        main(["fit", file_of(tmp_path, "printed.yaml", printed), "--print_config"])

    again = capsys.readouterr().out
    strategy = yaml.safe_load(again)["trainer"]["strategy"]
    assert again == printed
    assert strategy["class_path"] == "lightning_async.AsyncStrategy"
    assert (strategy["init_args"]["max_staleness"], strategy["init_args"]["start_method"]) == (4, "fork")


def test_a_name_without_options_stays_a_name_in_the_printed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", RECIPE, "--trainer.strategy=async_spawn", "--print_config"])

    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"] == "async_spawn"


def test_the_parser_goes_to_spawned_ranks() -> None:
    parser = AsyncCLI(["--config", RECIPE], run=False).parser

    config = pickle.loads(pickle.dumps(parser)).parse_args(["--config", RECIPE, "--trainer.strategy.max_staleness=4"])

    assert config.trainer.strategy.init_args.max_staleness == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("async_amsgard", "there is no strategy 'async_amsgard'; did you mean async_amsgrad?"),
        ("asnyc", "there is no strategy 'asnyc'; did you mean async?"),
        ("async_amsgrad_notbook", "did you mean async_amsgrad_notebook?"),
        ("dpp", "did you mean ddp?"),
        ("horovod", "there are async_amsgrad, async (and these with _spawn, _fork, _notebook), auto, ddp and others"),
        ("AsyncAMSGradStratgy", "did you mean AsyncAMSGradStrategy?"),
        ("lightning_async.AsyncStratgy", "there is no class lightning_async.AsyncStratgy"),
        ("lightning_async.AsyncStratgy", "did you mean AsyncStrategy?"),
    ],
)
def test_a_misspelt_strategy_is_told_with_what_was_meant(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(["fit", "--config", RECIPE, f"--trainer.strategy={given}"], capsys)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("max_staleness=four", "an int of at least 0, \"auto\" (4 per rank) or None (no bound), not 'four'"),
        ("max_staleness=-1", 'an int of at least 0, "auto" (4 per rank) or None (no bound), not -1'),
        ("transport=mpi", "one of 'auto', 'shm', 'tcp', 'nccl', not 'mpi'"),
        ("worker_timeout=soon", "a positive number of seconds, not 'soon'"),
        ("start_method=pop", "one of 'popen', 'spawn', 'fork', 'forkserver'. Got value: pop"),
        ("max_stalness=4", "'max_stalness' is not accepted; did you mean max_staleness?"),
    ],
)
def test_a_wrong_option_is_told_with_what_is_valid(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(["fit", "--config", RECIPE, f"--trainer.strategy.{given}"], capsys)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("auto", 'trainer.strategy is "auto". Add --trainer.strategy=async_amsgrad before it'),
        ("asnyc", "did you mean async?"),
        ("ddp_find_unused_parameters_true", "options go to a class: --trainer.strategy=DDPStrategy before it"),
    ],
)
def test_an_option_of_no_strategy_is_told_what_to_add(
    strategy: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--trainer.strategy={strategy}", "--trainer.strategy.max_staleness=4"]

    assert said in error_of(["fit", "--config", RECIPE, *arguments], capsys)
