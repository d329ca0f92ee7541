"""Claims about the recipes as a user runs them: each parses, takes overrides, and trains on two ranks."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_async
from lightning_async.cli.app import AsyncCLI, main
from tests.data_files import write_cifar10, write_cinic10, write_imagenet32, write_mnist, write_rcv1
from tests.launch import launch
from tests.soaked import soaked

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("compare"))

# What the paper, or where it is silent its code, trains with: batch, step size, epochs, bias correction.
PAPERS = {
    "lenet5_mnist": (40, 1e-4, 200, True),
    "logreg_rcv1": (64, 1e-2, 100, False),
    "allcnn_cifar10": (100, 1e-4, 400, True),
    "resnet18_cinic10": (80, 1e-4, 200, True),
    "wrn28_5_imagenet32": (100, 1e-3, 40, True),
}

# Small files in the official format, and what makes a run of two steps quick.
SMALL: dict[str, tuple[Callable[[Path], object] | None, list[str]]] = {
    "lenet5_digits": (None, ["--data.init_args.batch_size=4"]),
    "lenet5_mnist": (write_mnist, ["--data.init_args.batch_size=4"]),
    "logreg_rcv1": (write_rcv1, ["--data.init_args.batch_size=4"]),
    "logreg_synthetic": (
        None,
        ["--data.init_args.train_samples=64", "--data.init_args.eval_samples=8", "--data.init_args.batch_size=4"],
    ),
    "allcnn_cifar10": (write_cifar10, ["--data.init_args.batch_size=2", "--model.init_args.model.init_args.width=4"]),
    "resnet18_cinic10": (write_cinic10, ["--data.init_args.batch_size=2", "--model.init_args.model.init_args.width=2"]),
    "resnet18_synthetic": (
        None,
        [
            "--data.init_args.train_samples=16",
            "--data.init_args.eval_samples=4",
            "--data.init_args.batch_size=2",
            "--model.init_args.model.init_args.width=2",
        ],
    ),
    "factorization": (
        None,
        [
            "--data.init_args.train_samples=64",
            "--data.init_args.eval_samples=8",
            "--data.init_args.batch_size=4",
        ],
    ),
    # AdamW is no AMSGrad.
    "gpt_help": (
        None,
        [
            "--trainer.strategy=async_fork",
            "--data.init_args.train_samples=16",
            "--data.init_args.batch_size=2",
            "--model.init_args.model.init_args.width=16",
            "--model.init_args.model.init_args.layers=1",
        ],
    ),
    "wrn28_5_imagenet32": (
        write_imagenet32,
        [
            "--data.init_args.batch_size=2",
            "--model.init_args.model.init_args.depth=10",
            "--model.init_args.model.init_args.width=1",
        ],
    ),
}


@pytest.fixture(autouse=True)
def no_arguments_of_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])


def config(name: str) -> str:
    return str(RECIPES / f"{name}.yaml")


def build(name: str, *arguments: str) -> Any:
    # On one device, whatever this machine has.
    return AsyncCLI(
        ["--config", config(name), "--trainer.strategy=auto", "--trainer.accelerator=cpu", *arguments], run=False
    )


def test_every_recipe_is_tried() -> None:
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_and_keeps_its_data_and_results_in_known_folders(name: str) -> None:
    cli = build(name)

    assert cli.trainer.logger.name == name
    assert cli.config["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    if hasattr(cli.datamodule, "data_dir"):
        assert cli.datamodule.data_dir == Path("data") / name.split("_")[-1]


@pytest.mark.parametrize("name", list(PAPERS))
def test_a_recipe_has_the_papers_hyperparameters(name: str) -> None:
    cli = build(name)

    optimizer = cli.model.configure_optimizers()

    assert type(optimizer) is lightning_async.AMSGrad
    group = optimizer.param_groups[0]
    assert (
        cli.datamodule.batch_size,
        group["lr"],
        cli.trainer.max_epochs,
        group["bias_correction"],
    ) == PAPERS[name]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)


@pytest.mark.parametrize(
    ("arguments", "kind", "expected"),
    [
        (["--model.init_args.optimizer.init_args.lr=0.5"], lightning_async.AMSGrad, {"lr": 0.5}),
        (["--model.init_args.lr=0.5"], lightning_async.AMSGrad, {"lr": 0.5}),
        (["--model.init_args.optimizer.betas=[0.8,0.9]"], lightning_async.AMSGrad, {"lr": 0.01, "betas": (0.8, 0.9)}),
        # The step size stays where another optimizer is chosen; what it does not know is left out.
        (
            ["--model.init_args.optimizer=SGD", "--model.init_args.optimizer.momentum=0.9"],
            torch.optim.SGD,
            {"lr": 0.01, "momentum": 0.9},
        ),
        (
            ["--model.init_args.optimizer=torch.optim.Adam", "--model.init_args.lr=0.5"],
            torch.optim.Adam,
            {"lr": 0.5, "amsgrad": False},
        ),
    ],
)
def test_optimizer_and_hyperparameters_are_chosen_on_the_command_line(
    arguments: list[str], kind: type, expected: dict[str, Any]
) -> None:
    optimizer = build("logreg_rcv1", *arguments).model.configure_optimizers()

    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


@pytest.mark.parametrize("name", soaked(NAMES, "lenet5_mnist", "resnet18_cinic10", "logreg_synthetic"))
def test_a_recipe_trains_validates_logs_and_leaves_a_report_on_two_ranks(name: str, tmp_path: Path) -> None:
    write, arguments = SMALL[name]
    if write is not None:
        write(tmp_path / "data")
        arguments = [*arguments, f"--data.init_args.data_dir={tmp_path / 'data'}"]

    def script(folder: Path) -> None:
        main(
            [
                *("fit", "--config", config(name)),
                "--trainer.strategy=async_amsgrad_fork",
                "--trainer.accelerator=cpu",
                "--trainer.devices=2",
                "--trainer.max_epochs=1",
                "--trainer.check_val_every_n_epoch=1",
                "--trainer.limit_train_batches=2",
                "--trainer.limit_val_batches=1",
                "--trainer.num_sanity_val_steps=0",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                f"--trainer.logger.init_args.save_dir={folder}",
                *arguments,
            ]
        )

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.output.splitlines()[-1] == f"report: {name}/version_0/report.html"
    assert (tmp_path / name / "version_0" / "report.html").exists()
    with (tmp_path / name / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    versions = [float(row["async/version"]) for row in rows if row.get("async/version")]
    # Two batches on each of two ranks, each an update of its own.
    assert max(versions) == 4
    (accuracy,) = [float(row["val/acc"]) for row in rows if row.get("val/acc")]
    assert 0 <= accuracy <= 1
    assert all(float(row["train/loss"]) > 0 for row in rows if row.get("train/loss"))
