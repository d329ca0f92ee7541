"""A rank is killed every ten seconds: batches per second that count, of async_amsgrad, DDP under torchrun, and torchft.

Run ``python -m benchmarks.churn``. Four ranks sleep 50 ms in each step; a random one, never rank 0, is killed every ten
seconds and replaced. What the living could do is the integral of their own rates: a rank that trains counts with what
the same loop completes alone on this machine, from its first batch to its death.

The undisturbed run, a fifth as long, shows which gaps come without deaths: a step and the machine's own noise, and
at an epoch's end the wait for the slowest.

torchft takes part where it is installed; ``pip install --target FOLDER --no-deps torchft`` and PYTHONPATH=FOLDER keep
it out of the environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.churn_count import Found, count_async, count_ddp, count_torchft, lives_of
from benchmarks.churn_runs import Churned, Event, command_of, events_in
from benchmarks.emulated import LENET5_PARAMETERS, RESNET18_PARAMETERS, measure
from benchmarks.record import save
from lightning_async.chaos.processes import descendants, parents
from lightning_async.chaos.striker import Striker
from lightning_async.runtime.whereabouts import FOLDER

_MODELS = {"44k": LENET5_PARAMETERS, "11m": RESNET18_PARAMETERS}
_KINDS = ("calm", "fork", "popen", "ddp", "torchft")
_NAMES = {
    "calm": "the same, undisturbed",
    "fork": "async_amsgrad, fork",
    "popen": "async_amsgrad, popen",
    "ddp": "ddp under torchrun",
    "torchft": "torchft's DDP",
}
_START_TIMEOUT_S = 300.0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long each is struck")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--model", choices=[*_MODELS], nargs="+", default=[*_MODELS])
    parser.add_argument("--only", choices=_KINDS, nargs="+", default=list(_KINDS))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--epoch-seconds", type=float, default=60.0, help="about how long an epoch takes")
    parser.add_argument("--checkpoint-steps", type=int, default=50, help="DDP's steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of whom is killed")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    save("churn", vars(arguments), [compare(_MODELS[model], arguments) for model in arguments.model])


def compare(parameters: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each kind of run with a model of this size, printed and returned."""
    step_s = arguments.step_ms / 1000
    alone = measure("auto", [step_s], int(10 / step_s), parameters)["batches_per_second"]
    print(
        f"\n{parameters:,} parameters, {arguments.ranks} ranks of {arguments.step_ms:g} ms: alone {alone:.1f} batches/s"
    )
    print(
        "                      kills  batches/s  of the  of all  longest gap  to the first     samples\n"
        "                                        living   ranks  in steps;    gradient;        lost / repeated\n"
        "                                                        epoch's end  after imports"
    )
    found: dict[str, Any] = {}
    for kind in arguments.only:
        if kind == "torchft" and importlib.util.find_spec("torchft") is None:
            print(f"{_NAMES[kind]:<20}  is not installed")
            continue
        result = _churn(kind, parameters, step_s, arguments, alone)
        found[kind] = result._asdict()
        print(result.row(_NAMES[kind]), flush=True)
    return {"parameters": parameters, "alone": alone, "runs": found}


def _churn(kind: str, parameters: int, step_s: float, arguments: argparse.Namespace, alone: float) -> Found:
    folder = Path(tempfile.mkdtemp(prefix=f"churn-{kind}-"))
    whereabouts = folder / "whereabouts"
    whereabouts.mkdir()
    samples = int(arguments.epoch_seconds / step_s) * arguments.ranks
    start = "fork" if kind == "calm" else kind
    run = Churned(start, str(folder), arguments.ranks, parameters, step_s, samples, arguments.checkpoint_steps)
    minutes_s = arguments.minutes * (12 if kind == "calm" else 60)
    with (folder / "output.txt").open("w") as output, _started(run, whereabouts, output) as root:
        _wait_for(folder, _training, arguments.ranks)
        began = time.monotonic()
        every = math.inf if kind == "calm" else arguments.every
        striker = Striker(root, whereabouts, every, seed=arguments.seed, say=lambda line: None)
        striker.run(lambda seconds: _is_over(seconds, began + minutes_s))
        ended = time.monotonic()
    events = events_in(folder)
    deaths = {strike.pid: strike.at_s for strike in striker.strikes}
    lives = lives_of(events, deaths, ended)
    counted = {"ddp": count_ddp, "torchft": count_torchft}.get(kind, count_async)(events, samples, began, ended)
    found = Found.of(counted, lives, striker.strikes, began, ended, alone, step_s, arguments.ranks)
    shutil.rmtree(folder)
    return found


def _is_over(seconds: float, end: float) -> bool:
    left = end - time.monotonic()
    time.sleep(max(0.0, min(seconds, left)))
    return left <= seconds


def _wait_for(folder: Path, find: Callable[[list[Event]], list[Any]], count: int = 1) -> list[Any]:
    """What ``find`` finds in a run's events, once there are ``count`` of it."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while len(found := find(events_in(folder))) < count:
        if time.monotonic() > deadline:
            output = (folder / "output.txt").read_text()[-4000:]
            raise SystemExit(f"the run has not begun after {_START_TIMEOUT_S:g} s:\n{output}")
        time.sleep(0.2)
    return found


def _training(events: list[Event]) -> list[int]:
    return sorted({event["rank"] for event in events if event["what"] == "begins"})


@contextmanager
def _started(run: Churned, whereabouts: Path, output: Any) -> Iterator[int]:
    """Starts a run; gives the process that all ranks descend from, and ends them all."""
    variables = os.environ | {FOLDER: str(whereabouts)}
    if run.kind == "torchft":
        with _replicas(run, variables, output) as root:
            yield root
        return
    process = subprocess.Popen(command_of(run), env=variables, stdout=output, stderr=output)
    try:
        yield process.pid
    finally:
        _end_below(process.pid)
        process.kill()
        process.wait()


@contextmanager
def _replicas(run: Churned, variables: dict[str, str], output: Any) -> Iterator[int]:
    """torchft's replica groups, each of which is started again when it has ended, and its lighthouse."""
    over = threading.Event()
    lighthouse = subprocess.Popen(command_of(replace(run, kind="lighthouse")), stdout=output, stderr=output)
    address = _wait_for(Path(run.folder), lambda events: [one["address"] for one in events if "address" in one])[0]

    def keep_alive(rank: int) -> None:
        command = command_of(replace(run, rank=rank, lighthouse=address))
        while not over.is_set():
            subprocess.Popen(command, env=variables | {"RANK": str(rank)}, stdout=output, stderr=output).wait()

    threads = [threading.Thread(target=keep_alive, args=(rank,), daemon=True) for rank in range(run.ranks)]
    for thread in threads:
        thread.start()
    try:
        yield os.getpid()
    finally:
        over.set()
        _end_below(os.getpid())
        for thread in threads:
            thread.join()
        lighthouse.wait()


def _end_below(root: int) -> None:
    """Kills what a process has started, from the top: whoever is left has nobody who starts it again."""
    while below := descendants(root, parents()):
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # noqa: PERF203  # each may be gone by itself
                continue
        time.sleep(0.1)


if __name__ == "__main__":
    main()
