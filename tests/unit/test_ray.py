"""The strategies for Ray Train beside what stands for Ray; tests/ray has the real one."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_async
from lightning_async import AsyncAMSGradStrategy, AsyncStrategy
from lightning_async.strategies.owned_launcher import OwnedLauncher

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": "auto"}


class Context:
    """Of rank 3 of 4, the second of its node."""

    def get_world_size(self) -> int:
        return 4

    def get_local_world_size(self) -> int:
        return 2


class Ray:
    """What stands for Ray: whether this process is a worker, and the classes that lightning_async.ray takes."""

    def __init__(self) -> None:
        self.is_worker = True
        self.outside: Exception = RuntimeError("cannot be used outside of a Ray Train training function")

        class RayDDPStrategy(DDPStrategy):
            @property
            def root_device(self) -> torch.device:
                return torch.device("cpu")

        class RayLightningEnvironment(LightningEnvironment):
            def world_size(self) -> int:
                return 4

            def global_rank(self) -> int:
                return 3

            def local_rank(self) -> int:
                return 1

        RayLightningEnvironment.__module__ = "ray.train.lightning"
        self.strategy, self.environment = RayDDPStrategy, RayLightningEnvironment

    def get_context(self) -> Context:
        if not self.is_worker:
            # Not itself, which pytest keeps: its traceback would keep this.
            raise type(self.outside)(*self.outside.args)
        return Context()

    def modules(self) -> dict[str, Any]:
        names = ("ray", "ray.train", "ray.train.torch", "ray.train.lightning", "ray.util")
        ray, train, torch_, lightning, util = map(ModuleType, names)
        vars(ray)["util"], vars(util)["get_node_ip_address"] = util, lambda: "10.0.0.7"
        vars(ray)["train"], vars(train)["torch"], vars(train)["get_context"] = train, torch_, self.get_context
        vars(lightning).update(
            RayDDPStrategy=self.strategy,
            RayLightningEnvironment=self.environment,
            RayTrainReportCallback=ReportCallback,
        )
        return {module.__name__: module for module in (ray, train, torch_, lightning, util)}


class ReportCallback:
    def __init__(self) -> None:
        self.reports = 0

    def on_train_epoch_end(self, trainer: object, pl_module: object) -> None:
        self.reports += 1


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_class_behind() -> Iterator[None]:
    """The command line offers every class of strategy that there is; the tests of other files look at it."""
    yield
    gc.collect()
    assert not [kind for kind in AsyncStrategy.__subclasses__() if kind.__module__ == "lightning_async.ray"]
    assert not [kind for kind in LightningEnvironment.__subclasses__() if kind.__module__ == "ray.train.lightning"]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    for name, module in ray.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    # pytest keeps what a fixture gives for longer than the test.
    proxy: Ray = weakref.proxy(ray)
    return proxy


@pytest.fixture
def for_ray(ray: Ray) -> Iterator[Any]:
    sys.modules.pop("lightning_async.ray", None)
    module = importlib.import_module("lightning_async.ray")
    yield weakref.proxy(module)
    del sys.modules["lightning_async.ray"], vars(lightning_async)["ray"]


@pytest.mark.parametrize("name", ["RayAsyncStrategy", "RayAsyncAMSGradStrategy"])
def test_a_strategy_for_ray_is_one_of_ours_and_one_of_rays(ray: Ray, for_ray: Any, name: str) -> None:
    strategy = getattr(for_ray, name)(max_staleness=7)

    Trainer(strategy=strategy, plugins=[ray.environment()], **QUIET)

    # As prepare_trainer wants it.
    assert isinstance(strategy, ray.strategy)
    assert isinstance(strategy.cluster_environment, ray.environment)
    assert isinstance(strategy, AsyncStrategy)
    assert isinstance(strategy, AsyncAMSGradStrategy) == (name == "RayAsyncAMSGradStrategy")
    assert strategy.strategy_name == ("async_amsgrad" if name == "RayAsyncAMSGradStrategy" else "async")
    assert strategy.options.max_staleness == 7
    assert isinstance(strategy.launcher, OwnedLauncher)


def test_the_ranks_are_where_ray_says_whatever_devices_the_trainer_has(ray: Ray, for_ray: Any) -> None:
    strategy = for_ray.RayAsyncStrategy()
    trainer = Trainer(strategy=strategy, **QUIET)

    assert (trainer.world_size, trainer.global_rank, trainer.local_rank) == (4, 3, 1)
    assert strategy.num_processes == 2
    assert strategy.root_device == torch.device("cpu")


def test_an_environment_that_lightning_has_found_gives_way_to_rays(
    ray: Ray, for_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A Ray cluster within a job of SLURM.
    variables = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "ray", "PROCID": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    strategy = for_ray.RayAsyncStrategy()

    Trainer(strategy=strategy, **QUIET)

    assert isinstance(strategy.cluster_environment, ray.environment)


@pytest.mark.parametrize(("variable", "address"), [("10.0.0.1", "10.0.0.1"), (None, "10.0.0.7")])
def test_ranks_on_other_nodes_reach_rank_0_at_its_node(
    for_ray: Any, variable: str | None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TorchConfig(init_method="tcp") leaves no variable.
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if variable is not None:
        monkeypatch.setenv("MASTER_ADDR", variable)
    strategy = for_ray.RayAsyncStrategy()

    Trainer(strategy=strategy, **QUIET)

    assert strategy.cluster_environment.main_address == address


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        ({"on_worker_failure": "continue"}, "FailureConfig"),
        ({"start_method": "spawn"}, "Ray starts the ranks"),
        ({"process_group_backend": "gloo"}, "TorchConfig"),
    ],
)
def test_what_ray_decides_is_no_argument(for_ray: Any, arguments: dict[str, Any], instead: str) -> None:
    with pytest.raises(MisconfigurationException, match=instead):
        for_ray.RayAsyncStrategy(**arguments)


def test_outside_of_a_training_function_the_plain_strategy_is_named(ray: Ray, for_ray: Any) -> None:
    ray.is_worker = False

    with pytest.raises(MisconfigurationException, match=r"TorchTrainer.*lightning_async\.AsyncAMSGradStrategy"):
        Trainer(strategy=for_ray.RayAsyncAMSGradStrategy(), **QUIET)


@pytest.mark.parametrize("with_environment", [True, False])
def test_in_a_training_function_the_strategy_for_ray_is_named(ray: Ray, with_environment: bool) -> None:
    # prepare_trainer would name strategies of Ray's only, and devices="auto" fail with an IndexError.
    plugins: Any = [ray.environment()] if with_environment else None

    with pytest.raises(MisconfigurationException, match=r"lightning_async\.ray\.RayAsyncAMSGradStrategy"):
        Trainer(strategy=AsyncAMSGradStrategy(), plugins=plugins, **QUIET)


@pytest.mark.parametrize("outside", [RuntimeError("no training function"), DeprecationWarning("one of Ray Tune's")])
def test_beside_ray_the_plain_strategy_trains_where_ray_has_started_nothing(ray: Ray, outside: Exception) -> None:
    ray.is_worker, ray.outside = False, outside

    assert Trainer(strategy=AsyncAMSGradStrategy(), **QUIET | {"devices": 2}).world_size == 2


@pytest.mark.parametrize(
    ("fn", "sanity", "is_last", "reports"),
    [("fit", False, False, 1), ("fit", False, True, 0), ("fit", True, False, 0), ("validate", False, False, 0)],
)
def test_a_report_is_made_after_each_validation_within_an_epoch(
    for_ray: Any, fn: str, sanity: bool, is_last: bool, reports: int
) -> None:
    report = for_ray.MidEpochReportCallback()
    trainer = SimpleNamespace(state=SimpleNamespace(fn=fn), sanity_checking=sanity, is_last_batch=is_last)

    report.on_validation_end(trainer, None)

    assert report.reports == reports


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lightning_async.ray", raising=False)

    with pytest.raises(ImportError, match=r"^lightning_async\.ray needs Ray Train: pip install \"ray\[train\]\""):
        importlib.import_module("lightning_async.ray")
