"""The runner behind `tests/gpu/run.sh`, its steps, and its wheels: all of it that needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import kit, wheels
from tests.gpu.runner import Outcome, table
from tests.launch import gone

ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, steps: str, budget_s: float = 60.0) -> tuple[list[dict[str, Any]], str, str]:
    """Runs steps in a process of their own, which adopts orphans; gives outcomes, log and what was told.

    Args:
        folder: where.
        steps: a Python expression of `Step` objects; ``py(CODE)`` is a command that runs Python code.
        budget_s: of the runner.
    """
    script = f"""
import json, sys
from pathlib import Path
from tests.gpu.runner import Runner, Step, as_json

def py(code):
    return [sys.executable, "-c", code]

runner = Runner(Path("log.txt"), Path.cwd(), {budget_s}, grace_s=0.5)
for step in {steps}:
    runner.run(step)
Path("outcomes.json").write_text(json.dumps(as_json(runner.outcomes)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outcomes.json").read_text()), (folder / "log.txt").read_text(), done.stdout


def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    outcomes, log, told = run(
        tmp_path,
        """[
            Step("first", py("print('one'); raise SystemExit(3)"), 30),
            Step("absent", ["/no/such/program"], 30),
            Step("last", py("print('seen'); print()"), 30, {"NAME": "value"}),
        ]""",
    )

    assert [one["status"] for one in outcomes] == ["failed", "failed", "ok"]
    assert [one["exit_code"] for one in outcomes] == [3, 127, 0]
    assert [one["last_line"] for one in outcomes][::2] == ["one", "seen"]
    assert "No such file" in outcomes[1]["last_line"]
    assert log.index("=== first") < log.index("one\n") < log.index("=== last")
    assert "last: ok  seen" in told


def test_a_step_over_its_time_is_interrupted_then_killed_with_all_that_it_started(tmp_path: Path) -> None:
    # One that heeds an interruption; and one that does not, with a child in a session of its own.
    stubborn = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)
Path('pid').write_text(str(child.pid))
time.sleep(60)
"""
    outcomes, _, _ = run(
        tmp_path,
        f"""[
            Step("slow", py("import time\\ntry:\\n time.sleep(60)\\nexcept KeyboardInterrupt:\\n print('so far')"), 1),
            Step("stubborn", py({stubborn!r}), 3),
            Step("next", py("print('goes on')"), 30),
        ]""",
    )

    assert [one["status"] for one in outcomes] == ["timed out", "timed out", "ok"]
    assert outcomes[0]["last_line"] == "so far"
    assert outcomes[1]["exit_code"] == -9
    assert gone(int((tmp_path / "pid").read_text()), 1.0)


def test_what_a_step_leaves_running_is_killed_and_counted(tmp_path: Path) -> None:
    leaver = """
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)
Path('pid').write_text(str(child.pid))
print('done')
"""
    outcomes, _, _ = run(tmp_path, f"[Step('leaver', py({leaver!r}), 30)]")

    assert outcomes[0]["status"] == "ok"
    assert outcomes[0]["left_over"] == 1
    assert gone(int((tmp_path / "pid").read_text()), 1.0)


def test_steps_are_skipped_and_said_to_be_when_the_budget_is_used_up_or_what_they_need_has_failed(
    tmp_path: Path,
) -> None:
    outcomes, log, _ = run(
        tmp_path,
        """[
            Step("probe", py("raise SystemExit('not here')"), 30),
            Step("needs it", py("print('never')"), 30, {}, "probe", "this machine has no such thing"),
            Step("long", py("import time; time.sleep(60)"), 50),
            Step("late", py("print('never')"), 30),
        ]""",
        budget_s=6.0,
    )

    assert [one["status"] for one in outcomes] == ["failed", "skipped", "timed out", "skipped"]
    assert outcomes[1]["last_line"] == "this machine has no such thing"
    assert outcomes[3]["last_line"] == "the budget of 6 s is used up"
    assert outcomes[3]["exit_code"] is None
    assert "never" not in log


def test_the_table_has_a_line_for_each_step() -> None:
    lines = table(
        [
            Outcome("short", "ok", 1.25, 0, "3 passed"),
            Outcome("a longer one", "skipped", last_line="no time", left_over=2),
        ]
    ).splitlines()

    assert lines[0].split() == ["step", "status", "seconds", "exit", "last", "line"]
    assert lines[1].split() == ["short", "ok", "1.2", "0", "3", "passed"]
    assert lines[2].endswith("[2 processes left over] no time")


@pytest.mark.parametrize("dry", [True, False])
def test_every_step_names_what_exists_and_has_a_time_out(tmp_path: Path, dry: bool) -> None:
    steps = kit.steps(tmp_path, dry)

    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert all(0 < step.timeout_s <= 180 for step in steps)
    for step in steps:
        module = step.command[2]
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        paths = [part for part in step.command[3:] if part.startswith("tests/") and "=" not in part]
        assert all((ROOT / path).exists() for path in paths), paths
        assert step.needs is None or names.index(step.needs) < names.index(step.name)
    # The dry run is of the same steps.
    assert names == [step.name for step in kit.steps(tmp_path, not dry)]


@pytest.mark.parametrize("pattern", [pattern for patterns in kit.NEEDED.values() for pattern in patterns])
def test_what_is_left_out_for_want_of_a_package_exists(pattern: str) -> None:
    path, _, test = pattern.partition("::")
    found = list(ROOT.glob(path))

    assert found
    assert all(test in file.read_text() for file in found)


def test_the_kit_leaves_a_summary_results_and_a_log(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "tests/gpu/run.sh"), "--dry-run", "--only", "machine"]

    done = subprocess.run(
        command, env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=100
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "results.json", "log.txt"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dry_run"] is True
    assert [step["status"] for step in summary["steps"]] == ["ok", "ok"]
    assert summary["machine"]["packages"]["torch"]
    assert "machine  " in done.stdout


def test_what_pytest_and_benchmarks_leave_is_gathered(tmp_path: Path) -> None:
    (tmp_path / "suite.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.unit.test_a" name="test_b" time="1.5"/>'
        '<testcase classname="tests.unit.test_a" name="test_c" time="0.5"><failure message="AssertionError: 1"/>'
        '</testcase><testcase classname="tests.gpu" name="test_d"><skipped message="needs a CUDA device"/></testcase>'
        "</testsuite></testsuites>"
    )
    (tmp_path / "half.xml").write_text("<testsuites><testsuite>")
    (tmp_path / "results" / "floor").mkdir(parents=True)
    (tmp_path / "results" / "floor" / "floor.json").write_text('{"found": [1]}')
    out = tmp_path / "out"
    out.mkdir()

    class Nothing:
        outcomes: tuple[Outcome, ...] = ()
        seconds = 1.0

    kit.write_results(out, Nothing(), {"dry_run": True}, tmp_path)  # type: ignore[arg-type]

    tests = json.loads((out / "summary.json").read_text())["tests"]
    assert {kind: tests["suite"][kind] for kind in ("passed", "failed", "skipped")} == dict.fromkeys(
        ("passed", "failed", "skipped"), 1
    )
    assert tests["suite"]["not passed"]["unit.test_a::test_c"] == "AssertionError: 1"
    assert "unreadable" in tests["half"]
    assert json.loads((out / "results.json").read_text()) == {"floor": {"floor": {"found": [1]}}}


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_gpu_tests_run_with_the_host_in_the_gpus_place(tmp_path: Path) -> None:
    environment = {**os.environ, "GPU_KIT_STAND_IN": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'runs'}"]
    chosen = "one_line or replayed and (overlap or nccl) or from_a_host and both or agree and nccl and mixed"

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", chosen, "tests/gpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout


def test_only_what_is_missing_or_too_old_is_taken_from_the_kit() -> None:
    files = [Path(f"{name}-1.0-py3-none-any.whl") for name in ("pytest", "no_such_project", "torch")]

    taken = wheels.missing(files, {"torch": ">=99"})

    assert [wheels.project(wheel) for wheel in taken] == ["no-such-project", "torch"]
    assert wheels.requirements()["jsonargparse"] == ">=4.52,<5"


def test_the_kit_asks_for_the_versions_that_the_package_asks_for() -> None:
    declared = (ROOT / "pyproject.toml").read_text()

    asked = wheels.REQUIREMENTS.read_text().splitlines()
    for name in ("jsonargparse", "threadpoolctl"):
        (line,) = [line for line in asked if line.startswith(name)]
        assert f'"{line}"' in declared


def test_the_time_is_told_where_the_runner_itself_is_ended(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    kit_process = subprocess.Popen(
        ["bash", str(ROOT / "tests/gpu/run.sh"), "--dry-run", "--only", "suite"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    log = tmp_path / "out" / "log.txt"
    while not (log.exists() and "=== suite" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)

    kit_process.terminate()
    told, _ = kit_process.communicate(timeout=60)

    assert kit_process.returncode == 128 + 15
    assert "packages" in told
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"][0]["step"] == "packages"
