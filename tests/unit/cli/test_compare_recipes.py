"""The ready comparisons compare what their names and the documentation promise, and `fit` accepts all of it."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_async.cli.app import AsyncCLI
from lightning_async.cli.compare.command import compare_parser, fit_command, read_comparison
from lightning_async.cli.compare.config import Comparison
from lightning_async.cli.compare.plan import PlannedRun, plan_runs
from lightning_async.cli.compare.recorder import RunRecorder
from recipes.callbacks import EmulatedStepTime
from tests.soaked import soaked

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(path.stem for path in (ROOT / "recipes").glob("compare_*.yaml"))

ASYNC = {"strategy": "AsyncAMSGradStrategy", "optimizer": "AMSGrad"}
DDP = {"strategy": "DDPStrategy", "optimizer": "AMSGrad"}
STRATEGIES = {"async AMSGrad": ASYNC, "sync AMSGrad (DDP)": DDP}
SLOW_RANK = {"sleep": [0.02, 0.02, 0.02, 0.08]}
OPTIMIZERS = {name: {"optimizer": name} for name in ("AMSGrad", "Adam", "SGD")}
DELAYS = {delay: {"max_delay": delay} for delay in (0, 5, 10, 20, 50, 100, 200, 400)}
BETAS = {"β1 = 0": {"beta1": 0.0}, "β1 = 0.9": {"beta1": 0.9}}
BOUNDS = {bound: {"max_staleness": bound} for bound in (0, 3, 7, 16, 64)}


@dataclass
class Promise:
    """What a comparison says of itself.

    Args:
        recipe: the recipe's name.
        common: facts of every run.
        axes: of each axis its names, and the facts of the runs that have the name.
        seeds: of each variant.
        target: accuracy whose time is taken.
        baseline: whose speed the others' is related to.
        plots: their kinds.
    """

    recipe: str
    common: Mapping[str, Any]
    axes: Mapping[str, Mapping[Any, Mapping[str, Any]]]
    seeds: list[int] = field(default_factory=lambda: [1, 2])
    target: float | None = None
    baseline: str | None = None
    plots: list[str] = field(default_factory=lambda: ["final"])


DIGITS, LOGREG, RESNET = "lenet5_digits", "logreg_synthetic", "resnet18_synthetic"
PROMISES = {
    "compare_strategies": Promise(
        DIGITS,
        {"ranks": 4, "epochs": 12, **SLOW_RANK},
        {
            "variant": {
                **{name: {**facts, "lr": 0.002} for name, facts in STRATEGIES.items()},
                "async SGD": {"strategy": "AsyncStrategy", "optimizer": "SGD", "lr": 0.01, "momentum": 0.9},
            }
        },
        seeds=[1, 2, 3],
        target=0.95,
        baseline="sync AMSGrad (DDP)",
        plots=["curves"],
    ),
    "compare_auto": Promise(
        DIGITS,
        {"ranks": 4, "epochs": 10, **SLOW_RANK},
        {
            "variant": {
                "auto": {**ASYNC, "lr": 0.008},
                "sync AMSGrad (DDP)": {**DDP, "lr": 0.008},
                "async AMSGrad": {**ASYNC, "lr": 0.002},
            }
        },
        seeds=[1, 2, 3],
        target=0.97,
        baseline="sync AMSGrad (DDP)",
        plots=["curves"],
    ),
    "compare_strategies_resnet18": Promise(
        RESNET,
        {"ranks": 4, "epochs": 10, "sleep": [0.1, 0.1, 0.1, 0.4]},
        {"variant": {"async AMSGrad": {**ASYNC, "lr": 0.00025}, "sync AMSGrad (DDP)": {**DDP, "lr": 0.001}}},
        seeds=[1],
        target=0.7,
        baseline="sync AMSGrad (DDP)",
        plots=["curves"],
    ),
    "compare_workers": Promise(
        DIGITS,
        {"epochs": 3},
        {
            "strategy": STRATEGIES,
            "workers": {workers: {"ranks": workers} for workers in (1, 2, 4)},
            "ranks": {
                "equal ranks": {"sleep": [0.03, 0.03, 0.03, 0.03]},
                "one slow rank": {"sleep": [0.12, 0.03, 0.03, 0.03]},
            },
        },
        seeds=[0],
        baseline="async AMSGrad, workers 1, equal ranks",
        plots=["speedup", "curves"],
    ),
    "compare_delay": Promise(
        DIGITS,
        {"strategy": "SimulatedDelayStrategy", "ranks": 1, "sleep": [], "epochs": 40},
        {"optimizer": OPTIMIZERS, "delay": DELAYS},
        seeds=[1],
        plots=["final", "curves"],
    ),
    "compare_delay_logreg": Promise(
        LOGREG,
        {"strategy": "SimulatedDelayStrategy", "ranks": 1, "sleep": [], "epochs": 6},
        {"optimizer": OPTIMIZERS, "delay": DELAYS},
        seeds=[1],
        plots=["final", "curves"],
    ),
    "compare_tuning_batch": Promise(
        DIGITS,
        {"ranks": 4, "epochs": 10, "lr": 0.002},
        {"strategy": STRATEGIES, "batch": {size: {"batch_size": size} for size in (4, 8, 16, 32, 64)}},
    ),
    "compare_tuning_lr": Promise(
        DIGITS,
        {"ranks": 4, "epochs": 10, "batch_size": 16},
        {"strategy": STRATEGIES, "lr": {lr: {"lr": lr} for lr in (0.0005, 0.001, 0.002, 0.004, 0.008)}},
    ),
    "compare_tuning_lr_logreg": Promise(
        LOGREG,
        {"ranks": 4, "epochs": 2, "batch_size": 64},
        {"strategy": STRATEGIES, "lr": {lr: {"lr": lr} for lr in (0.0003, 0.001, 0.003, 0.01, 0.03)}},
    ),
    "compare_tuning_staleness": Promise(
        DIGITS, {"ranks": 4, "epochs": 10, **ASYNC, **SLOW_RANK}, {"beta1": BETAS, "bound": BOUNDS}
    ),
    "compare_tuning_staleness_logreg": Promise(
        LOGREG, {"ranks": 4, "epochs": 2, **ASYNC, **SLOW_RANK}, {"beta1": BETAS, "bound": BOUNDS}
    ),
    "compare_wire": Promise(
        DIGITS,
        {"ranks": 4, "epochs": 12, **ASYNC, "transport": "tcp"},
        {
            "variant": {
                "fp32": {"wire": ("fp32", "fp32")},
                "bf16 gradients": {"wire": ("bf16", "fp32")},
                "fp16 gradients": {"wire": ("fp16", "fp32")},
                "bf16 gradients and parameters": {"wire": ("bf16", "bf16")},
                "fp16 gradients and parameters": {"wire": ("fp16", "fp16")},
                "int8 gradients": {"wire": ("int8", "fp32")},
                "int8 gradients and parameters": {"wire": ("int8", "int8")},
            }
        },
        seeds=[1, 2, 3],
        plots=["curves"],
    ),
    "compare_wire_resnet18": Promise(
        RESNET,
        {"ranks": 2, "epochs": 5, "lr": 0.001, **ASYNC, "transport": "tcp"},
        {
            "variant": {
                "fp32": {"wire": ("fp32", "fp32")},
                "int8 gradients and parameters": {"wire": ("int8", "int8")},
            }
        },
        seeds=[1, 2, 3],
        plots=["curves"],
    ),
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-async"])


def read(name: str) -> Comparison:
    return read_comparison(compare_parser().parse_args(["--config", f"recipes/{name}.yaml"]))


def built(command: list[str]) -> dict[str, Any]:
    """What the command line of a run builds."""
    cli = AsyncCLI(command[1:], run=False)
    strategy, module = cli.trainer.strategy, cli.model
    # The schedule asks a running trainer for its epochs.
    module.lr_schedule = "constant"
    optimizer = module.configure_optimizers()
    group, options = optimizer.param_groups[0], getattr(strategy, "options", None)
    callbacks = cli.trainer.callbacks
    return {
        "strategy": type(strategy).__name__,
        "ranks": cli.trainer.num_devices,
        "epochs": cli.trainer.max_epochs,
        "optimizer": type(optimizer).__name__,
        "lr": group["lr"],
        "momentum": group.get("momentum"),
        "beta1": group["betas"][0] if "betas" in group else None,
        "batch_size": cli.datamodule.batch_size,
        "sleep": next((own.seconds_by_rank for own in callbacks if isinstance(own, EmulatedStepTime)), []),
        "max_delay": getattr(strategy, "max_delay", None),
        "max_staleness": options and options.max_staleness,
        "transport": options and options.transport,
        "wire": options and (options.wire_dtype, options.parameter_wire_dtype),
        "records": [str(own.path) for own in callbacks if isinstance(own, RunRecorder)],
        "seed": cli.config["seed_everything"],
    }


def test_every_ready_comparison_promises_something() -> None:
    assert set(CONFIGS) == set(PROMISES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ready_comparison_is_the_one_that_its_name_promises(name: str) -> None:
    promise, comparison = PROMISES[name], read(name)

    names = {axis: [variant.name for variant in variants] for axis, variants in comparison.axes().items()}
    assert names == {axis: list(facts) for axis, facts in promise.axes.items()}
    assert comparison.seeds == promise.seeds
    assert (comparison.metric, comparison.metric_mode, comparison.loss) == ("val/acc", "max", "val/loss")
    assert (comparison.target, comparison.baseline) == (promise.target, promise.baseline)
    assert [plot.kind for plot in comparison.plots] == promise.plots
    assert comparison.recipe == f"recipes/{promise.recipe}.yaml" and Path(comparison.recipe).is_file()
    assert comparison.out == f"runs/{name}"
    # Runs at the same time would disturb the times that a baseline or a target is about.
    assert comparison.parallel == 1 or (comparison.baseline is None and comparison.target is None)


@pytest.mark.parametrize("is_whole", soaked([False, True], True), ids=["three", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fit_builds_what_the_variants_of_a_ready_comparison_promise(name: str, is_whole: bool, tmp_path: Path) -> None:
    promise, comparison = PROMISES[name], read(name)
    runs = one_run_for_each_name(comparison)

    for run in runs if is_whole or len(runs) < 3 else (runs[0], runs[len(runs) // 2], runs[-1]):
        promised = dict(promise.common)
        for axis, label in run.variant.labels.items():
            promised.update(promise.axes[axis][label])
        promised.update(seed=run.seed, records=[str(tmp_path / "record.json")])

        facts = built(fit_command(comparison, run, tmp_path))

        assert {fact: facts[fact] for fact in promised} == promised, run.name


def one_run_for_each_name(comparison: Comparison) -> list[PlannedRun]:
    """Runs that have every name of every axis among them."""
    seen: set[tuple[str, object]] = set()
    runs = []
    for run in plan_runs(comparison):
        if new := set(run.variant.labels.items()) - seen:
            seen |= new
            runs.append(run)
    return runs


def test_the_documentation_counts_the_runs_of_every_ready_comparison() -> None:
    rows = re.findall(
        r"^\| `recipes/(compare_[\w*]+)\.yaml` \|.*\| (\d+)(?: each)? \|$",
        (ROOT / "docs/compare.md").read_text(),
        re.MULTILINE,
    )
    counted = {config: int(runs) for pattern, runs in rows for config in fnmatch.filter(CONFIGS, pattern)}

    assert counted == {name: len(plan_runs(read(name))) for name in CONFIGS}


def test_the_recipes_readme_lists_every_ready_comparison() -> None:
    section = (ROOT / "recipes" / "README.md").read_text().partition("## Comparisons")[2].partition("\n## ")[0]

    assert set(re.findall(r"`(compare_\w+)\.yaml`", section)) == set(CONFIGS)


@pytest.mark.parametrize("page", ["README.md", "docs/compare.md", "docs/results.md", "docs/tuning.md"])
def test_a_comparison_that_the_documentation_runs_is_there(page: str) -> None:
    named = set(re.findall(r"--config recipes/(compare_[a-z]\w+)\.yaml", (ROOT / page).read_text()))

    assert named and named <= set(CONFIGS)
