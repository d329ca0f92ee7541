"""Exit codes mean the same in every command: 2 for a mistake of usage, 1 for a failure, 130 for Ctrl+C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ENVIRONMENT, Launched, launch, run_as_command, session_processes

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "lenet5_digits.yaml")
COMMAND = [sys.executable, "-m", "lightning_async"]
QUICK = [
    "--trainer.devices=2",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def run(folder: Path, *arguments: str) -> Launched:
    return launch(lambda _: run_as_command(*arguments), folder)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 2),
        (["fitt"], 2),
        (["fit", "--config", "missing.yaml"], 2),
        (["compare", "--config", RECIPE], 2),
        (["report"], 2),
        (["report", "nowhere"], 2),
        (["--help"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_of_usage_is_status_2_in_every_command(tmp_path: Path, arguments: list[str], status: int) -> None:
    assert run(tmp_path, *arguments).returncode == status


def test_what_is_known_before_ranks_start_is_said_once_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "fit", "--config", RECIPE, *QUICK, "--trainer.strategy.transport=nccl")

    assert done.returncode == 2
    assert done.output.count("does not compute on a CUDA device") == 1
    assert "Traceback" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]


@pytest.mark.soak
def test_an_error_of_user_code_in_one_rank_is_status_1_its_traceback_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Breaks(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        "        if trainer.global_rank == 1:\n"
        "            raise ValueError('my own mistake')\n"
    )

    done = run(tmp_path, "fit", "--config", RECIPE, *QUICK, "--trainer.callbacks=mine.Breaks")

    assert done.returncode == 1
    assert done.output.count("Traceback (most recent call last)") == 1
    assert "[rank1]: ValueError: my own mistake" in done.output
    assert "error: rank 1 failed: ValueError: my own mistake; its own traceback says where" in done.output.splitlines()


@pytest.mark.parametrize("said", ["", "Initializing distributed: GLOBAL_RANK: 0"], ids=["importing", "launching"])
def test_ctrl_c_while_it_starts_is_status_130_and_one_line(tmp_path: Path, said: str) -> None:
    log = tmp_path / "output.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "fit", "--config", RECIPE, *QUICK],
            cwd=tmp_path,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=file,
            start_new_session=True,
            # A shell's background job, which this may be, ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        deadline = time.monotonic() + 60
        while said not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        # Past the start of the interpreter itself.
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(60)
        deadline = time.monotonic() + 20
        while (left := session_processes(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for pid in session_processes(process.pid):
            os.kill(pid, signal.SIGKILL)
    output = log.read_text()
    # Where the interrupt meets code that was compiled from a string, as a dataclass's `__init__` is, `python -m` ends
    # itself by the signal whatever status is asked for; shells give both as 130.
    assert status == 130 or (said and status == -signal.SIGINT), output
    assert not left
    assert output.count("interrupted") == 1, output
    assert "Traceback" not in output
