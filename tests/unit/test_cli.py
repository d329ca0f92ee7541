"""Claims about the command line `lightning-async`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from lightning_async import AsyncAMSGradStrategy, AsyncStrategy
from lightning_async.cli import AsyncCLI, add_working_directory_to_path, main
from recipes.callbacks import EmulatedStepTime
from recipes.classifier import Classifier
from recipes.digits import DigitsDataModule
from recipes.models import LeNet5

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "lenet5_digits.yaml")
QUICK = [
    "--trainer.strategy=auto",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def no_arguments_of_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])


def test_the_recipe_builds_what_it_names() -> None:
    cli = AsyncCLI(["--config", RECIPE, "--trainer.strategy=ddp"], run=False)

    assert isinstance(cli.model, Classifier)
    assert isinstance(cli.model.model, LeNet5)
    assert isinstance(cli.datamodule, DigitsDataModule)
    assert isinstance(cli.trainer.strategy, DDPStrategy)
    assert cli.trainer.num_devices == 4
    sleeping = [callback for callback in cli.trainer.callbacks if isinstance(callback, EmulatedStepTime)]
    assert [callback.seconds_by_rank for callback in sleeping] == [[0.02, 0.02, 0.02, 0.08]]


def test_the_recipe_trains_with_the_strategy_of_this_package() -> None:
    cli = AsyncCLI(["--config", RECIPE], run=False)

    assert isinstance(cli.trainer.strategy, AsyncAMSGradStrategy)


def test_a_strategy_can_be_given_by_class_path_with_options() -> None:
    cli = AsyncCLI(
        [
            *("--config", RECIPE),
            "--trainer.strategy=lightning_async.AsyncAMSGradStrategy",
            "--trainer.strategy.max_staleness=7",
        ],
        run=False,
    )

    assert isinstance(cli.trainer.strategy, AsyncAMSGradStrategy)
    assert cli.trainer.strategy.options.max_staleness == 7


@pytest.mark.parametrize(
    "named",
    [["--trainer.strategy=async"], ["--trainer.strategy=AsyncStrategy", "--trainer.strategy.max_staleness=7"]],
    ids=["name", "class"],
)
def test_the_strategy_for_any_optimizer_can_be_given_by_name_and_by_class(named: list[str]) -> None:
    cli = AsyncCLI(["--config", RECIPE, *named], run=False)

    assert type(cli.trainer.strategy) is AsyncStrategy


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fit", "--config", RECIPE, "--trainer.bogus=1"], "trainer.bogus"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        ([], "subcommand"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)

    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert complaint in message
    assert len(message.splitlines()) == 1


def test_a_wrong_key_in_a_config_file_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("trainer:\n  max_epoch: 3\n")

    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(config)])

    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "trainer.max_epoch" in message
    assert len(message.splitlines()) == 1


def test_the_working_directory_is_importable_and_listed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    add_working_directory_to_path()
    add_working_directory_to_path()

    assert sys.path.count(str(tmp_path)) == 1


def test_fit_runs_the_recipe_and_saves_its_configuration(tmp_path: Path) -> None:
    main(["fit", "--config", RECIPE, f"--trainer.logger.init_args.save_dir={tmp_path}", *QUICK])

    run = tmp_path / "lenet5_digits" / "version_0"
    assert (run / "config.yaml").exists()
    assert (run / "metrics.csv").exists()


@pytest.mark.parametrize("entry", ["module", "script"])
def test_a_class_beside_the_config_resolves_in_launched_ranks_too(tmp_path: Path, entry: str) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "from lightning.pytorch import Callback\n"
        "class Sign(Callback):\n"
        "    def on_fit_end(self, trainer, pl_module):\n"
        "        open(f'rank{trainer.global_rank}', 'w').close()\n"
    )
    # What pip writes for an entry point, without relying on an installation.
    script = tmp_path / "bin" / "lightning-async"
    script.parent.mkdir()
    script.write_text("from lightning_async.cli import main\nmain()\n")
    program = ["-m", "lightning_async"] if entry == "module" else [str(script)]
    command = [sys.executable, *program, "fit", "--config", RECIPE, *QUICK]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks+=mine.Sign"]

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}
