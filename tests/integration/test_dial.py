"""``gradients_per_update``: from the paper's method to DDP, with one clock, and nothing lost on the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_async import AMSGrad, AsyncAMSGradStrategy, AsyncStrategy
from lightning_async.exchange import auto
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, indexed_data, loader

RANKS, SAMPLES, BATCH, EPOCHS = 3, 132, 4, 2  # 33 batches: 11 of each rank


class Module(TinyClassifier):
    """Has a schedule by steps, and reports how its fit has ended."""

    def __init__(self, make_optimizer: Any = AMSGrad, sleep_s: tuple[float, ...] = ()) -> None:
        super().__init__(sleep_s)
        self.make_optimizer = make_optimizer
        self.steps: list[int] = []
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # An epoch that is resumed in its middle does not begin.
        self.seen = self.seen or [[]]
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(self.trainer.global_step)

    def on_train_end(self) -> None:
        (group,) = self.trainer.optimizers[0].param_groups
        report(
            Path.cwd(),
            self.global_rank,
            parameters=self.flat_parameters(),
            step=self.trainer.global_step,
            planned=self.trainer.estimated_stepping_batches,
            steps=self.steps,
            lr=group["lr"],
            version=getattr(self.trainer.strategy, "version", None),
            seen=self.seen,
        )


def fit(folder: Path, strategy: Any, make_optimizer: Any = AMSGrad, samples: int = SAMPLES, **arguments: Any) -> None:
    seed_everything(3, verbose=False)
    trainer = fork_trainer(folder, RANKS, strategy, **({"max_epochs": EPOCHS} | arguments))
    trainer.fit(Module(make_optimizer), loader(samples, BATCH, shuffle=True))


def finished(run: Launched) -> list[dict[str, Any]]:
    assert run.returncode == 0, run.output
    return run.reports()


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, amsgrad=True)


@pytest.mark.parametrize(("kind", "holder"), [(momentum, "thread"), (adam, "process")], ids=["sgd", "amsgrad-process"])
def test_a_gradient_of_each_rank_and_a_bound_of_zero_is_ddp(tmp_path: Path, kind: Any, holder: Any) -> None:
    strategy = AsyncStrategy(0, gradients_per_update=RANKS, holder=holder, start_method="fork")
    (tmp_path / "ddp").mkdir()
    ddp = finished(launch(lambda folder: fit(folder, "ddp_fork", kind), tmp_path / "ddp"))
    ours = finished(launch(lambda folder: fit(folder, strategy, kind), tmp_path))

    for mine, theirs in zip(ours, ddp, strict=True):
        # The mean of three is added up in another order.
        assert torch.allclose(mine["parameters"], theirs["parameters"], rtol=1e-5, atol=1e-6)
        assert [mine[name] for name in ("step", "planned", "lr")] == [
            theirs[name] for name in ("step", "planned", "lr")
        ]
        # At a segment's last batch a rank goes on before it has heard of the others'.
        ahead = [own - other for own, other in zip(mine["steps"], theirs["steps"], strict=True)]
        assert [late for at, late in enumerate(ahead, 1) if late] in ([], [-1], [-1, -1])
        assert all(not late for at, late in enumerate(ahead, 1) if at % 11)
        assert mine["version"] == theirs["step"]
    for epoch in range(EPOCHS):
        # Each step is made of the same samples; which rank computes which of them differs.
        for step in range(0, SAMPLES // RANKS, BATCH):
            mine_then, theirs_then = (
                sorted(sample for rank in ranks for sample in rank["seen"][epoch][step : step + BATCH])
                for ranks in (ours, ddp)
            )
            assert mine_then == theirs_then


@pytest.mark.parametrize("gradients_per_update", [1, pytest.param(2, marks=pytest.mark.soak), RANKS])
@pytest.mark.parametrize("arguments", [{}, {"max_steps": 12, "max_epochs": -1}], ids=["epochs", "steps"])
def test_the_clock_counts_gradients_whatever_a_version_is_made_of(
    tmp_path: Path, gradients_per_update: int, arguments: dict[str, Any]
) -> None:
    strategy = AsyncStrategy(gradients_per_update=gradients_per_update, start_method="fork")
    ranks = finished(launch(lambda folder: fit(folder, strategy, **arguments), tmp_path))

    steps = arguments.get("max_steps", 22)
    for rank in ranks:
        assert (rank["step"], rank["planned"]) == (steps, steps)
        assert rank["lr"] == 1e-2 * 0.5 ** (steps // 4)
        assert rank["steps"] == sorted(rank["steps"])
    gradients = [33, 33] if steps == 22 else [33, 3]
    # An epoch's last version is made of what there is.
    assert ranks[0]["version"] == sum(-(-count // gradients_per_update) for count in gradients)
    seen = sorted(sample for rank in ranks for sample in rank["seen"][0])
    assert seen == list(range(SAMPLES))


class SavesHalfway(Module):
    """One rank saves in the middle of an epoch, where one gradient waits for another."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.batches == 5 and self.global_rank == 0:
            self.trainer.save_checkpoint("middle.ckpt")


@pytest.mark.parametrize(
    ("holder", "resumed_with"),
    [pytest.param("process", 4, marks=pytest.mark.soak), ("thread", 1), ("thread", 3)],
    ids=["same-process", "one", "fewer"],
)
def test_gradients_that_wait_for_more_are_part_of_a_checkpoint(tmp_path: Path, holder: Any, resumed_with: int) -> None:
    def go_on(folder: Path, module: Module, per_update: int, path: str | None) -> None:
        seed_everything(3, verbose=False)
        strategy = AsyncStrategy(
            0, batches="sharded", gradients_per_update=per_update, holder=holder, start_method="fork"
        )
        # In equal shares, so that rank 0, which writes, comes so far.
        trainer = fork_trainer(folder, 2, strategy, max_epochs=1, limit_train_batches=8)
        trainer.fit(module, loader(64, BATCH), ckpt_path=path)

    whole = launch(lambda folder: go_on(folder, SavesHalfway(), 4, None), tmp_path)
    assert whole.returncode == 0, whole.output
    noted = torch.load(tmp_path / "middle.ckpt")["async_amsgrad"]
    gathered = noted.get("gathered")
    applied = sum(stop - start for start, stop in zip(noted["applied"][::2], noted["applied"][1::2], strict=True))
    assert applied == noted["counts"][0] == 4 * noted["version"] + (0 if gathered is None else gathered["count"])
    path = str(tmp_path / "middle.ckpt")
    (tmp_path / "rest").mkdir()
    rest = launch(lambda folder: go_on(folder, Module(), resumed_with, path), tmp_path / "rest")

    for rank in finished(rest):
        assert rank["step"] == 8
    trained = sum(len(samples) for rank in rest.reports() for samples in rank["seen"])
    assert trained == 64 - BATCH * applied


def test_one_rank_averages_its_own_gradients(tmp_path: Path) -> None:
    """Four gradients at one version, averaged: what `accumulate_grad_batches=4` does."""

    def script(folder: Path) -> None:
        seed_everything(3, verbose=False)
        module = TinyClassifier()
        alone = copy.deepcopy(module)
        fork_trainer(folder, 1, AsyncStrategy(gradients_per_update=4)).fit(module, loader(32, BATCH))
        accumulated = fork_trainer(folder, 1, "auto", accumulate_grad_batches=4)
        order = DistributedSampler(indexed_data(32), 1, 0, seed=3)
        accumulated.fit(alone, loader(32, BATCH, sampler=order))
        report(folder, 0, mean=module.flat_parameters(), accumulated=alone.flat_parameters())

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    (values,) = run.reports()
    assert torch.allclose(values["mean"], values["accumulated"], rtol=1e-5, atol=1e-6)


class TwoOptimizers(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.head = nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.net.parameters()), AMSGrad(self.head.parameters())


def test_several_optimizers_are_refused_by_name(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        fork_trainer(folder, 2, AsyncAMSGradStrategy(gradients_per_update=2, start_method="fork")).fit(
            TwoOptimizers(), loader()
        )

    run = launch(script, tmp_path)

    assert run.returncode == 1
    assert "gradients_per_update=2 takes one optimizer and there are 2" in run.output


class UnequalStream(IterableDataset[Any]):
    """Each rank's own, of unlike lengths."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        for index in range(BATCH * (3, 8, 11)[rank]):
            yield torch.full((6,), index / 40), rank % 2, index


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("per_update", "arguments"),
    [(RANKS, {}), (RANKS, {"val_check_interval": 2}), ("auto", {"max_epochs": EPOCHS})],
    ids=["epochs", "validations", "auto"],
)
def test_ranks_whose_streams_end_earlier_hold_nobody_up_in_lock_step(
    tmp_path: Path, per_update: Any, arguments: dict[str, Any]
) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncStrategy(0, gradients_per_update=per_update, start_method="fork")
        trainer = fork_trainer(folder, RANKS, strategy, **({"max_epochs": EPOCHS} | arguments))
        trainer.fit(Module(), DataLoader(UnequalStream(), batch_size=BATCH), loader(12, BATCH))

    ranks = finished(launch(script, tmp_path, timeout_s=40.0))

    assert [[len(samples) // BATCH for samples in rank["seen"]] for rank in ranks] == [[3] * 2, [8] * 2, [11] * 2]


class ReplacesTheOptimizer(Module):
    """Takes a new optimizer at a validation, where a gradient waits for another."""

    def on_validation_end(self) -> None:
        if self.trainer.sanity_checking or self.current_epoch > 0 or self.replaced:
            return
        self.replaced = True
        before = self.trainer.strategy.version
        self.trainer.optimizers = [AMSGrad(self.parameters(), lr=1e-2)]
        self.before = before

    replaced = False


def test_gradients_that_wait_for_more_are_not_lost_with_an_optimizer_that_is_replaced(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncStrategy(gradients_per_update=4, start_method="fork")
        trainer = fork_trainer(folder, 2, strategy, val_check_interval=5)
        trainer.fit(ReplacesTheOptimizer(), loader(80, BATCH), loader(12, BATCH))

    # Ten gradients: two versions, and one of the two that wait; then ten more.
    for rank in finished(launch(script, tmp_path)):
        assert rank["version"] == 3 + 3


# Steps of each rank that "auto" measures in these tests.
MEASURED = 11


class SlowRank(Module):
    """Its last rank sleeps in each step, as do the others for less time."""

    def __init__(self, slowest_s: float) -> None:
        super().__init__(sleep_s=(0.004, 0.004, slowest_s))

    def on_train_end(self) -> None:
        """Reports later, when the statistics are complete."""

    def on_fit_end(self) -> None:
        strategy: Any = self.trainer.strategy
        report(
            Path.cwd(),
            self.global_rank,
            parameters=self.flat_parameters(),
            step=self.trainer.global_step,
            steps=self.steps,
            version=strategy.version,
            run=strategy.configuration,
            stats=strategy.stats.as_dict(),
        )


def auto_fit(folder: Path, module: Module, strategy: AsyncStrategy, epochs: int = 2, **settings: Any) -> Any:
    seed_everything(3, verbose=False)
    trainer = fork_trainer(folder, RANKS, strategy, max_epochs=epochs, **settings)
    trainer.fit(module, loader(SAMPLES, BATCH))
    return trainer


@pytest.fixture
def least_gain(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Measures little, and is content with what gain there is, so that no choice hangs on a busy machine."""
    monkeypatch.setattr(auto, "WARM_UP_STEPS", MEASURED)
    monkeypatch.setattr(auto, "LEAST_GAIN", request.param)


@pytest.mark.parametrize("least_gain", [1.0], indirect=True)
@pytest.mark.usefixtures("least_gain")
@pytest.mark.parametrize(
    "settings",
    [{}, {"staleness_policy": "plain", "max_staleness": 5, "holder": "process"}, {"overlap": True}],
    ids=["thread", "own-policy-process", "overlap"],
)
def test_auto_measures_in_lock_step_and_then_lets_unequal_ranks_go(tmp_path: Path, settings: dict[str, Any]) -> None:
    strategy = AsyncStrategy(gradients_per_update="auto", start_method="fork", **settings)

    run = launch(lambda folder: auto_fit(folder, SlowRank(0.03), strategy, epochs=4, max_steps=40), tmp_path)

    first = finished(run)[0]
    chosen = first["run"]["auto"]
    assert chosen["gain"] >= 1.0
    assert len(chosen["step_seconds"]) == RANKS
    assert first["run"]["gradients_per_update"] == 2
    assert first["run"]["max_staleness"] == settings.get("max_staleness", 6)
    assert first["run"]["requested"]["gradients_per_update"] == "auto"
    assert first["run"]["staleness_policy"] == settings.get("staleness_policy", "from_ddp")
    (said,) = [line for line in run.output.splitlines() if line.startswith('gradients_per_update="auto"')]
    assert "2 gradients an update for 3 ranks, whose steps take" in said
    assert ("can be those of DDP" in said) is ("staleness_policy" not in settings)
    # The clock has not jumped: steps of 120 gradients, as under DDP, each batch once.
    steps = [rank["steps"] for rank in finished(run)]
    assert {rank["step"] for rank in finished(run)} == {40}
    assert all(one == sorted(one) for one in steps)
    assert sum(map(len, steps)) == 120 == first["stats"]["updates"]
    if not settings.get("overlap"):
        # Eleven versions of three, then of two; an epoch's last may be made of one.
        assert 11 + (120 - 33) / 2 <= first["version"] <= 11 + (120 - 33) / 2 + 4


@pytest.mark.parametrize("least_gain", [99.0], indirect=True)
@pytest.mark.usefixtures("least_gain")
def test_auto_stays_with_ddp_where_ranks_are_equal(tmp_path: Path) -> None:
    strategy = AsyncStrategy(gradients_per_update="auto", start_method="fork")
    (tmp_path / "ddp").mkdir()
    ddp = finished(
        launch(
            lambda folder: auto_fit(
                folder, SlowRank(0.005), AsyncStrategy(0, gradients_per_update=RANKS, start_method="fork")
            ),
            tmp_path / "ddp",
        )
    )
    run = launch(lambda folder: auto_fit(folder, SlowRank(0.005), strategy), tmp_path)

    first = finished(run)[0]
    assert (first["run"]["gradients_per_update"], first["run"]["max_staleness"]) == (RANKS, 0)
    assert {"gradients_per_update": "auto", "max_staleness": "auto"}.items() <= first["run"]["requested"].items()
    assert first["stats"]["staleness"] == {0: 66}
    (said,) = [line for line in run.output.splitlines() if line.startswith('gradients_per_update="auto"')]
    assert "as under DDP" in said
    for mine, theirs in zip(finished(run), ddp, strict=True):
        assert torch.allclose(mine["parameters"], theirs["parameters"], rtol=1e-5, atol=1e-6)


class SavesAfterTheChoice(SlowRank):
    """Rank 0 saves in the second epoch, between two batches."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.current_epoch == 1 and self.global_rank == 0 and not Path("chosen.ckpt").exists():
            self.trainer.save_checkpoint("chosen.ckpt")


@pytest.mark.parametrize("least_gain", [1.0], indirect=True)
@pytest.mark.usefixtures("least_gain")
@pytest.mark.parametrize(
    ("ranks", "per_update", "holder"), [(RANKS, "auto", "process"), (2, "auto", "thread"), (RANKS, 1, "thread")]
)
def test_a_resumed_run_goes_on_with_the_choice_for_as_many_ranks(
    tmp_path: Path, ranks: int, per_update: Any, holder: Any
) -> None:
    def go_on(folder: Path) -> None:
        seed_everything(3, verbose=False)
        strategy = AsyncStrategy(gradients_per_update=per_update, holder=holder, start_method="fork")
        trainer = fork_trainer(folder, ranks, strategy, max_epochs=2)
        trainer.fit(SlowRank(0.005), loader(SAMPLES, BATCH), ckpt_path=tmp_path / "chosen.ckpt")

    auto_strategy = AsyncStrategy(gradients_per_update="auto", start_method="fork")
    first = launch(lambda folder: auto_fit(folder, SavesAfterTheChoice(0.005), auto_strategy), tmp_path)
    chosen = finished(first)[0]["run"]["auto"]
    noted = torch.load(tmp_path / "chosen.ckpt", weights_only=False)["async_amsgrad"]
    # Eleven versions of three, the first epoch; then of two.
    assert chosen["version"] == 11
    assert noted["auto"]["gradients"] == 2
    (tmp_path / "rest").mkdir()

    rest = launch(go_on, tmp_path / "rest")

    gradients = noted["counts"][0]
    before = gradients if ranks == RANKS else gradients // RANKS * ranks
    for rank in finished(rest):
        assert rank["steps"] == sorted(rank["steps"])
        assert rank["step"] == (before + 66 - gradients) // ranks
    assert finished(rest)[0]["stats"]["updates"] == 66 - gradients
    run = finished(rest)[0]["run"]
    if (ranks, per_update) == (RANKS, "auto"):
        assert run["gradients_per_update"] == 2
        assert run["auto"]["step_seconds"] == chosen["step_seconds"]
        assert run["staleness_policy"] == "from_ddp"
    elif per_update == "auto":
        # Measured anew: half of two.
        assert (run["gradients_per_update"], len(run["auto"]["step_seconds"])) == (1, 2)
        assert run["auto"]["version"] > gradients // RANKS
    else:
        assert (run["gradients_per_update"], finished(rest)[0]["version"]) == (1, 66)


def test_a_fit_that_is_too_short_for_auto_says_so(tmp_path: Path) -> None:
    strategy = AsyncStrategy(gradients_per_update="auto", start_method="fork")

    run = launch(lambda folder: auto_fit(folder, SlowRank(0.004), strategy, epochs=1), tmp_path)

    assert finished(run)[0]["version"] == 11
    assert "gain" not in finished(run)[0]["run"]["auto"]
    assert "the fit was over before" in run.output


def test_a_number_of_gradients_that_is_none_is_refused() -> None:
    for value in (0, -1, True, 1.5, "all"):
        with pytest.raises(MisconfigurationException, match='must be an int of at least 1 or "auto"'):
            AsyncStrategy(gradients_per_update=value)  # type: ignore[arg-type]


def test_auto_with_several_optimizers_is_one_gradient_and_says_so(tmp_path: Path) -> None:
    class Two(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [AMSGrad(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.manual_backward(self.loss(batch))
                optimizer.step()
                optimizer.zero_grad()

        def on_train_end(self) -> None:
            report(Path.cwd(), self.global_rank, version=self.trainer.strategy.version)

    strategy = AsyncStrategy(gradients_per_update="auto", start_method="fork")
    run = launch(lambda folder: fork_trainer(folder, RANKS, strategy).fit(Two(), loader(SAMPLES, BATCH)), tmp_path)

    # Each of 33 batches has a step of each optimizer.
    assert {rank["version"] for rank in finished(run)} == {66}
    assert 'gradients_per_update="auto": 1 gradient an update for 3 ranks' in run.output
