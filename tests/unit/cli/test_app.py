"""Claims about the command line `lightning-async`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_async
from lightning_async import AsyncAMSGradStrategy, AsyncMonitor, AsyncStrategy, WorkerFailedError
from lightning_async.cli.app import AsyncCLI, ConciseParser, add_working_directory_to_path, main
from lightning_async.cli.errors import told_in_one_line
from lightning_async.runtime.failure import RunFailure
from recipes.callbacks import EmulatedStepTime
from recipes.classifier import Classifier
from recipes.digits import DigitsDataModule
from recipes.models import LeNet5
from tests.launch import launch, run_as_command, run_as_script
from tests.refusals import refused_in_one_line

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "recipes" / "lenet5_digits.yaml")
DDP = "--trainer.strategy=ddp"
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


MODEL = ["--model=recipes.classifier.Classifier", "--model.model=recipes.models.LeNet5"]
DATA = "--data=recipes.digits.DigitsDataModule"


@pytest.mark.parametrize(
    ("given", "kind"),
    [([], AsyncAMSGradStrategy), (["--trainer.strategy=auto"], SingleDeviceStrategy), ([DDP], DDPStrategy)],
    ids=["nothing", "auto", "ddp"],
)
def test_the_strategy_is_this_packages_unless_another_is_asked_for(given: list[str], kind: type) -> None:
    cli = AsyncCLI([*MODEL, DATA, "--trainer.accelerator=cpu", "--trainer.devices=1", *given], run=False)

    assert type(cli.trainer.strategy) is kind


def test_a_run_without_a_monitor_gets_one_in_front_of_its_checkpoints(tmp_path: Path) -> None:
    cli = AsyncCLI(["--config", RECIPE, f"--trainer.logger.init_args.save_dir={tmp_path}"], run=False)

    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert kinds.count(AsyncMonitor) == 1
    assert kinds[-2:] == [AsyncMonitor, ModelCheckpoint]


@pytest.mark.parametrize(
    ("given", "monitors"),
    [
        (["--trainer.callbacks+=lightning_async.AsyncMonitor", "--trainer.callbacks.folder=mine"], ["mine"]),
        # What compare runs has a record of its own.
        (["--trainer.callbacks+=lightning_async.cli.compare.recorder.RunRecorder", "--trainer.callbacks.path=r"], []),
        ([DDP], []),
        (["--trainer.fast_dev_run=true"], []),
        (["--trainer.logger=false", "--trainer.default_root_dir=memory://runs"], []),
    ],
    ids=["own monitor", "compare", "ddp", "fast_dev_run", "remote folder"],
)
def test_a_run_that_has_a_record_or_leaves_none_gets_no_monitor(given: list[str], monitors: list[str]) -> None:
    cli = AsyncCLI(["--config", RECIPE, *given], run=False)

    found = [callback.folder for callback in cli.trainer.callbacks if isinstance(callback, AsyncMonitor)]
    assert found == monitors


def test_the_monitor_prints_no_table_that_the_strategy_was_told_not_to_print() -> None:
    strategy = ["--trainer.strategy=AsyncAMSGradStrategy", "--trainer.strategy.summary=false"]

    cli = AsyncCLI(["--config", RECIPE, *strategy], run=False)

    assert [own.summary for own in cli.trainer.callbacks if isinstance(own, AsyncMonitor)] == [False]


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
    ("arguments", "policy", "correction"),
    [
        (["staleness_policy=damping", "momentum_correction=0.5"], "damping", 0.5),
        (
            ["staleness_policy=lightning_async.policies.AgeDamping", "momentum_correction=auto"],
            "AgeDamping(rate=0.2)",
            "auto",
        ),
        (
            ["staleness_policy=lightning_async.policies.LookAhead", "staleness_policy.delay=3"],
            "LookAhead(delay=3.0)",
            None,
        ),
    ],
    ids=["name", "default-arguments", "arguments"],
)
def test_a_staleness_policy_can_be_given_by_name_and_by_class_path(
    arguments: list[str], policy: str, correction: object
) -> None:
    cli = AsyncCLI(
        ["--config", RECIPE, *(f"--trainer.strategy.{argument}" for argument in arguments)],
        run=False,
    )

    configuration = cli.trainer.strategy.configuration
    assert configuration["staleness_policy"] == policy
    assert configuration["momentum_correction"] == correction


def test_a_configuration_file_has_a_staleness_policy_with_its_arguments(tmp_path: Path) -> None:
    config = tmp_path / "policy.yaml"
    config.write_text(
        "trainer:\n  strategy:\n    class_path: lightning_async.AsyncStrategy\n    init_args:\n"
        "      staleness_policy:\n        class_path: lightning_async.policies.AgeDamping\n"
        "        init_args: {rate: 0.5}\n      momentum_correction: auto\n"
    )

    cli = AsyncCLI(["--config", RECIPE, "--config", str(config)], run=False)

    assert repr(cli.trainer.strategy.options.staleness_policy) == "AgeDamping(rate=0.5)"
    assert cli.trainer.strategy.options.momentum_correction == "auto"


@pytest.mark.parametrize("named", ["lightning_async.AsyncAMSGradStrategy", "AsyncAMSGradStrategy"])
def test_a_strategy_can_be_given_by_class_path_without_options(named: str) -> None:
    cli = AsyncCLI(["--config", RECIPE, f"--trainer.strategy={named}"], run=False)

    assert type(cli.trainer.strategy) is AsyncAMSGradStrategy


@pytest.mark.parametrize(
    "named",
    [["--trainer.strategy=async"], ["--trainer.strategy=AsyncStrategy", "--trainer.strategy.max_staleness=7"]],
    ids=["name", "class"],
)
def test_the_strategy_for_any_optimizer_can_be_given_by_name_and_by_class(named: list[str]) -> None:
    cli = AsyncCLI(["--config", RECIPE, *named], run=False)

    assert type(cli.trainer.strategy) is AsyncStrategy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--config", RECIPE, "--trainer.bogus=1"], "trainer.bogus"),
        # No abbreviation of an argument passes for it.
        (["fit", "--config", RECIPE, "--trainer.max_epoch=1"], "--trainer.max_epoch=1"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        ([], "a command is missing"),
        (["fitt"], "'compare', 'report'"),
        (["fit", "--config", RECIPE, "--trainer.max_epochs=abc"], "trainer.max_epochs"),
        (["fit", "--config", RECIPE, "--model=recipes.nowhere.Model"], "no attribute 'nowhere'"),
        (["fit", "--config", RECIPE, "--model.init_args.bogus=1"], "Option 'bogus' is not accepted"),
        (["compare"], "required: recipe, out"),
        (["compare", "--config", "missing.yaml"], "missing.yaml"),
        (["compare", "--recipe", "missing.yaml", "--out", "x", "--variants=[{name: a}]"], "missing.yaml"),
        (["compare", "--recipe", RECIPE, "--out", "x"], "nothing to compare"),
        (["compare", "--recipe", RECIPE, "--out", "x", "--variants=[{name: a, bogus: 1}]"], "bogus"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused_in_one_line(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--config", RECIPE, "--trainer.strategy=nosuch"], "strategy 'nosuch'"),
        (["fit", "--config", RECIPE, "--trainer.devices=0"], "devices='0'"),
        (["test", "--config", RECIPE, *QUICK[:2], "--ckpt_path=missing.ckpt"], "missing.ckpt"),
        (["fit", "--config", RECIPE, "--trainer.strategy=lightning_async.Nope"], "no class lightning_async.Nope"),
        (["fit", "--config", RECIPE, "--trainer.strategy=lightning_async.AMSGrad"], "AMSGrad is no strategy"),
        (["fit", "--config", RECIPE, "--trainer.strategy=lightning_async.SimulatedDelayStrategy"], "max_delay"),
        (["fit", "--config", RECIPE, "--trainer.strategy=SimulatedDelayStrategy"], "needs init_args: max_delay"),
    ],
)
def test_what_lightning_refuses_is_one_line_and_status_2(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)

    with pytest.raises(SystemExit) as exit_info:
        main(arguments)

    errors = [line for line in capfd.readouterr().err.splitlines() if "rror" in line or "Traceback" in line]
    assert exit_info.value.code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert said in errors[0]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (WorkerFailedError(RunFailure(2, "ValueError: no")), 1, "error: rank 2 failed: ValueError: no\n"),
        (
            WorkerFailedError(RunFailure(2, "ValueError: no\n\nTraceback:\nValueError: no")),
            1,
            "Traceback:\nValueError: no\n\nerror: rank 2 failed: ValueError: no; its traceback is above\n",
        ),
        (
            WorkerFailedError(RunFailure(2, "MisconfigurationException: no", traced=True)),
            2,
            "error: rank 2 failed: MisconfigurationException: no\n",
        ),
        (MisconfigurationException("two\n  lines"), 2, "error: two; lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_without_need_of_a_traceback_becomes_an_exit_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)
    monkeypatch.setattr("signal.signal", lambda signum, handler: None)

    with pytest.raises(SystemExit) as exit_info, told_in_one_line():
        raise error

    assert exit_info.value.code == status
    assert capsys.readouterr().err == said


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "1")

    with pytest.raises(MisconfigurationException), told_in_one_line():
        raise MisconfigurationException("no")


def test_an_error_of_the_users_code_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), told_in_one_line():
        raise ZeroDivisionError


def test_help_lists_every_command_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")

    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])

    help_text = capsys.readouterr().out
    commands = help_text.partition("(required)\n")[2].partition("\n\n")[0].splitlines()
    assert exit_info.value.code == 0
    assert help_text.startswith("usage: lightning-async ")
    assert [line.split()[0] for line in commands] == [
        *("fit", "validate", "test", "predict", "compare", "report", "plan", "demo", "join", "run", "chaos")
    ]
    assert all(len(line.split()) > 3 for line in commands)
    assert "--print_completion" in help_text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])

    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"lightning-async {lightning_async.__version__}\n"


def test_completion_offers_the_names_of_strategies() -> None:
    fit = ConciseParser()
    # As LightningCLI has it; the whole parser takes minutes to complete.
    fit.add_argument("--trainer.strategy", type=str | Strategy, default="auto")
    parser = ConciseParser(prog="lightning-async")
    parser.add_subcommands().add_subcommand("fit", fit)

    script = parser.get_completion_script("shtab-bash")

    (line,) = (line for line in script.splitlines() if "fit_trainer_strategy_typehint()" in line)
    assert "'async_amsgrad async_amsgrad_spawn" in line
    assert all(f" {name} " in line for name in ("async", "ddp", "auto", "lightning_async.AsyncAMSGradStrategy"))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_help_of_a_command_begins_with_a_whole_sentence(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")

    with pytest.raises(SystemExit):
        main([command, "--help"])

    _, sentence, _ = capsys.readouterr().out.split("\n\n", 2)
    assert sentence[0].isupper() and sentence.endswith(".")


def test_the_help_of_fit_offers_no_strategy_that_is_only_a_part_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])

    help_text = capsys.readouterr().out
    assert "lightning_async.AsyncAMSGradStrategy" in help_text
    assert not [part for part in ("PhasedCollectives",) if part in help_text]


def test_the_help_of_compare_explains_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--help"])

    help_text = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    assert "usage: lightning-async compare --config FILE [options]" in help_text
    assert "--baseline BASELINE name of the variant that the others' speed is related to" in help_text


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("sklearn", ["--config", RECIPE], "pip install scikit-learn"),
        ("sklearn", [*MODEL, "--data=recipes.datasets.RCV1DataModule"], "pip install scikit-learn"),
        ("PIL", [*MODEL, "--data=recipes.datasets.CINIC10DataModule"], "pip install pillow"),
        ("wandb", ["--config", RECIPE, "--trainer.logger=WandbLogger"], "pip install wandb"),
    ],
)
def test_what_is_not_installed_is_one_line_before_ranks_start(
    module: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *arguments])

    lines = capfd.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert lines[-1].startswith("error: ") and lines[-1].endswith(f"which is not installed: {said}")
    assert not [line for line in lines[:-1] if "Seed set" not in line]


def test_report_gets_its_arguments_and_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def report_main(argv: list[str]) -> int:
        given.append(argv)
        return 3

    monkeypatch.setitem(sys.modules, "lightning_async.monitoring.report", SimpleNamespace(report_main=report_main))

    with pytest.raises(SystemExit) as exit_info:
        main(["report", "runs/a", "--out=x.html"])

    assert exit_info.value.code == 3
    assert given == [["runs/a", "--out=x.html"]]


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


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_config_file_that_is_not_text_is_one_line_and_status_2(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")

    with pytest.raises(SystemExit) as exit_info:
        main([command, "--config", str(tmp_path / "image.yaml")])

    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "is not text" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half of one"])
def test_a_file_that_is_no_checkpoint_is_one_line_and_status_2(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)

    with pytest.raises(SystemExit) as exit_info:
        main(["test", "--config", RECIPE, *QUICK[:2], f"--ckpt_path={tmp_path / 'last.ckpt'}"])

    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.startswith(f"error: {tmp_path / 'last.ckpt'} cannot be read as a checkpoint")
    assert len(message.splitlines()) == 1


def test_a_wrong_value_of_a_class_is_told_without_the_types_that_are_not_classes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    strategy = "lightning_async.AsyncAMSGradStrategy"
    with pytest.raises(SystemExit):
        main(["fit", "--config", RECIPE, f"--trainer.strategy={strategy}", "--trainer.strategy.on_stale=foo"])

    message = capsys.readouterr().err
    assert "'wait', 'drop'" in message
    assert "Expected str" not in message


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_command_without_a_trainer_refuses_options_before_it(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.yaml").write_text("compare: {recipe: a, out: b}\n" if command == "compare" else "{}\n")

    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(tmp_path / "empty.yaml"), command])

    assert exit_info.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: `{command}` takes no options before it: lightning-async {command} [options]\n"
    )


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


@pytest.mark.parametrize("entry", ["module", pytest.param("script", marks=pytest.mark.soak)])
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
    arguments = ["fit", "--config", RECIPE, *QUICK, "--trainer.devices=2", "--trainer.strategy=ddp"]
    arguments.append("--trainer.callbacks+=mine.Sign")

    def start(folder: Path) -> None:
        if entry == "module":
            run_as_command(*arguments)
        else:
            run_as_script(script, *arguments)

    done = launch(start, tmp_path)

    assert done.returncode == 0, done.output
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}
