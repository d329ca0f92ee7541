"""The steps of `tests/gpu/run.sh`, and what they leave: ``python -m tests.gpu.kit``; the standard library alone.

Three files are left: `summary.json` (the machine, the steps, each test), `results.json` (what the benchmarks measured)
and `log.txt` (all that the steps printed). They are written again after each step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.gpu.runner import Runner, Step, as_json, table

__all__ = ["BUDGET_S", "ROOT", "main", "steps"]

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 480.0
# For each step of a dry run, which machines that are busy with other things must manage too.
DRY_S = 180.0
PROBE = "nccl shares a GPU"
REFUSED = "NCCL does not take two ranks on one GPU here (2.30 and newer do)"
# With a GPU in sight no process that is forked after a backward pass can have one, and these tests fork after some.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SHARING = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}

# What unit tests of the suite need beyond the kit's wheels; they are left out where it is missing.
NEEDED = {
    "sklearn": [
        "tests/unit/recipes/test_r*.py",
        "tests/unit/cli/test_compare_recipes.py",
        "tests/unit/cli/test_app.py",
    ],
    "wandb": ["tests/canary/test_behaviour.py::test_a_logger_keeps_its_prefix_under_the_same_names"],
    "matplotlib": ["tests/unit/monitoring/test_report.py", "tests/unit/cli/test_compare_results.py"],
}
# Those of the integration tests that take the ways that GPU ranks take, and those that hold the promises.
INTEGRATION = [
    f"tests/integration/test_{name}.py"
    for name in ("gpu_paths", "equality", "exactly_once", "staleness_bound", "phases", "checkpoints", "arguments")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps; returns 0 if none failed and none was left out for want of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, and the host in the GPU's place")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, and those that they need")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    given = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT") or ROOT / "gpu-results")
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as folder:
        chosen = _choose(steps(Path(folder), given.dry_run), given.only)
        if given.list:
            for step in chosen:
                print(f"{step.name:<20} {step.timeout_s:>5.0f} s  {' '.join(step.command)}")
            return 0
        out.mkdir(parents=True, exist_ok=True)
        log = out / "log.txt"
        log.unlink(missing_ok=True)
        runner = Runner(log, ROOT, given.budget)
        _prepare_environment(Path(folder), given.dry_run)
        signal.signal(signal.SIGTERM, _stop)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        about = {"started": started, "dry_run": given.dry_run, "budget_s": given.budget}
        try:
            for step in chosen:
                runner.run(step)
                write_results(out, runner, about, Path(folder))
        finally:
            write_results(out, runner, about, Path(folder))
            print(table(runner.outcomes), flush=True)
    print(f"{runner.seconds:.0f} s; results in {out}", flush=True)
    bad = [one for one in runner.outcomes if one.status in ("failed", "timed out") or "budget" in one.last_line]
    return 1 if bad else 0


def steps(folder: Path, dry: bool) -> list[Step]:
    """What is run, the most wanted first: what comes last is left out if the budget is used up.

    Args:
        folder: for what the steps hand to this process.
        dry: small sizes, and the host in the GPU's place.
    """
    made = _dry_steps(folder) if dry else _full_steps(folder)
    python = sys.executable
    return [
        Step("packages", [python, "-m", "tests.gpu.wheels", "take", str(folder / "site")], 60),
        Step("machine", [python, "-m", "tests.gpu.machine", str(folder / "machine.json")], 60),
        Step("imports", [python, "-m", "tests.gpu.kit_imports"], 60),
        *made,
    ]


def _full_steps(folder: Path) -> list[Step]:
    cuda = ["--device", "cuda", "--models", "ResNet18", "--batch-size", "64", "--seconds", "4", "--repeats", "1"]
    suite = [*_left_out(), *INTEGRATION, "tests/unit"]
    return [
        _tests(folder, "gpu tests", 170, ["tests/gpu"], processes=8),
        _benchmark(folder, "ddp overhead", 170, "overhead", *cuda, "--ranks", "1", "3"),
        Step(PROBE, [sys.executable, "-m", "tests.gpu.share_probe"], 45, SHARING),
        _tests(folder, "nccl tests", 100, ["-k", "nccl or auto", "tests/gpu"], processes=4, needs=PROBE),
        _benchmark(folder, "nccl overhead", 100, "overhead", *cuda, "--ranks", "2", "--backend", "nccl", needs=PROBE),
        _tests(folder, "suite", 150, suite, processes=14, environment=NO_GPU),
        _benchmark(folder, "scaling", 75, "scaling", "--seconds", "3", "--ranks", "1", "4", "16"),
        _benchmark(folder, "ceiling", 60, "ceiling", "--seconds", "1.5", "--workers", "1", "12"),
        _benchmark(folder, "floor", 45, "floor", "--seconds", "1.5"),
        _benchmark(folder, "holder", 45, "holder", "--threads", "1", "2", "4", "8", "--rounds", "5", "--seconds", "1"),
        _benchmark(folder, "rank 0", 60, "rank0", "--seconds", "1.5", "--repeats", "1", "--pauses-ms", "0"),
    ]


def _dry_steps(folder: Path) -> list[Step]:
    host = ["--models", "LeNet-5", "--batch-size", "4", "--seconds", "0.3", "--repeats", "1", "--ranks", "2"]
    few = "replayed and (shm or overlap) or one_line or agree and overlap and mixed"
    suite = ["tests/integration/test_gpu_paths.py", "tests/unit/transport/test_message.py"]
    holder = ["--size", "44K", "--threads", "1", "--k", "2", "--workers", "2", "--rounds", "2", "--seconds", "0.2"]
    ceiling = ["--sizes", "44K", "--transports", "shm", "--workers", "1", "--seconds", "0.3"]
    return [
        _tests(folder, "gpu tests", DRY_S, ["-k", few, "tests/gpu"], processes=2),
        _benchmark(folder, "ddp overhead", DRY_S, "overhead", *host),
        Step(PROBE, [sys.executable, "-m", "tests.gpu.share_probe", "--stand-in"], DRY_S, SHARING),
        _tests(folder, "nccl tests", DRY_S, ["-k", "replayed and nccl", "tests/gpu"], processes=2, needs=PROBE),
        _benchmark(folder, "nccl overhead", DRY_S, "overhead", *host, needs=PROBE),
        _tests(folder, "suite", DRY_S, [*_left_out(), *suite], processes=2),
        _benchmark(folder, "scaling", DRY_S, "scaling", "--seconds", "0.3", "--ranks", "2", "--ddp-ranks", "1"),
        _benchmark(folder, "ceiling", DRY_S, "ceiling", *ceiling),
        _benchmark(folder, "floor", DRY_S, "floor", "--sizes", "44K", "--seconds", "0.3"),
        _benchmark(folder, "holder", DRY_S, "holder", *holder),
        _benchmark(folder, "rank 0", DRY_S, "rank0", "--seconds", "0.3", "--repeats", "1", "--pauses-ms", "2"),
    ]


def _tests(
    folder: Path,
    name: str,
    timeout_s: float,
    chosen: Sequence[str],
    processes: int,
    environment: Mapping[str, str] | None = None,
    needs: str | None = None,
) -> Step:
    # Warnings are no errors here: another torch may have others.
    # A line for each test that ends, so that the log names them also where the step is stopped.
    options = ["-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--maxfail=25"]
    # Most of their time goes into starting processes, which is why there may be more of them than cores.
    parallel = ["-n", str(processes), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *options, *parallel, f"--junitxml={folder / name}.xml", *chosen]
    return _needing(needs, name, command, timeout_s, environment or {})


def _benchmark(
    folder: Path, name: str, timeout_s: float, program: str, *options: str, needs: str | None = None
) -> Step:
    command = [sys.executable, "-m", f"benchmarks.{program}", *options]
    return _needing(needs, name, command, timeout_s, {"BENCHMARK_RESULTS": str(folder / "results" / name)})


def _needing(
    needs: str | None, name: str, command: Sequence[str], timeout_s: float, environment: Mapping[str, str]
) -> Step:
    if needs is None:
        return Step(name, command, timeout_s, environment)
    return Step(name, command, timeout_s, {**environment, **SHARING}, needs, REFUSED)


def write_results(out: Path, runner: Runner, about: dict[str, Any], folder: Path) -> None:
    """Writes what is known by now.

    Args:
        out: where.
        runner: has the outcomes.
        about: the run.
        folder: where the steps leave what they found.
    """
    machine = folder / "machine.json"
    summary = {
        **about,
        "seconds": runner.seconds,
        "steps": as_json(runner.outcomes),
        "machine": json.loads(machine.read_text()) if machine.exists() else None,
        "tests": {path.stem: read_junit(path) for path in sorted(folder.glob("*.xml"))},
    }
    _write(out / "summary.json", summary)
    measured = {
        step.name: {path.stem: json.loads(path.read_text()) for path in sorted(step.glob("*.json"))}
        for step in sorted(folder.glob("results/*"))
    }
    _write(out / "results.json", measured)


def read_junit(path: Path) -> dict[str, Any]:
    """What pytest wrote: counts, seconds of each test, and the beginning of each failure's text."""
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except ElementTree.ParseError as error:
        return {"unreadable": str(error)}
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": {}, "not passed": {}}
    for case in cases:
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        found["seconds"][name] = float(case.get("time") or 0)
        notes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        kind = "passed" if not notes else "skipped" if notes[0].tag == "skipped" else "failed"
        found[kind] += 1
        if notes:
            found["not passed"][name] = (notes[0].get("message") or notes[0].text or "")[:600]
    return found


def _choose(every: list[Step], only: Sequence[str] | None) -> list[Step]:
    if not only:
        return every
    unknown = set(only) - {step.name for step in every}
    if unknown:
        raise SystemExit(f"no such step: {', '.join(sorted(unknown))}. There are {[step.name for step in every]}")
    wanted = set(only) | {"packages"}
    wanted |= {step.needs for step in every if step.name in wanted and step.needs}
    return [step for step in every if step.name in wanted]


def _prepare_environment(folder: Path, dry: bool) -> None:
    paths = [str(ROOT), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["PYTHONUNBUFFERED"] = "1"
    # Counts GPUs without CUDA, which does not survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if dry:
        os.environ["GPU_KIT_STAND_IN"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _left_out() -> list[str]:
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    return [
        f"--deselect={pattern}" if "::" in pattern else f"--ignore-glob={pattern}"
        for module in missing
        for pattern in NEEDED[module]
    ]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
