"""`import lightning_async` before or after Lightning: the strategies are registered either way, and Lightning is not
imported by it."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lightning_async
from tests.launch import launch

TRAINER = """
trainer = L.Trainer(strategy="async_amsgrad_spawn", devices=2, accelerator="cpu", logger=False,
                    enable_checkpointing=False, enable_progress_bar=False)
from lightning_async import AsyncAMSGradStrategy
assert type(trainer.strategy) is AsyncAMSGradStrategy, trainer.strategy
assert trainer.strategy._start_method == "spawn"
"""


ORDERS = [
    "import lightning as L, lightning_async",
    "import lightning_async, lightning as L",
    "import lightning_async, lightning.pytorch as L",
    # A module of this package is what imports Lightning.
    "import lightning_async.loops.fit_loop, lightning as L",
    "from lightning_async import AsyncMonitor; import lightning as L",
]


@pytest.mark.parametrize("imports", ORDERS)
def test_the_strategies_are_registered_in_whichever_order_packages_are_imported(tmp_path: Path, imports: str) -> None:
    def script(folder: Path) -> None:
        # As in a new interpreter, but for what Lightning itself imports: that takes most of the time.
        warnings.simplefilter("ignore")
        for name in list(sys.modules):
            if name.partition(".")[0] in ("lightning", "lightning_async"):
                del sys.modules[name]
        sys.meta_path[:] = [finder for finder in sys.meta_path if "lightning_async" not in type(finder).__module__]
        exec(imports + TRAINER, {})

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output


def test_the_strategies_are_registered_in_a_new_interpreter() -> None:
    run = subprocess.run([sys.executable, "-c", ORDERS[1] + TRAINER], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr


def test_importing_the_package_imports_neither_lightning_nor_torch() -> None:
    code = "import sys, lightning_async; assert not set(sys.modules) & {'lightning', 'torch'}"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(lightning_async.__all__) <= set(dir(lightning_async))
    assert all(getattr(lightning_async, name).__name__ == name for name in lightning_async.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Worker'"):
        _ = lightning_async.Worker


def test_the_package_says_that_it_is_typed() -> None:
    assert (importlib.resources.files(lightning_async) / "py.typed").is_file()


def test_what_the_core_imports_of_monitoring_loads_no_lightning() -> None:
    code = (
        "import sys, lightning_async.monitoring, lightning_async.monitoring.diagnosis\n"
        "assert not set(sys.modules) & {'lightning', 'wandb', 'matplotlib', 'rich'}"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
