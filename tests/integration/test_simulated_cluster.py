"""Training in a simulated cluster is what a loop over events written by hand does, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_async import SimulatedClusterStrategy
from lightning_async.exchange import auto
from lightning_async.policies import AgeDamping, Arrival, DelayAdaptiveStep, FromDDP, LookAhead, StalenessPolicy
from tests.simulated import BATCHES, MAKE, Module, batches, cluster, fit, make_module, resumed

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def by_hand(
    module: Module,
    steps: list[float],
    epochs: int = 2,
    push: float = 0.0,
    pull: float = 0.0,
    policy: StalenessPolicy | None = None,
) -> tuple[Tensor, float, Counter[int]]:
    """A cluster without a bound: each gradient is computed at an old copy of the parameters when it arrives."""
    policy = policy or StalenessPolicy()
    (optimizer,), (scheduler,) = module.configure_optimizers()
    now, version, numbers = 0.0, 0, itertools.count()
    staleness: Counter[int] = Counter()
    reader = copy.deepcopy(module)
    in_force = optimizer.param_groups[0]["lr"]
    under_way: list[Any] = []
    for _ in range(epochs):
        data = iter(batches())
        readers = list(range(len(steps)))
        while readers or under_way:
            for worker, batch in zip(readers, data, strict=False):
                at = now + pull + steps[worker] + push
                reader.load_state_dict(module.state_dict())
                with torch.no_grad(), lr_of(optimizer, in_force):
                    policy.look_ahead(list(reader.parameters()), optimizer)
                state = copy.deepcopy(reader.state_dict())
                lr = optimizer.param_groups[0]["lr"]
                heapq.heappush(under_way, (at, next(numbers), worker, batch, state, version, lr))
                scheduler["scheduler"].step()
            readers = []
            if not under_way:
                break
            now, _, worker, batch, state, version_read, lr = heapq.heappop(under_way)
            reader.load_state_dict(state)
            reader.zero_grad()
            reader.loss(batch).backward()
            for parameter, source in zip(module.parameters(), reader.parameters(), strict=True):
                parameter.grad = source.grad
            arrival = Arrival(worker, version - version_read, version, len(batch[0]))
            factor = policy.gradient_factor(arrival)
            for parameter in module.parameters() if factor != 1.0 else ():
                parameter.grad = parameter.grad * factor
            with lr_of(optimizer, lr * policy.step_factor([arrival])):
                optimizer.step()
            # The holder knows no newer one than that of its last gradient.
            in_force = lr
            staleness[version - version_read] += 1
            version += 1
            readers = [worker]
    return module.flat_parameters(), now, staleness


@contextlib.contextmanager
def lr_of(optimizer: torch.optim.Optimizer, lr: float) -> Iterator[None]:
    """The learning rate of another moment."""
    (group,) = optimizer.param_groups
    present, group["lr"] = group["lr"], lr
    yield
    group["lr"] = present


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name", MAKE)
def test_one_worker_is_plain_training_bit_for_bit(tmp_path: Path, name: str) -> None:
    plain, ours = (make_module(make=MAKE[name]) for _ in range(2))
    settings: dict[str, Any] = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 4}

    fit(tmp_path, plain, "auto", **settings)
    trainer = fit(tmp_path, ours, cluster([2.0]), **settings)

    assert torch.equal(ours.flat_parameters(), plain.flat_parameters())
    assert trainer.strategy.virtual_seconds == 2 * BATCHES * 2.0
    assert trainer.strategy.stats.staleness == {0: 16}
    assert trainer.strategy.stats.batches_by_rank == {0: 2 * BATCHES}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    ("steps", "push", "pull"), [([2.0, 3.1, 7.3], 0.0, 0.0), ([1.0, 1.25, 1.5, 6.0], 0.5, 0.0625)], ids=str
)
def test_a_cluster_is_the_loop_over_events_written_by_hand_bit_for_bit(
    tmp_path: Path, name: str, steps: list[float], push: float, pull: float
) -> None:
    alone, ours = (make_module(make=MAKE[name]) for _ in range(2))
    strategy = cluster(steps, max_staleness=None, push_seconds=push, pull_seconds=pull)

    fit(tmp_path, ours, strategy)

    parameters, seconds, staleness = by_hand(alone, steps, push=push, pull=pull)
    assert torch.equal(ours.flat_parameters(), parameters)
    assert strategy.virtual_seconds == pytest.approx(seconds)
    assert strategy.stats.staleness == staleness
    assert max(staleness) > len(steps) - 1


@pytest.mark.parametrize("make", [AgeDamping, LookAhead, FromDDP, DelayAdaptiveStep])
def test_a_cluster_follows_a_staleness_policy(tmp_path: Path, make: Callable[[], StalenessPolicy]) -> None:
    ours, alone, policy = make_module(), make_module(), make()
    policy.bind(3, 1)
    policy.check(alone.configure_optimizers()[0][0])
    expected, seconds, _ = by_hand(alone, [1.0, 1.5, 4.0], policy=policy)

    trainer = fit(tmp_path, ours, cluster([1.0, 1.5, 4.0], max_staleness=None, staleness_policy=make()))

    assert torch.equal(ours.flat_parameters(), expected)
    assert trainer.strategy.virtual_seconds == seconds


def test_what_a_look_ahead_moves_is_not_what_user_code_and_stops_see(tmp_path: Path) -> None:
    # It looks no further than nothing: a stop in the middle of an update, and one that is given up, change nothing.
    plain, ours = make_module(), make_module()
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    fit(tmp_path, plain, cluster([1.0, 3.0], staleness_policy="plain"), **settings)
    fit(tmp_path, ours, cluster([1.0, 3.0], staleness_policy=LookAhead(1e-30)), **settings)

    assert torch.equal(ours.flat_parameters(), plain.flat_parameters())


@pytest.mark.parametrize("policy", ["rescaled", "look_ahead", "ordered_momentum"])
def test_a_resumed_run_goes_on_with_its_policy(tmp_path: Path, policy: str) -> None:
    def make() -> SimulatedClusterStrategy:
        return cluster([1.0, 1.5, 4.0], gradients_per_update=2, staleness_policy=policy, momentum_correction="auto")

    save = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    whole = make_module(make=MAKE["AMSGrad"])
    fit(tmp_path, whole, make(), callbacks=[save], enable_checkpointing=True)

    again, _ = resumed(tmp_path, "epoch=0.ckpt", make)

    assert torch.equal(again.flat_parameters(), whole.flat_parameters())


@pytest.fixture
def measures_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "WARM_UP_STEPS", 4)
    monkeypatch.setattr(auto, "_UNSTEADY", 0)


def varying(slowest: float, **settings: Any) -> SimulatedClusterStrategy:
    return cluster([{"mean": mean, "spread": 0.1, "distribution": "normal"} for mean in (1, 1, slowest)], **settings)


def auto_cluster(slowest: float, **settings: Any) -> SimulatedClusterStrategy:
    return varying(slowest, gradients_per_update="auto", **settings)


@pytest.mark.usefixtures("measures_little")
def test_auto_is_ddp_until_it_has_measured_and_then_lets_unequal_workers_go(tmp_path: Path) -> None:
    strategy, ddp = auto_cluster(4.0), varying(4.0, gradients_per_update=3, max_staleness=0)
    modules = make_module(), make_module()

    fit(tmp_path, modules[0], ddp, max_epochs=1, limit_train_batches=12)
    fit(tmp_path, modules[1], strategy, max_epochs=1, limit_train_batches=12)

    # Four updates of three, as under DDP, and the choice.
    assert torch.equal(modules[1].flat_parameters(), modules[0].flat_parameters())
    assert (strategy.version, strategy.stats.staleness) == (4, {0: 12})
    assert strategy.configuration["gradients_per_update"] == 2
    assert strategy.configuration["staleness_policy"] == "from_ddp"
    assert strategy.configuration["max_staleness"] == 6
    assert strategy.configuration["auto"]["gain"] > 2
    strategy = auto_cluster(4.0)
    fit(tmp_path, make_module(), strategy, max_epochs=1)
    assert strategy.version == 4 + (BATCHES - 12) // 2
    assert max(strategy.stats.staleness) > 0


@pytest.mark.usefixtures("measures_little")
def test_auto_stays_with_ddp_where_workers_are_equal(tmp_path: Path) -> None:
    strategy, ddp = auto_cluster(1.0), varying(1.0, gradients_per_update=3, max_staleness=0)
    modules = make_module(), make_module()

    fit(tmp_path, modules[0], ddp)
    fit(tmp_path, modules[1], strategy)

    assert torch.equal(modules[1].flat_parameters(), modules[0].flat_parameters())
    assert strategy.configuration["gradients_per_update"] == 3
    assert strategy.configuration["max_staleness"] == 0


@pytest.mark.usefixtures("measures_little")
@pytest.mark.parametrize("measured", [4, 12], ids=["decided", "undecided"])
def test_a_resumed_run_goes_on_with_what_auto_has_measured_or_chosen(
    tmp_path: Path, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An epoch is ten steps of each worker: the second one of them begins without a choice, or with one.
    monkeypatch.setattr(auto, "WARM_UP_STEPS", measured)
    save = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    whole, first = make_module(make=MAKE["AMSGrad"]), auto_cluster(4.0, staleness_policy="damping")
    fit(tmp_path, whole, first, callbacks=[save], enable_checkpointing=True)

    again, strategy = resumed(tmp_path, "epoch=0.ckpt", lambda: auto_cluster(4.0, staleness_policy="damping"))

    assert torch.equal(again.flat_parameters(), whole.flat_parameters())
    assert strategy.version == first.version
    assert strategy.configuration["gradients_per_update"] == 2
    assert strategy.configuration["auto"]["gain"] == first.configuration["auto"]["gain"] > 2


def test_an_update_of_all_workers_is_ddp(tmp_path: Path) -> None:
    alone, ours = (make_module(make=lambda params: torch.optim.SGD(params, lr=0.1, fused=True)) for _ in range(2))
    spec = [1.0, 2.0, {"mean": 4.0, "spread": 0.1, "distribution": "uniform"}]
    strategy = cluster(spec, gradients_per_update=3, max_staleness=0, push_seconds=0.5, update_seconds=0.25)

    trainer = fit(tmp_path, ours, strategy, max_epochs=1)

    (optimizer,), (scheduler,) = alone.configure_optimizers()
    data = list(batches())
    for start in range(0, BATCHES, 3):
        optimizer.zero_grad()
        # Equal batches: the mean of their losses' gradients.
        (sum(alone.loss(batch) for batch in data[start : start + 3]) / 3).backward()
        for _ in range(3):
            lr = optimizer.param_groups[0]["lr"]
            scheduler["scheduler"].step()
        # The update is made with what the last worker had.
        with lr_of(optimizer, lr):
            optimizer.step()
    torch.testing.assert_close(ours.flat_parameters(), alone.flat_parameters(), rtol=1e-5, atol=1e-6)
    slowest = [strategy._steps.draw(2, number) for number in range(10)]
    assert strategy.virtual_seconds == pytest.approx(sum(slowest) + 10 * (0.5 + 0.25))
    assert (strategy.version, strategy.stats.staleness) == (10, {0: 30})
    assert trainer.global_step == 30


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    spec = {"mean": 1.0, "spread": 0.5, "distribution": "lognormal"}
    modules = [make_module() for _ in range(3)]

    for module, seed in zip(modules, (1, 1, 2), strict=True):
        fit(tmp_path, module, cluster(spec, workers=6, seed=seed))

    first, second, third = (module.flat_parameters() for module in modules)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("on_stale", ["wait", "drop"])
@pytest.mark.parametrize(("k", "bound"), [(1, 1), (2, 0), (3, 2)])
def test_no_gradient_is_staler_than_the_bound_and_each_batch_is_computed_once(
    tmp_path: Path, on_stale: Any, k: int, bound: int
) -> None:
    module, strategy = (
        make_module(),
        cluster([1, 1, 1, 4], max_staleness=bound, on_stale=on_stale, gradients_per_update=k),
    )
    seen: list[int] = []

    class Sees(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.extend(batch[2].tolist())

    fit(tmp_path, module, strategy, callbacks=[Sees()], max_epochs=1)

    stats = strategy.stats
    assert max(stats.staleness) <= bound
    assert seen == list(range(4 * BATCHES))
    assert stats.updates + stats.dropped == BATCHES == sum(stats.batches_by_rank.values())
    assert strategy.version == -(-stats.updates // k)
    assert (stats.dropped > 0) == (on_stale == "drop")


# ---------------------------------------------------------------------------------------------------------- its stops


def test_validation_finds_everything_arrived_and_costs_the_time_of_a_stop(tmp_path: Path) -> None:
    found: list[tuple[int, int]] = []

    class Looks(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                found.append((trainer.strategy.version, trainer.global_step))

    module, strategy = make_module(), cluster([1, 1, 1, 4], max_staleness=None)
    fit(tmp_path, module, strategy, callbacks=[Looks()], validation=batches(1), val_check_interval=10, max_epochs=1)

    assert found == [(10, 10), (20, 20), (30, 30)]
    assert torch.equal(module.validated_at[-1], module.flat_parameters())
    # Ten batches take the slow worker's 4 seconds each time; without stops 32 would take 10.
    assert strategy.virtual_seconds == 12.0
    assert strategy.stats.train_seconds == 12.0


def test_the_last_validation_of_an_epoch_sees_an_update_of_the_gradients_that_are_left(tmp_path: Path) -> None:
    module, strategy = make_module(), cluster([1, 1, 3], gradients_per_update=4)

    fit(tmp_path, module, strategy, validation=batches(1), max_epochs=1)

    assert strategy.version == 8
    assert torch.equal(module.validated_at[-1], module.flat_parameters())


def test_a_stop_between_the_batches_of_one_update_leaves_it_its_parameters(tmp_path: Path) -> None:
    module, strategy = make_module(), cluster([1, 1, 3], max_staleness=None)

    fit(
        tmp_path,
        module,
        strategy,
        validation=batches(1),
        val_check_interval=2,
        accumulate_grad_batches=3,
        max_epochs=1,
    )

    for first in range(0, BATCHES, 3):
        one, two, three = module.stepped_at[first : first + 3]
        assert torch.equal(one, two)
        assert torch.equal(two, three)
    assert strategy.stats.updates == 10
    assert torch.equal(module.validated_at[-1], module.flat_parameters())
    # After batch 3 the first worker's gradient has arrived, and the second one's is made of older parameters still.
    assert not torch.equal(module.validated_at[1], module.stepped_at[4])


def test_what_a_fit_has_found_outlives_it_and_the_next_fit_begins_anew(tmp_path: Path) -> None:
    module, strategy = make_module(), cluster([1, 1, 3])
    trainer = fit(tmp_path, module, strategy, max_epochs=1)
    callbacks, parameters = len(trainer.callbacks), module.flat_parameters()
    found = (strategy.version, strategy.virtual_seconds, strategy.stats.updates)

    trainer.validate(module, batches(1), verbose=False)

    assert found == (strategy.version, strategy.virtual_seconds, strategy.stats.updates) == (30, 15.0, 30)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches())
    assert (strategy.version, strategy.virtual_seconds) == (30, 15.0)
    assert len(trainer.callbacks) == callbacks
    assert "step" not in vars(trainer.optimizers[0])
    assert not torch.equal(module.flat_parameters(), parameters)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    spec = [1, {"mean": 1, "spread": 0.3, "distribution": "normal"}, {"mean": 5, "distribution": "exponential"}]
    save = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    whole = make_module(make=MAKE["AMSGrad"])
    make = lambda: cluster(spec, seed=3, update_seconds=0.1)  # noqa: E731
    full = fit(tmp_path, whole, make(), callbacks=[save], enable_checkpointing=True).strategy

    module, strategy = resumed(tmp_path, "epoch=0.ckpt", make)

    assert torch.equal(module.flat_parameters(), whole.flat_parameters())
    assert (strategy.version, strategy.progress) == (full.version, full.progress)
    assert strategy.virtual_seconds > 0.0


def test_gradients_that_wait_for_more_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "all", filename="{step}", save_top_k=-1, every_n_train_steps=10)
    make = lambda: cluster([1, 2], gradients_per_update=4)  # noqa: E731
    fit(tmp_path, make_module(make=MAKE["AMSGrad"]), make(), callbacks=[save], enable_checkpointing=True, max_epochs=1)
    saved = torch.load(tmp_path / "all" / "step=10.ckpt", weights_only=False)["simulated_cluster"]

    # Lightning takes the epoch's batches from the beginning, but counts the ten that were made.
    _, strategy = resumed(tmp_path, "step=10.ckpt", make, max_epochs=1)

    assert (saved["version"], saved["gathered"]["count"], sum(saved["progress"]["steps"])) == (2, 2, 10)
    assert strategy.version == 8
    assert strategy.stats.updates == BATCHES - 10


def test_a_checkpoint_is_that_of_plain_training(tmp_path: Path) -> None:
    for folder, strategy in (("plain", "auto"), ("ours", cluster([1.0]))):
        save = ModelCheckpoint(tmp_path / folder, filename="last")
        module = make_module(make=MAKE["AMSGrad"])
        fit(tmp_path, module, strategy, callbacks=[save], enable_checkpointing=True, max_epochs=1)

    plain, ours = (torch.load(tmp_path / folder / "last.ckpt", weights_only=False) for folder in ("plain", "ours"))

    assert ours.keys() - plain.keys() == {"simulated_cluster"}
    (before,), (after,) = plain["optimizer_states"], ours["optimizer_states"]
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    torch.testing.assert_close(ours["state_dict"], plain["state_dict"], rtol=0, atol=0)
