"""Every way to start the ranks, and every way to ask for the strategy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.trainer.connectors import accelerator_connector

from lightning_async import AsyncAMSGradStrategy
from lightning_async.cli.app import AsyncCLI, main
from lightning_async.runtime.listening import reserved
from tests.launch import ENVIRONMENT, Launched, launch, report, run_as_script
from tests.models import TinyClassifier, fork_trainer, loader

BATCHES = 24

PREAMBLE = """
import multiprocessing
from pathlib import Path
import torch
from lightning.pytorch import Trainer
from lightning_async import AsyncAMSGradStrategy
from tests.launch import report
from tests.models import TinyClassifier, fork_trainer, loader

folder = Path.cwd()

class Module(TinyClassifier):
    def on_train_end(self):
        report(folder, self.global_rank, batches=self.batches, parameters=self.flat_parameters())
"""

EVERY_RANK_RUNS_THIS = """
trainer = fork_trainer(folder, 2, "async_amsgrad")
module = Module()
trainer.fit(module, loader(96), loader(24))
trainer.save_checkpoint(folder / "after.ckpt")
result = trainer.validate(module, loader(24))
torch.save(result, folder / f"validated{trainer.global_rank}.pt")
if trainer.is_global_zero:
    torch.save(trainer.strategy.stats.as_dict(), folder / "stats.pt")
"""

ONE_PROCESS_RUNS_THIS = """
if __name__ == "__main__":
    # The server of forks imports once for both of its ranks.
    multiprocessing.set_forkserver_preload(["lightning_async.strategies.amsgrad", "tests.models"])
    trainer = fork_trainer(folder, 2, {strategy})
    module = Module()
    trainer.fit(module, loader(96))
    stats = trainer.strategy.stats.as_dict()
    torch.save((stats, module.flat_parameters()), folder / "after.pt")
"""


def run_script(folder: Path, text: str) -> Launched:
    """Runs a script file; its first process is forked, the others are started as a user's would be."""
    (folder / "train.py").write_text(PREAMBLE + text)
    return launch(lambda folder: run_as_script(folder / "train.py"), folder, timeout_s=100.0)


def run_command(folder: Path, text: str, *runner: str) -> Launched:
    """Runs a script file as a user would."""
    (folder / "train.py").write_text(PREAMBLE + text)
    command = [sys.executable, *runner, "train.py"]
    return launch(lambda folder: os.execve(command[0], command, os.environ | ENVIRONMENT), folder, timeout_s=100.0)


@pytest.mark.parametrize("launcher", ["python", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_a_script_trains_validates_and_saves_on_all_its_ranks(tmp_path: Path, launcher: str) -> None:
    with reserved(0) as port:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
        if launcher == "python":
            run = run_script(tmp_path, EVERY_RANK_RUNS_THIS)
        else:
            run = run_command(tmp_path, EVERY_RANK_RUNS_THIS, *torchrun)

    assert run.returncode == 0, run.output
    first, second = run.reports()
    assert first["batches"] + second["batches"] == BATCHES
    assert torch.equal(first["parameters"], second["parameters"])
    stats, saved = torch.load(tmp_path / "stats.pt"), torch.load(tmp_path / "after.ckpt")
    assert stats["updates"] == BATCHES
    assert stats["batches_by_rank"] == {0: first["batches"], 1: second["batches"]}
    assert {values["step"].item() for values in saved["optimizer_states"][0]["state"].values()} == {BATCHES}
    assert torch.equal(torch.cat([value.flatten() for value in saved["state_dict"].values()]), first["parameters"])
    assert torch.load(tmp_path / "validated0.pt") == torch.load(tmp_path / "validated1.pt")


TRAINERS_OF_ONE_TWO_AND_THREE_RANKS = """
import os
from lightning.pytorch.utilities.exceptions import MisconfigurationException

if "LOCAL_RANK" not in os.environ:
    fork_trainer(folder, 1, "async_amsgrad").fit(TinyClassifier(), loader(8))
fork_trainer(folder, 2, "async_amsgrad").fit(Module(), loader(96))
try:
    fork_trainer(folder, 3, "async_amsgrad").fit(TinyClassifier(), loader(8))
except MisconfigurationException as error:
    (folder / f"refused{os.environ['LOCAL_RANK']}").write_text(str(error))
"""


def test_no_trainer_of_a_script_waits_for_ranks_that_nobody_starts(tmp_path: Path) -> None:
    run = run_script(tmp_path, TRAINERS_OF_ONE_TWO_AND_THREE_RANKS)

    assert run.returncode == 0, run.output
    assert sum(rank["batches"] for rank in run.reports()) == BATCHES
    for rank in range(2):
        refusal = (tmp_path / f"refused{rank}").read_text()
        assert refusal.startswith("An earlier Trainer of this script has started 2 ranks")
        assert 'strategy="async_amsgrad_spawn"' in refusal


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param('"async_amsgrad_spawn"', id="spawn"),
        pytest.param(
            'AsyncAMSGradStrategy(max_staleness=5, start_method="forkserver")', marks=pytest.mark.soak, id="forkserver"
        ),
    ],
)
def test_spawned_ranks_give_parameters_and_statistics_to_the_process_that_started_them(
    tmp_path: Path, strategy: str
) -> None:
    run = run_script(tmp_path, ONE_PROCESS_RUNS_THIS.format(strategy=strategy))

    assert run.returncode == 0, run.output
    stats, parameters = torch.load(tmp_path / "after.pt")
    assert sum(rank["batches"] for rank in run.reports()) == stats["updates"] == BATCHES
    assert all(torch.equal(rank["parameters"], parameters) for rank in run.reports())


@pytest.mark.parametrize("strategy", ["async_amsgrad_fork", "async_amsgrad_notebook"])
def test_forked_ranks_give_parameters_and_statistics_to_the_process_that_started_them(
    tmp_path: Path, strategy: str
) -> None:
    def script(folder: Path) -> None:
        class Module(TinyClassifier):
            def on_train_end(self) -> None:
                report(folder, self.global_rank, parameters=self.flat_parameters())

        trainer = fork_trainer(folder, 2, strategy)
        module = Module()
        trainer.fit(module, loader(96))
        torch.save((trainer.strategy.stats.as_dict(), module.flat_parameters()), folder / "after.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    stats, parameters = torch.load(tmp_path / "after.pt")
    assert stats["updates"] == sum(stats["updates_by_rank"].values()) == BATCHES
    assert all(torch.equal(rank["parameters"], parameters) for rank in run.reports())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("before", ["async_amsgrad", "ddp"])
def test_ranks_are_forked_from_a_process_that_has_fit_alone(tmp_path: Path, before: str, ranks: int) -> None:
    """It has a process group, whose threads no fork has."""

    def script(folder: Path) -> None:
        alone = fork_trainer(folder, 1, before)
        alone.fit(TinyClassifier(), loader(8))
        forked = fork_trainer(folder, ranks)
        forked.fit(TinyClassifier(), loader(96), loader(24))
        torch.save((forked.strategy.stats.updates, torch.distributed.is_initialized()), folder / "after.pt")
        alone.validate(TinyClassifier(), loader(8))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert torch.load(tmp_path / "after.pt") == (24, False)


def test_a_sessions_next_trainer_does_not_insist_on_a_port_that_is_anothers_by_now(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        first = fork_trainer(folder, 2, "async_amsgrad_notebook")
        first.fit(TinyClassifier(), loader(8))
        assert "MASTER_PORT" not in os.environ
        environment = first.strategy.cluster_environment
        assert environment is not None
        with socket.create_server(("", environment.main_port)):
            fork_trainer(folder, 2, "async_amsgrad_notebook").fit(TinyClassifier(), loader(8))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output


TYPED = """
from pathlib import Path
import lightning_async
from lightning.pytorch import Trainer
from lightning_async import AsyncAMSGradStrategy

class Mine(AsyncAMSGradStrategy): strategy_name = "mine"

def ask(strategy):
    try:
        Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    except Exception as error:
        return str(error)

strategies = ["async_amsgrad", "async", "async_spawn", AsyncAMSGradStrategy(max_staleness=3), Mine()]
strategies += ["async_amsgrad_notebook", AsyncAMSGradStrategy(start_method="fork")]
Path("answers").write_text("\\n".join(str(ask(each)) for each in strategies))
"""


def type_into_an_interpreter(folder: Path) -> None:
    command = [sys.executable, "-i", "-q"]
    typed = {"input": TYPED, "text": True, "capture_output": True}
    subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=folder, timeout=60, check=True, **typed)


def type_into_a_fork(folder: Path) -> None:
    def script(folder: Path) -> None:
        # What Lightning has asked when it was imported.
        accelerator_connector._IS_INTERACTIVE = True  # type: ignore[attr-defined]
        exec(TYPED, {"__name__": "__main__"})

    run = launch(script, folder)
    assert run.returncode == 0, run.output


@pytest.mark.parametrize(
    "type_into", [type_into_a_fork, pytest.param(type_into_an_interpreter, marks=pytest.mark.soak)]
)
def test_an_interactive_session_is_told_which_strategy_works_there(
    tmp_path: Path, type_into: Callable[[Path], None]
) -> None:
    type_into(tmp_path)

    plain, any_optimizer, spawned, instance, mine, notebook, forked = (tmp_path / "answers").read_text().split("\n")
    by_name = (
        'Take strategy="async_amsgrad_notebook", or with options strategy=AsyncAMSGradStrategy(start_method="fork"'
    )
    assert by_name in plain
    assert by_name in instance
    for answer in (any_optimizer, spawned):
        assert 'Take strategy="async_notebook", or with options strategy=AsyncStrategy(start_method="fork"' in answer
    # It is registered under no name.
    assert 'Take strategy=Mine(start_method="fork"' in mine
    assert notebook == forked == "None"


def write_config(folder: Path, strategy: Any) -> str:
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 1,
            "limit_train_batches": 3,
            "strategy": strategy,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
        "model": {
            "class_path": "recipes.classifier.Classifier",
            "init_args": {"model": {"class_path": "recipes.models.LeNet5"}},
        },
        "data": {"class_path": "recipes.digits.DigitsDataModule"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_strategy_by_class_path_and_arguments_trains_from_the_command_line(tmp_path: Path) -> None:
    arguments = {"max_staleness": 2, "on_stale": "drop", "batches": "sharded", "start_method": "fork"}
    strategy = {"class_path": "lightning_async.AsyncAMSGradStrategy", "init_args": arguments}
    config = write_config(tmp_path, strategy)

    def script(folder: Path) -> None:
        sys.argv = ["lightning-async"]
        main(["fit", "--config", config])

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    metrics = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    assert "async/version" in metrics.read_text()


@pytest.mark.parametrize("named", ["AsyncAMSGradStrategy", "lightning_async.AsyncAMSGradStrategy"])
def test_a_strategys_arguments_can_be_given_on_the_command_line(
    tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])
    config = write_config(tmp_path, "auto")
    arguments = [
        f"--trainer.strategy={named}",
        "--trainer.strategy.max_staleness=7",
        "--trainer.strategy.on_stale=drop",
    ]

    cli = AsyncCLI(["--config", config, *arguments], run=False)

    assert isinstance(cli.trainer.strategy, AsyncAMSGradStrategy)
    assert cli.trainer.strategy.options.max_staleness == 7
    assert cli.trainer.strategy.options.on_stale == "drop"
