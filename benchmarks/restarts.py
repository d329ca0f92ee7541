"""Ranks are killed under ``torchrun --max-restarts``: how many jobs go on at the first try, and how soon; beside DDP.

Run ``python -m benchmarks.restarts``. Each turn is a job of each kind; in each a rank is killed some times, one after
the other, rank 0 among them. A restart counts as one at the first try if every rank trains again and no process of it
was started more than once. The time runs from the kill until every rank is in its first step, imports included.
async_amsgrad goes on from its snapshot, DDP from the checkpoint of its last steps.

``--nodes 2`` starts two torchruns on this host, with half of the ranks each. With ``--start fork`` torchrun's agent has
imported everything and forks the ranks, so that a restart takes a moment; with ``exec`` it is the command itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.churn_runs import Event, Notebook, events_in
from benchmarks.record import save
from lightning_async.chaos.processes import descendants, parents

__all__ = ["Job", "Restart", "kill_ranks_of", "tries_of"]

KINDS = ("async_amsgrad", "ddp")
RENDEZVOUS = ("static", "c10d")
_POLL_S = 0.02
# A restart that begins again and again is given up after so many time-outs.
_MOST_TIMEOUTS = 3


@dataclass(frozen=True)
class Job:
    """A training under torchrun.

    Args:
        kind: the strategy.
        rendezvous: torchrun's.
        folder: where it works and tells.
        ranks: number of ranks, of all nodes.
        nodes: number of torchruns.
        start: how a torchrun starts its ranks; see above.
        step_s: seconds that a step sleeps.
        save_s: seconds between two snapshots, or checkpoints.
    """

    kind: str
    rendezvous: str
    folder: str
    ranks: int = 3
    nodes: int = 1
    start: str = "exec"
    step_s: float = 0.02
    save_s: float = 0.5

    def commands(self, port: int) -> list[list[str]]:
        """The command line of each node's torchrun."""
        torchrun = "torch.distributed.run" if self.start == "exec" else "benchmarks.restarts"
        common = [sys.executable, "-m", torchrun, "--max-restarts=1000", f"--nnodes={self.nodes}"]
        common += [f"--nproc-per-node={self.ranks // self.nodes}", f"--log-dir={self.folder}/logs"]
        script = ["-m", "benchmarks.restarts", "--rank", json.dumps(asdict(self))]
        if self.rendezvous == "static":
            where = ["--master-addr=127.0.0.1", f"--master-port={port}"]
            return [[*common, *where, f"--node-rank={node}", *script] for node in range(self.nodes)]
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=restarts-{port}"]
        return [[*common, *where, *script] for _ in range(self.nodes)]


@dataclass
class Restart:
    """What became of one kill.

    Args:
        victim: the rank that was killed.
        tries: how often the ranks were started until all of them trained; 1 is the first try.
        seconds: from the kill until all of them trained.
        ending_s: of these, until the first rank was there again; where ranks are not forked, with its imports.
        hung: whether the ranks had to be killed, since nothing happened for too long.
        from_step: the step that they went on from.
    """

    victim: int
    tries: int = 0
    seconds: float = 0.0
    ending_s: float = 0.0
    hung: bool = False
    from_step: int = 0


@dataclass
class Found:
    """What became of the kills of one kind of job."""

    restarts: list[Restart] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """In numbers."""
        good = [restart for restart in self.restarts if restart.tries == 1]
        first = [restart.seconds for restart in good]
        return {
            "kills": len(self.restarts),
            "first_try": len(first),
            "tries": sum(restart.tries for restart in self.restarts),
            "hung": sum(restart.hung for restart in self.restarts),
            "from_saved": sum(restart.from_step > 0 for restart in self.restarts),
            "median_s": round(statistics.median(first), 2) if first else None,
            "longest_s": round(max(first), 2) if first else None,
            "median_ending_s": round(statistics.median(restart.ending_s for restart in good), 2) if good else None,
        }


def main() -> None:
    """Measures and prints."""
    if "--max-restarts=1000" in sys.argv:
        _fork_ranks(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="jobs of each kind, taken in turns")
    parser.add_argument("--kills", type=int, default=5, help="in each job, one after the other")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rendezvous", nargs="+", choices=RENDEZVOUS, default=list(RENDEZVOUS))
    parser.add_argument("--ranks", type=int, default=3, help="of all nodes")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--start", choices=("exec", "fork"), default="exec")
    parser.add_argument(
        "--hung-s", type=float, default=120.0, help="seconds without news after which a restart has hung"
    )
    parser.add_argument("--seed", type=int, default=0, help="of whom is killed when")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        _train(Job(**json.loads(arguments.rank)))
        return
    # So that what is under way is ended with this process.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {(kind, how): Found() for how in arguments.rendezvous for kind in arguments.only}
    for turn in range(arguments.turns):
        for (kind, how), so_far in found.items():
            restarts = run_job(kind, how, arguments, arguments.seed + turn)
            so_far.restarts += restarts
            load = os.getloadavg()[0]
            print(f"turn {turn}, {kind}, {how} (load {load:.1f}): {[_in_words(one) for one in restarts]}", flush=True)
        print({f"{kind}, {how}": each.summary() for (kind, how), each in found.items()}, flush=True)
    table = [{"kind": kind, "rendezvous": how, **each.summary()} for (kind, how), each in found.items()]
    save("restarts", {name: value for name, value in vars(arguments).items() if name != "rank"}, table)


def tries_of(events: list[Event], since: float, until: float) -> int:
    """How often ranks were started in a time.

    Examples:
        >>> tries_of([{"what": "started", "rank": 0, "at_s": 2.0}, {"what": "begins", "rank": 0, "at_s": 3.0}], 1, 4)
        1
    """
    starts = (event["rank"] for event in events if event["what"] == "started" and since < event["at_s"] <= until)
    return max(Counter(starts).values(), default=0)


def run_job(kind: str, rendezvous: str, arguments: argparse.Namespace, seed: int) -> list[Restart]:
    """One job in a folder of its own; what became of each kill."""
    folder = tempfile.mkdtemp(prefix=f"restarts-{kind}-")
    job = Job(kind, rendezvous, folder, arguments.ranks, arguments.nodes, arguments.start)
    restarts = kill_ranks_of(job, arguments.kills, arguments.hung_s, seed)
    shutil.rmtree(folder)
    return restarts


def kill_ranks_of(job: Job, kills: int, hung_s: float, seed: int) -> list[Restart]:
    """Runs a job, kills one of its ranks after the other, and tells what became of each kill.

    Args:
        job: is started, and ended at last.
        kills: how many.
        hung_s: seconds without any news after which a restart has hung.
        seed: of whom is killed when.
    """
    generator, folder = random.Random(seed), Path(job.folder)
    restarts: list[Restart] = []
    with (folder / "output.txt").open("w") as output, _started(job, output) as agents:
        training = _wait_until_all_train(job, time.monotonic(), 3 * hung_s)
        if training is None:
            raise SystemExit(f"the job has not begun within {3 * hung_s:g} s:\n{_errors_of(folder)}")
        for _ in range(kills):
            # Until something is saved.
            time.sleep(1.5 * job.save_s + generator.uniform(0.5, 1.5))
            victim = generator.randrange(job.ranks)
            restart, killed_at = Restart(victim), time.monotonic()
            os.kill(training[victim]["pid"], signal.SIGKILL)
            training = _wait_until_all_train(job, killed_at, hung_s)
            if training is None:
                restart.hung = True
                print(
                    f"{job.kind}, {job.rendezvous}: hung after rank {victim} was killed:\n{_errors_of(folder)}",
                    flush=True,
                )
                for agent in agents:
                    _kill(descendants(agent.pid, parents()))
                training = _wait_until_all_train(job, time.monotonic(), hung_s)
                if training is None:
                    return [*restarts, restart]
            last = max(event["at_s"] for event in training.values())
            events = events_in(folder)
            restart.tries = tries_of(events, killed_at, last)
            restart.ending_s = min(one["at_s"] for one in events if one["at_s"] > killed_at) - killed_at
            restart.seconds, restart.from_step = last - killed_at, training[0]["step"]
            if restart.tries > 1:
                print(f"{job.kind}, {job.rendezvous}: {restart.tries} tries:\n{_errors_of(folder)}", flush=True)
            restarts.append(restart)
    return restarts


def _wait_until_all_train(job: Job, since: float, timeout_s: float) -> dict[int, Event] | None:
    """Each rank's first step after ``since``, of the processes that are there now; None if nothing happens any more."""
    last = time.monotonic()
    while time.monotonic() < min(last, since + _MOST_TIMEOUTS * timeout_s) + timeout_s:
        new = [event for event in events_in(Path(job.folder)) if event["at_s"] > since]
        newest = {event["rank"]: event for event in new}
        if len(newest) == job.ranks and all(event["what"] == "begins" for event in newest.values()):
            return newest
        last = max(last, *(event["at_s"] for event in new)) if new else last
        time.sleep(_POLL_S)
    return None


@contextmanager
def _started(job: Job, output: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [subprocess.Popen(command, stdout=output, stderr=output) for command in job.commands(port)]
    try:
        yield agents
    finally:
        for agent in agents:
            below = descendants(agent.pid, parents())
            agent.kill()
            agent.wait()
            _kill(below)


def _kill(processes: Any) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # noqa: PERF203  # each may be gone by itself
            continue


def _in_words(restart: Restart) -> str:
    tries = "hung" if restart.hung else f"{restart.tries}. try" if restart.tries > 1 else ""
    seconds = f"{restart.seconds:.1f} ({restart.ending_s:.1f}) s"
    return f"rank {restart.victim}: {seconds}, step {restart.from_step} {tries}".rstrip()


def _errors_of(folder: Path) -> str:
    """The last errors that the ranks have printed."""
    lines = (folder / "output.txt").read_text().splitlines()
    return "\n".join([line[:200] for line in lines if "Error" in line and "torch/distributed/elastic" not in line][-3:])


def _fork_ranks(torchruns: list[str]) -> None:
    """Does what torchrun does with these arguments, but for how the ranks are started."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    import lightning_async  # noqa: F401  # with all that the ranks would import

    parse: Any = parse_args
    config, _, arguments = config_from_args(parse(torchruns))
    config.start_method = "fork"
    elastic_launch(config, _train)(Job(**json.loads(arguments[-1])))


def _train(job: Job) -> None:
    rank, notebook = int(os.environ["RANK"]), Notebook(job.folder)
    notebook.note("started", rank=rank)
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch import Tensor
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_async
    from benchmarks.emulated import QUIET, hush_lightning

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)
            self.begun = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if not self.begun:
                self.begun = True
                notebook.note("begins", rank=rank, step=self.trainer.global_step)
            time.sleep(job.step_s)
            loss: Tensor = self.layer(batch[0]).mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-4, amsgrad=True)

    hush_lightning()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments: dict[str, Any] = {**QUIET, "accelerator": "cpu", "max_epochs": -1, "default_root_dir": job.folder}
    arguments |= {"devices": job.ranks // job.nodes, "num_nodes": job.nodes}
    resume: str | None = None
    if job.kind == "ddp":
        checkpoints = ModelCheckpoint(job.folder, every_n_train_steps=int(job.save_s / job.step_s), save_last=True)
        arguments |= {"strategy": "ddp", "enable_checkpointing": True, "callbacks": [checkpoints]}
        resume = "last"
    else:
        arguments["strategy"] = lightning_async.AsyncAMSGradStrategy(summary=False, snapshot_every_s=job.save_s)
    data = TensorDataset(torch.zeros(1000, 8))
    pl.Trainer(**arguments).fit(Module(), DataLoader(data, batch_size=1, shuffle=True), ckpt_path=resume)


if __name__ == "__main__":
    main()
