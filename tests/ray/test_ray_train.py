"""Training in real Ray: a cluster of two nodes on this host, and a training function as a user writes it.

Opt-in (``make test-ray``): Ray is large. What it warns of is its own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.training import EPOCHS, SAMPLES, Plan, attempts, counts, train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

ONCE_AN_EPOCH = [float(EPOCHS)] * SAMPLES
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without work, and two nodes: for two ranks and for one."""
    import ray
    from ray.cluster_utils import Cluster

    # Ray gives its workers a lower priority by default, and the machine may be busy with other things.
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(settings)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.node_of_one = cluster.add_node(num_cpus=1)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ray.init(address=cluster.address, runtime_env={"env_vars": variables}, logging_level="WARNING")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name in settings:
            del os.environ[name]


def fit(plan: Plan, workers: Any = 3, failures: int = 0, function: Callable[..., Any] = train, **config: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        function,
        train_loop_config=plan.as_config() | config,
        scaling_config=ScalingConfig(num_workers=workers, elastic_resize_monitor_interval_s=3.0),
        run_config=RunConfig(
            name="run",
            storage_path=str(Path(plan.folder) / "storage"),
            failure_config=FailureConfig(max_failures=failures),
        ),
    )
    return trainer.fit()


def ranks_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*"))]


@pytest.mark.parametrize(("prepared", "holder"), [(True, "thread"), (False, "process")])
def test_a_slow_rank_computes_less_and_every_sample_counts_once(
    cluster: Any, tmp_path: Path, prepared: bool, holder: str
) -> None:
    step_s, strategy = (0.02, 0.2, 0.02), (("holder", holder),)
    plan = Plan(str(tmp_path), step_s=step_s, strategy=strategy, prepared=prepared, val_check_interval=1.0)

    result = fit(plan)

    ranks = ranks_of(tmp_path)
    assert counts(tmp_path) == ONCE_AN_EPOCH
    assert sum(rank["batches"] for rank in ranks) == SAMPLES // 4 * EPOCHS
    assert ranks[1]["batches"] < min(ranks[0]["batches"], ranks[2]["batches"])
    # All are on this host, on two of Ray's nodes.
    assert all(rank["group_is_rays"] for rank in ranks)
    assert result.metrics["epoch"] == EPOCHS - 1
    assert result.checkpoint is not None


def test_the_recipe_trains_and_reports_an_accuracy(cluster: Any, tmp_path: Path) -> None:
    from recipes.ray_train import train as recipe

    result = fit(Plan(str(tmp_path)), function=recipe, epochs=1, seconds_by_rank=[0.0, 0.02])

    assert result.checkpoint is not None
    assert result.metrics["val/acc"] > 0.2


def with_the_plain_strategy(config: dict[str, Any]) -> None:
    from lightning.pytorch import Trainer

    from lightning_async import AsyncAMSGradStrategy

    Trainer(strategy=AsyncAMSGradStrategy(), devices="auto", logger=False, enable_checkpointing=False)


def test_the_plain_strategy_is_refused_and_the_one_for_ray_named(cluster: Any, tmp_path: Path) -> None:
    import ray.train

    with pytest.raises(ray.train.TrainingFailedError) as raised:
        fit(Plan(str(tmp_path)), workers=2, function=with_the_plain_strategy)

    assert all("lightning_async.ray.RayAsyncAMSGradStrategy" in str(e) for e in raised.value.worker_failures.values())


def test_a_mistake_of_the_users_reaches_ray_as_that_mistake(cluster: Any, tmp_path: Path) -> None:
    import ray.train

    from lightning_async import WorkerFailedError

    with pytest.raises(ray.train.TrainingFailedError, match="a mistake of the user's") as raised:
        fit(Plan(str(tmp_path), step_s=(0.02,), fault="raise"))

    failures = raised.value.worker_failures
    assert isinstance(failures.pop(1), ValueError)
    assert all(isinstance(error, WorkerFailedError) for error in failures.values())


def test_after_a_worker_was_killed_the_run_goes_on_from_the_middle_of_an_epoch(cluster: Any, tmp_path: Path) -> None:
    fit(Plan(str(tmp_path), step_s=(0.05,), fault="kill", fault_batch=14), failures=1)

    first, second = attempts(tmp_path)
    assert first == {"ranks": 3, "version": 0, "epoch": 0}
    assert second["ranks"] == 3
    assert 0 < second["version"] < SAMPLES // 4
    assert counts(tmp_path) == ONCE_AN_EPOCH


def test_a_killed_worker_fails_the_others_with_its_name(cluster: Any, tmp_path: Path) -> None:
    import ray.train

    from lightning_async import WorkerFailedError

    with pytest.raises(ray.train.TrainingFailedError) as raised:
        fit(Plan(str(tmp_path), step_s=(0.05,), fault="kill"))

    failures = raised.value.worker_failures
    assert 1 in failures
    assert not any(isinstance(error, SystemExit) for error in failures.values())
    others = [error for error in failures.values() if isinstance(error, WorkerFailedError)]
    assert all(str(error).startswith("rank 1 failed: its process is gone") for error in others)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_stopped_worker_ends_the_run_after_worker_timeout(cluster: Any, tmp_path: Path, stuck: bool) -> None:
    """Also where no other rank's thread comes back to say so: Ray itself would wait for ten minutes."""
    import ray.train

    plan = Plan(str(tmp_path), step_s=(0.05,), strategy=(("worker_timeout", 5.0),), fault="stop", stuck=stuck)

    with pytest.raises(ray.train.TrainingFailedError, match="rank 1 failed: gave no sign of life for 5 s"):
        fit(plan)


def until(is_so: Callable[[], bool], what: str, timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def test_ranks_that_go_and_come_leave_every_sample_counted_once(cluster: Any, tmp_path: Path) -> None:
    from ray.train import Checkpoint

    plan = Plan(str(tmp_path), val_check_interval=0.05, goes_on="go_on")
    reported = lambda: len(list((tmp_path / "storage/run").glob("checkpoint_*")))  # noqa: E731
    ended: list[object] = []
    run = threading.Thread(target=lambda: ended.append(fit(plan, workers=(1, 3), failures=5)), daemon=True)
    run.start()

    until(lambda: reported() >= 2, "a checkpoint of three ranks")
    cluster.remove_node(cluster.node_of_one, allow_graceful=False)
    until(lambda: len(attempts(tmp_path)) >= 2, "a start with fewer ranks")
    before = reported()
    until(lambda: reported() > before, "a checkpoint of fewer ranks")
    cluster.node_of_one = cluster.add_node(num_cpus=1)
    until(lambda: attempts(tmp_path)[-1]["ranks"] == 3 and len(attempts(tmp_path)) >= 3, "a start with three ranks")
    (tmp_path / "go_on").touch()
    run.join(200.0)

    assert len(ended) == 1
    assert isinstance(ended[0].checkpoint, Checkpoint)
    begun = attempts(tmp_path)
    assert [attempt["ranks"] for attempt in begun] == [3, 2, 3]
    assert [attempt["version"] for attempt in begun] == sorted(attempt["version"] for attempt in begun)
    assert begun[-1]["version"] > 0
    assert counts(tmp_path) == ONCE_AN_EPOCH
