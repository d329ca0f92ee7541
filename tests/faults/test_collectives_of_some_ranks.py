"""A collective that only some ranks call ends the run with an error that names it, and is answered by no other one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_async import AsyncAMSGradStrategy
from lightning_async.runtime.collective_watch import CollectiveWatch, Waiting, judge
from tests.launch import launch
from tests.models import TinyClassifier, fork_trainer, loader

WORKER_TIMEOUT_S = 4.0


class OnRankZeroOnly(TinyClassifier):
    def __init__(self, hook: str, call: str) -> None:
        super().__init__()
        self.hook, self.call = hook, call

    def call_in(self, hook: str) -> None:
        if hook != self.hook or not self.trainer.is_global_zero:
            return
        if self.call == "torch":
            dist.barrier()
        else:
            self.trainer.strategy.barrier()

    def on_train_start(self) -> None:
        self.call_in("on_train_start")

    def on_validation_epoch_end(self) -> None:
        self.call_in("on_validation_epoch_end")

    def on_train_epoch_end(self) -> None:
        self.call_in("on_train_epoch_end")


@pytest.mark.compatibility(
    "Loop",
    "a collective in a hook that only rank 0 runs",
    "refused",
    "Once all ranks have waited for `worker_timeout`, in calls that do not belong together, the run ends with an error "
    "that names the calls; DDP waits for the process group's time-out.",
)
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_train_start", "torch"),
        pytest.param("on_validation_epoch_end", "strategy", marks=pytest.mark.soak),
        pytest.param("on_train_epoch_end", "torch", marks=pytest.mark.soak),
    ],
)
def test_a_collective_that_only_rank_0_calls_ends_the_run_by_its_name(tmp_path: Path, hook: str, call: str) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(start_method="fork", worker_timeout=WORKER_TIMEOUT_S)
        fork_trainer(folder, 2, strategy).fit(OnRankZeroOnly(hook, call), loader(), loader(8))

    run = launch(script, tmp_path, timeout_s=100.0)

    assert run.returncode != 0
    assert f"rank 0 failed: it waits in torch.distributed.barrier ({__file__}:" in run.output
    assert "which not all ranks call: rank 1 waits in the strategy's own exchange (" in run.output


OWN = Waiting("torch.distributed.all_gather_object", False, "segments.py:100")
USERS = Waiting("torch.distributed.barrier", True, "train.py:7")


def test_ranks_in_the_same_collective_may_be_slow() -> None:
    assert judge({0: USERS, 1: USERS._replace(place="train.py:9"), 2: USERS}) is None


def test_the_rank_in_user_codes_call_is_named_whatever_the_majority_does() -> None:
    failure = judge({0: OWN, 1: OWN, 2: USERS})

    assert failure is not None
    assert failure.rank == 2


def test_nothing_is_said_before_all_ranks_wait() -> None:
    watch = CollectiveWatch(rank=0, ranks=lambda: range(3), patience_s=0.0)
    watch.hear(0, OWN.encode())
    watch.hear(1, USERS.encode())
    assert watch.failure() is None

    watch.hear(2, OWN.encode())
    assert watch.failure() is not None

    watch.hear(1, "")
    assert watch.failure() is None


def test_a_thread_in_a_collective_is_seen_once_its_patience_is_over() -> None:
    lock = threading.Lock()
    # Stands for torch's function: what a thread is in is told by the module of its frames.
    torchs: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d", "lock": lock}
    exec("def barrier():\n    lock.acquire()", torchs)
    watches: list[CollectiveWatch] = []

    def train() -> None:
        watches.append(CollectiveWatch(rank=0, ranks=lambda: range(2), patience_s=0.0))
        torchs["barrier"]()

    with lock:
        thread = threading.Thread(target=train)
        thread.start()
        while not watches or not (seen := watches[0].look()):
            time.sleep(0.01)
    thread.join()

    waiting = Waiting.decode(seen)
    assert waiting is not None
    assert (waiting.call, waiting.by_user) == ("torch.distributed.barrier", True)
    assert waiting.place.startswith(f"{__file__}:")
    assert watches[0].look() == ""
