"""`lightning-async run` starts a command again that was killed, and the run goes on from its newest snapshot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from lightning_async import AsyncAMSGradStrategy
from lightning_async.cli.run import run_main
from tests.faults.test_just_in_time import KeepsSnapshot
from tests.harness import eventually
from tests.integration.test_resume import BATCH, RANKS, SAMPLES, SEED, Module, assert_resumed_exactly
from tests.launch import ENVIRONMENT, Launched, launch
from tests.models import fork_trainer, loader

pytestmark = pytest.mark.timeout(240)

EPOCHS = 4
SNAPSHOT = Path("lightning_async") / "snapshot.ckpt"
COUNT = 'echo x >> starts; n=$(wc -l < starts); test "$LIGHTNING_ASYNC_RESTART_COUNT" = $((n - 1)) || exit 99; '


@pytest.fixture(autouse=True)
def _here_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_async.cli.run.back_off_s", lambda count: 0.0)


def run(
    folder: Path, *arguments: str, timeout_s: float = 60.0, meanwhile: Callable[[int], object] | None = None
) -> Launched:
    """Runs the command in a process of its own: it adopts what its command leaves."""

    def body(folder: Path) -> None:
        os.environ |= ENVIRONMENT
        sys.exit(run_main(arguments))

    return launch(body, folder, timeout_s, meanwhile)


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().split())


@pytest.mark.parametrize(
    ("script", "status", "count"),
    [
        ("exit 0", 0, 1),
        ("test $n = 3 || exit 1", 0, 3),
        ("test $n = 2 || kill -KILL $$", 0, 2),
        ("exit 7", 7, 3),
        ("kill -KILL $$", 128 + signal.SIGKILL, 3),
        # Wrong arguments, and Ctrl+C.
        ("exit 2", 2, 1),
        ("exit 130", 130, 1),
        ("kill -INT $$", 130, 1),
    ],
)
def test_a_command_is_started_again_where_that_may_help(tmp_path: Path, script: str, status: int, count: int) -> None:
    found = run(tmp_path, "--max-restarts", "2", "--", "sh", "-c", COUNT + script)

    assert found.returncode == status, found.output
    assert starts(tmp_path) == count
    said = [line for line in found.output.splitlines() if line.startswith("[run] ")]
    assert len(said) == (count if status and count > 1 else count - 1)


def test_all_starts_have_one_name(tmp_path: Path) -> None:
    run(tmp_path, "--max-restarts", "1", "--", "sh", "-c", "echo $LIGHTNING_ASYNC_RUN >> starts; exit 1")
    run(tmp_path, "--max-restarts", "0", "--", "sh", "-c", "echo $LIGHTNING_ASYNC_RUN >> starts")

    first, second, other = (tmp_path / "starts").read_text().split()
    assert first == second != other


def test_the_starts_of_a_scheduler_around_it_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ASYNC_RUN", "job")
    monkeypatch.setenv("LIGHTNING_ASYNC_RESTART_COUNT", "4")
    script = "echo $LIGHTNING_ASYNC_RUN$LIGHTNING_ASYNC_RESTART_COUNT >> starts; exit 1"
    run(tmp_path, "--max-restarts", "1", "--", "sh", "-c", script)

    assert (tmp_path / "starts").read_text().split() == ["job4", "job5"]


def test_what_a_killed_command_has_left_is_ended_before_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_async.cli.run.END_TIMEOUT_S", 0.2)
    script = COUNT + 'test $n = 2 && exit 0; trap "" TERM; sleep 60 & echo $! > left; kill -KILL $$'

    found = run(tmp_path, "--", "sh", "-c", script)

    assert found.returncode == 0, found.output
    assert starts(tmp_path) == 2
    assert not Path(f"/proc/{(tmp_path / 'left').read_text().strip()}").exists()


def test_a_holders_process_that_still_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.cli.run.END_TIMEOUT_S", 0.1)
    writes = f"""{sys.executable} -c '
import ctypes, time
from pathlib import Path
ctypes.CDLL(None).prctl(15, b"remote_main", 0, 0, 0)
Path("ready").touch()
time.sleep(1.0)
Path("written").touch()
' &
while ! test -e ready; do sleep 0.02; done
kill -KILL $$"""
    found = run(tmp_path, "--", "sh", "-c", COUNT + "test $n = 2 && test -e written && exit 0\n" + writes)

    assert found.returncode == 0, found.output
    assert starts(tmp_path) == 2


@pytest.mark.parametrize("error", [None, PermissionError, ProcessLookupError])
def test_what_cannot_be_killed_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError] | None
) -> None:
    """It is in the midst of a driver's call, another user's, or ends just now."""

    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (1, signal.SIGKILL)
        if error is not None:
            raise error

    monkeypatch.setattr("lightning_async.cli.run.END_TIMEOUT_S", 0.1)
    monkeypatch.setattr("lightning_async.cli.run.descendants", lambda root, parents: {1})
    monkeypatch.setattr("lightning_async.cli.run.os.kill", kill)

    found = run(tmp_path, "--", "sh", "-c", COUNT + "test $n = 2", timeout_s=20.0)

    assert found.returncode == 0, found.output
    assert "[run] what the command has left does not end, although it was killed: process 1." in found.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_starts_is_the_end_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("lightning_async.cli.run.back_off_s", lambda count: 60.0)

    def announce(text: str) -> None:
        (tmp_path / "said").write_text(text)

    monkeypatch.setattr("lightning_async.cli.run._say", announce)

    def send(session: int) -> None:
        assert eventually(lambda: (tmp_path / "said").exists())
        os.kill(session, number)

    found = run(tmp_path, "--", "sh", "-c", COUNT + "exit 1", timeout_s=20.0, meanwhile=send)

    # It has ended by itself, as the first process of a container has to.
    assert found.returncode == 128 + number, found.output
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_asks_for_a_checkpoint_goes_to_the_command_and_ends_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = f"trap 'echo asked > asked; exit 0' {number.name[3:]}; echo x > ready; while true; do sleep 0.1; done"

    def ask(session: int) -> None:
        assert eventually(lambda: (tmp_path / "ready").exists())
        os.kill(session, number)

    found = run(tmp_path, "--", "sh", "-c", script, timeout_s=20.0, meanwhile=ask)

    assert found.returncode == 0, found.output
    assert (tmp_path / "asked").exists()


def test_a_signal_while_the_command_is_being_started_ends_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def terminated_meanwhile(*arguments: Any, **more: Any) -> Any:
        process = start(*arguments, **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", terminated_meanwhile)
    found = run(tmp_path, "--", "sleep", "60", timeout_s=20.0)

    assert found.returncode == 128 + signal.SIGTERM, found.output


def test_sigterm_ends_the_command_and_is_no_reason_to_start_it_again(tmp_path: Path) -> None:
    def terminate(session: int) -> None:
        assert eventually(lambda: (tmp_path / "starts").exists())
        os.kill(session, signal.SIGTERM)

    found = run(tmp_path, "--", "sh", "-c", COUNT + "exec sleep 60", meanwhile=terminate)

    assert found.returncode == 128 + signal.SIGTERM, found.output
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "what is to be run?"),
        (["--max-restarts", "many", "--", "true"], "'many' is not 0 or a positive whole number"),
        (["--", "./no-such-command"], "./no-such-command cannot be run"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_main(arguments)

    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


class KillsRankZero(Callback):
    """Kills rank 0 some batches after the first snapshot."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.batches_left = 5

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.strategy.worker_rank == 0 and self.snapshot.exists():
            self.batches_left -= 1
            if self.batches_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def train(start_method: Any, holder: Any) -> None:
    """The script: rank 0 is killed in its first start."""
    folder = Path.cwd()
    seed_everything(SEED, verbose=False)
    is_first = os.environ["LIGHTNING_ASYNC_RESTART_COUNT"] == "0"
    callbacks = [KillsRankZero(folder / SNAPSHOT) if is_first else KeepsSnapshot()]
    strategy = AsyncAMSGradStrategy(start_method=start_method, snapshot_every_s=0.15, holder=holder)
    trainer = fork_trainer(folder, RANKS, strategy, max_epochs=EPOCHS, callbacks=callbacks)
    trainer.fit(Module(), loader(SAMPLES, BATCH, shuffle=True), loader(12))


@pytest.mark.parametrize(
    ("start_method", "holder"), [("fork", "thread"), pytest.param("popen", "process", marks=pytest.mark.soak)]
)
def test_a_run_outlives_rank_0_with_every_sample_once(tmp_path: Path, start_method: str, holder: str) -> None:
    script = tmp_path / "train.py"
    call = f"train('{start_method}', '{holder}')"
    script.write_text(f"if __name__ == '__main__':\n    from {__name__} import train\n    {call}\n")

    found = run(tmp_path, "--", sys.executable, str(script), timeout_s=200.0)

    assert found.returncode == 0, found.output
    assert "was started again" not in found.output
    assert found.output.count("it is started again (1 of 3)") == 1
    assert "This job was restarted by lightning-async run and goes on from the snapshot" in found.output
    assert_resumed_exactly(tmp_path / "kept.ckpt", found.reports(), epochs=EPOCHS)
