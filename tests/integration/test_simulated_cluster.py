"""Training in a simulated cluster is what a loop over events written by hand does, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, SimulatedClusterStrategy
from lightning_async.cli.app import AsyncCLI
from lightning_async.policies import AgeDamping, Arrival, DelayAdaptiveStep, FromDDP, LookAhead, StalenessPolicy
from lightning_async.strategies import one_device
from tests.models import TinyClassifier, fork_trainer, indexed_data

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

BATCHES = 30
TUNING = Path(__file__).parents[2] / "docs" / "tuning.md"
RECIPE = str(Path(__file__).parents[2] / "recipes" / "lenet5_digits.yaml")

Make = Callable[[Any], torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "AMSGrad": lambda params: AMSGrad(params, lr=1e-2, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


def batches(count: int = BATCHES) -> DataLoader[Any]:
    return DataLoader(indexed_data(count * 4), batch_size=4)


class Module(TinyClassifier):
    """Remembers the parameters that its hooks and steps see."""

    def __init__(self, make: Make = MAKE["SGD"]) -> None:
        super().__init__()
        self.make = make
        self.stepped_at: list[Tensor] = []
        self.validated_at: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.stepped_at.append(self.flat_parameters())
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated_at.append(self.flat_parameters())

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5), "interval": "step"}]


def make_module(kind: type[Module] = Module, **arguments: Any) -> Module:
    seed_everything(5, verbose=False)
    return kind(**arguments)


def cluster(step_seconds: Any, **arguments: Any) -> SimulatedClusterStrategy:
    return SimulatedClusterStrategy(step_seconds, **({"summary": False} | arguments))


def fit(folder: Path, module: LightningModule, strategy: Any, **arguments: Any) -> Trainer:
    ckpt_path = arguments.pop("ckpt_path", None)
    validation = arguments.pop("validation", None)
    trainer = fork_trainer(folder, 1, strategy, **({"max_epochs": 2} | arguments))
    trainer.fit(module, batches(), validation, ckpt_path=ckpt_path)
    return trainer


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


def test_auto_is_half_of_the_workers(tmp_path: Path) -> None:
    strategy = cluster([1.0, 1.0, 1.0, 4.0], gradients_per_update="auto")

    assert strategy.configuration["gradients_per_update"] == 2
    assert strategy.configuration["staleness_policy"] == "from_ddp"


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


def resumed(tmp_path: Path, checkpoint: str, make: Callable[[], Any], **arguments: Any) -> tuple[Module, Any]:
    warnings.filterwarnings("ignore", ".*The dirpath has changed")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    module = make_module(make=MAKE["AMSGrad"])
    trainer = fit(tmp_path, module, make(), ckpt_path=tmp_path / "all" / checkpoint, **arguments)
    return module, trainer.strategy


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


# ----------------------------------------------------------------------------------------------------- what users do


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_loss_makes_no_update_and_takes_its_time(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 1 else loss

    strategy = cluster([1, 1])
    fit(tmp_path, make_module(Skips), strategy, max_epochs=1)

    assert strategy.stats.updates == 20
    assert strategy.virtual_seconds == 15.0


def test_what_a_hook_does_to_the_parameters_is_done_to_the_holders(tmp_path: Path) -> None:
    class Clamps(Module):
        def on_train_batch_end(self, *arguments: Any) -> None:
            for parameter in self.parameters():
                parameter.data.clamp_(-0.125, 0.125)

    module = make_module(Clamps)
    fit(tmp_path, module, cluster([1, 1, 3]))

    assert all(float(stepped.abs().max()) <= 0.125 for stepped in module.stepped_at[1:BATCHES])


def test_param_groups_added_at_a_stop_are_trained(tmp_path: Path) -> None:
    class Thaws(Module):
        def configure_optimizers(self) -> Any:
            return AMSGrad(self.net[2].parameters(), lr=1e-2)

        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            if self.current_epoch == 1:
                optimizer = self.optimizers()
                optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 1e-3})

    module = make_module(Thaws)
    first = module.net[0].weight.detach().clone()
    strategy = cluster([1, 1, 3], gradients_per_update=4)
    trainer = fit(tmp_path, module, strategy)

    assert not torch.equal(module.net[0].weight, first)
    assert strategy.version == 16
    state = trainer.optimizers[0].state
    steps = [float(state[parameter]["step"]) for parameter in (module.net[2].weight, module.net[0].weight)]
    assert steps == [16.0, 8.0]


def test_gradients_that_wait_for_more_are_not_lost_with_the_optimizer_that_is_replaced(tmp_path: Path) -> None:
    class Replaces(Module):
        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking and self.trainer.global_step == 10:
                self.trainer.optimizers = [AMSGrad(self.parameters(), lr=1e-3)]

    strategy = cluster([1, 1], gradients_per_update=4)
    trainer = fit(tmp_path, make_module(Replaces), strategy, validation=batches(1), val_check_interval=10, max_epochs=1)

    # Three updates of 4, 4 and 2 gradients, and five of the new optimizer.
    assert strategy.version == 8
    state = trainer.optimizers[0].state
    assert {float(own["step"]) for own in state.values()} == {5.0}


def test_an_optimizer_replaced_between_two_batches_is_refused(tmp_path: Path) -> None:
    class Replaces(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]

    with pytest.raises(MisconfigurationException, match=r"SGD was replaced.* Do it at a stop"):
        fit(tmp_path, make_module(Replaces), cluster([1, 1]))


def test_batches_of_half_precision_train(tmp_path: Path) -> None:
    module, strategy = make_module(), cluster([1, 1, 3])

    fit(tmp_path, module, strategy, precision="bf16-mixed", gradient_clip_val=0.5)

    assert strategy.stats.updates == 2 * BATCHES
    assert module.net[0].weight.dtype is torch.float32


def test_a_skipped_rest_of_an_epoch_leaves_nothing_under_way(tmp_path: Path) -> None:
    class Stops(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 7 else None

    strategy = cluster([1, 2], gradients_per_update=2)
    fit(tmp_path, make_module(Stops), strategy)

    assert strategy.stats.updates == 14
    # The last gradient of each epoch makes a version by itself.
    assert strategy.version == 8


# ------------------------------------------------------------------------------------------------------ what is shown


def test_the_metrics_are_logged_over_virtual_time(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)

    fit(tmp_path, make_module(), cluster([1, 1, 2], workers=12), logger=logger, log_every_n_steps=20)

    logged = [row for row in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines() if row.strip(",")]
    names = logged[0].split(",")
    rows = [
        row for row in (dict(zip(names, row.split(","), strict=True)) for row in logged[1:]) if row["async/version"]
    ]
    seconds = [float(row["async/virtual_seconds"]) for row in rows]
    # The last updates come when nothing is computed any more.
    assert [row["async/version"] for row in rows] == ["9.0", "30.0", "49.0", "60.0"]
    assert sorted(seconds) == seconds
    assert seconds[-1] > 0.0
    # Nine gradients arrive in two seconds: the first 12 reads are at 0, and the slow workers' take 2.
    assert float(rows[0]["async/updates_per_second"]) == 9 / 2
    assert [name for name in names if "share_rank" in name] == [f"async/share_rank_{rank}" for rank in range(8)]


def test_a_table_at_the_end_says_what_the_cluster_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, make_module(), cluster([1, 1, 1, 4], workers=40, update_seconds=0.01, summary=True))

    said = capsys.readouterr().out
    assert "60 gradients and 60 updates in" in said
    assert "virtual seconds" in said
    assert "32 others" in said
    assert "staleness" in said


def test_the_script_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    section = TUNING.read_text().partition("## Try it without a cluster")[2]
    script = section.partition("```python\n")[2].partition("```")[0]

    # With less data.
    exec(compile(script.replace("2048", "128").replace("3072", "192"), str(TUNING), "exec"), {"__name__": "__main__"})

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    ddp, asynchronous = (float(line.partition("after")[2].split()[0]) for line in (lines[0], lines[-1]))
    assert ddp > 1.5 * asynchronous


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_seconds": []}, "step_seconds is empty"),
        ({"step_seconds": 1.0}, "Say how many with workers=N"),
        ({"step_seconds": [1], "push_seconds": -1.0}, "push_seconds takes a number of seconds of at least 0, not -1"),
        ({"step_seconds": [1], "update_seconds": True}, "update_seconds takes a number of seconds"),
        ({"step_seconds": [1], "max_staleness": -1}, "max_staleness must be an int of at least 0"),
        ({"step_seconds": [1], "on_stale": "drip"}, "on_stale must be one of 'wait', 'drop', not 'drip'"),
        ({"step_seconds": [1], "gradients_per_update": 0}, "gradients_per_update must be an int of at least 1"),
        ({"step_seconds": [1], "seed": 0.5}, "seed must be an int"),
        ({"step_seconds": "/nowhere"}, "/nowhere does not exist"),
    ],
    ids=str,
)
def test_an_argument_without_a_meaning_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        SimulatedClusterStrategy(**arguments)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Embeds(Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 3, sparse=True)


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Manual, "cannot train Manual, which steps its optimizers by hand"),
        (Embeds, "table has sparse gradients"),
        (lambda: Module(lambda params: torch.optim.LBFGS(params)), "LBFGS, which re-evaluates its closure"),
        (lambda: Module(lambda params: Twice(params, lr=0.1)), "Twice, which failed when a copy of it made a step"),
    ],
    ids=["by hand", "sparse", "LBFGS", "twice"],
)
def test_a_module_that_cannot_be_trained_so_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, make(), cluster([1, 1]))


def test_more_than_one_device_and_finders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"one device, and the Trainer has 2. Take devices=1"):
        fork_trainer(tmp_path, 2, cluster([1, 1]))
    with pytest.raises(MisconfigurationException, match="cannot run the learning-rate finder"):
        fit(tmp_path, make_module(), cluster([1, 1]), callbacks=[LearningRateFinder()])


def test_gradients_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_device, "memory_bytes", lambda device: 10 * 74 * 4)

    with pytest.raises(MisconfigurationException, match=r"keeps 11 gradients of 0\.000296 MB = "):
        fit(tmp_path, make_module(), cluster(1.0, workers=11))
    # A bound lets fewer of them be under way.
    fit(tmp_path, make_module(), cluster(1.0, workers=11, max_staleness=4, gradients_per_update=2), max_steps=1)


def test_a_checkpoint_of_another_cluster_is_refused(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "all", filename="last")
    module = make_module(make=MAKE["AMSGrad"])
    fit(tmp_path, module, cluster([1, 1]), callbacks=[save], enable_checkpointing=True, max_epochs=1)

    with pytest.raises(MisconfigurationException, match=r"cluster of 2 workers, and this one has 3. Take as many"):
        resumed(tmp_path, "last.ckpt", lambda: cluster([1, 1, 1]))


def test_it_is_configured_from_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n"
        "  accelerator: cpu\n"
        "  devices: 1\n"
        "  strategy:\n"
        "    class_path: lightning_async.SimulatedClusterStrategy\n"
        "    init_args:\n"
        "      step_seconds: [1, 1.5, {mean: 4, spread: 0.1, distribution: lognormal}, [1.0, 2.0]]\n"
        "      workers: 8\n"
        "      max_staleness: 6\n"
    )

    strategy = AsyncCLI(["--config", RECIPE, "--config", str(config)], run=False).trainer.strategy

    assert isinstance(strategy, SimulatedClusterStrategy)
    assert [strategy._steps.mean(worker) for worker in range(8)] == [1.0, 1.5, 4.0, 1.5] * 2
    assert strategy.configuration["max_staleness"] == 6
