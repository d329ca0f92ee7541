"""Claims about running jobs: what is finished is left out, what fails stops nothing, nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_async.cli.compare.runner import Job, Outcome, is_finished, only_one_at_a_time, run_jobs

pytestmark = pytest.mark.timeout(60)

# Writes its record in two steps, and counts how often it was run.
TRAINING = """
import json, sys
from pathlib import Path
record, count = Path(sys.argv[1]), Path(sys.argv[2])
count.write_text(count.read_text() + "x" if count.exists() else "x")
record.write_text(json.dumps({"finished": False, "evaluations": []}))
EXTRA
record.write_text(json.dumps({"finished": True, "evaluations": []}))
"""


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.running = self.most_running = 0
        self.started_names: list[str] = []
        self.outcomes: dict[str, Outcome] = {}

    def started(self, job: Job) -> None:
        self.started_names.append(job.name)
        self.running += 1
        self.most_running = max(self.running, self.most_running)

    def progressed(self, job: Job, record: Mapping[str, Any]) -> None:
        assert "finished" in record

    def waiting(self) -> None:
        assert self.running

    def ended(self, outcome: Outcome) -> None:
        self.running -= outcome.job.name in self.started_names
        self.outcomes[outcome.job.name] = outcome


def job(tmp_path: Path, name: str, extra: str = "", digest: str = "d") -> Job:
    folder = tmp_path / name
    command = [sys.executable, "-c", TRAINING.replace("EXTRA", extra)]
    return Job(
        name,
        [*command, str(folder / "record.json"), str(tmp_path / f"{name}.count")],
        folder,
        digest,
        folder / "record.json",
    )


def run(jobs: list[Job], parallel: int = 1, timeout_s: float = 30.0) -> tuple[list[Outcome], Notes]:
    notes = Notes()
    return run_jobs(jobs, notes, parallel, timeout_s), notes


def times_run(tmp_path: Path, name: str) -> int:
    return len((tmp_path / f"{name}.count").read_text())


def test_what_is_finished_is_not_run_again_and_the_rest_is(tmp_path: Path) -> None:
    done, half = job(tmp_path, "done"), job(tmp_path, "half", "import time; time.sleep(600)")
    run([done, half], timeout_s=2.0)
    (half.folder / "left_over").touch()

    outcomes, notes = run([done, replace(half, command=job(tmp_path, "half").command)])

    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert notes.started_names == ["half"]
    assert times_run(tmp_path, "done") == 1 and times_run(tmp_path, "half") == 2
    assert not (half.folder / "left_over").exists()


def test_a_job_with_another_digest_is_run_again(tmp_path: Path) -> None:
    run([job(tmp_path, "a")])

    run([job(tmp_path, "a", digest="e")])

    assert times_run(tmp_path, "a") == 2


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("raise ValueError('no luck')", "exit status 1: ValueError: no luck; see "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("sys.exit(0)", "it ended before its training did"),
        ("import time; time.sleep(600)", "it did not end within 2 s"),
        ("print('error: wrong key'); sys.exit(2)", "exit status 2: error: wrong key; see "),
    ],
)
def test_a_failing_job_is_reported_and_stops_no_other(tmp_path: Path, extra: str, reason: str) -> None:
    bad, good = job(tmp_path, "bad", extra), job(tmp_path, "good")

    outcomes, _ = run([bad, good], timeout_s=2.0 if "sleep" in extra else 30.0)

    assert (outcomes[0].failure or "").startswith(reason)
    assert outcomes[1].failure is None
    assert not is_finished(bad) and is_finished(good)


def test_no_more_jobs_run_at_a_time_than_allowed(tmp_path: Path) -> None:
    outcomes, notes = run([job(tmp_path, str(index)) for index in range(4)], parallel=2)

    assert notes.most_running == 2
    assert [outcome.job.name for outcome in outcomes] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_jobs_and_what_they_started(tmp_path: Path, signum: signal.Signals) -> None:
    pids = tmp_path / "pids"
    extra = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"Path({str(pids)!r} + '.part').write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids)!r} + '.part', {str(pids)!r})\n"
        "time.sleep(600)"
    )

    def interrupt() -> None:
        while not pids.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    interrupter = threading.Thread(target=interrupt)
    # A shell's background job, which this may be, ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            run([job(tmp_path, "long", extra)])
    finally:
        signal.signal(signal.SIGINT, before)
    interrupter.join()

    deadline = time.monotonic() + 10.0
    left = [int(pid) for pid in pids.read_text().split()]
    while any(map(_is_alive, left)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_alive, left))


def test_an_interruption_ends_a_job_that_has_just_been_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, []

    def interrupted_start(*command: Any, **options: Any) -> Any:
        started.append(start(*command, **options))
        # Nobody else knows of the process yet.
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted_start)

    with pytest.raises(KeyboardInterrupt):
        run([job(tmp_path, "long", "import time; time.sleep(600)")])

    assert started[0].returncode == -signal.SIGKILL


def test_the_environment_reaches_the_job(tmp_path: Path) -> None:
    asking = job(tmp_path, "a", "import os; assert os.environ['OMP_NUM_THREADS'] == '3'")

    outcomes, _ = run([replace(asking, environment={"OMP_NUM_THREADS": "3"})])

    assert outcomes[0].failure is None


def test_a_folder_is_for_one_comparison_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="another comparison")
    with only_one_at_a_time(tmp_path), refused, only_one_at_a_time(tmp_path):
        pass

    with only_one_at_a_time(tmp_path):
        pass


def test_half_a_record_is_no_result(tmp_path: Path) -> None:
    done = job(tmp_path, "done")
    run([done])
    done.record.write_text(json.dumps({"finished": True})[:-3])

    assert not is_finished(done)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
