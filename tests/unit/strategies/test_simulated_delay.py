"""Training with simulated delays is what a delayed loop written by hand does, bit for bit."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, SimulatedDelayStrategy
from lightning_async.cli.app import AsyncCLI
from lightning_async.monitoring.loggers import ScalarWriter
from lightning_async.strategies import one_device
from lightning_async.strategies.simulated_delay import Delays
from tests.models import fork_trainer, indexed_data
from tests.remembering import Make, Remembering

BATCHES = 15
RECIPE = str(Path(__file__).parents[3] / "recipes" / "lenet5_digits.yaml")

MAKE: dict[str, Make] = {
    "AMSGrad": lambda params: AMSGrad(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def batches() -> DataLoader[Any]:
    return DataLoader(indexed_data(BATCHES * 4), batch_size=4)


class Module(Remembering):
    """Remembers what its hook sees, too."""

    def __init__(self, make: Make = MAKE["AMSGrad"]) -> None:
        super().__init__(make, period=4)
        self.newest: list[Tensor] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.newest.append(self.flat_parameters())


def make_module(kind: type[Module] = Module, **arguments: Any) -> Module:
    seed_everything(5, verbose=False)
    return kind(**arguments)


def fit(folder: Path, module: LightningModule, strategy: Any, **arguments: Any) -> Trainer:
    trainer = fork_trainer(folder, 1, strategy, **({"max_epochs": 2} | arguments))
    trainer.fit(module, batches(), ckpt_path=arguments.pop("ckpt_path", None))
    return trainer


def by_hand(module: Module, delay: Callable[[int], int], accumulate: int = 1, clip: float | None = None) -> Tensor:
    """Two epochs, in which update number k takes its gradient at the parameters of ``delay(k)`` updates before."""
    (optimizer,), (scheduler,) = module.configure_optimizers()
    history = [copy.deepcopy(module.state_dict())]
    reader = copy.deepcopy(module)
    for _ in range(2):
        data = list(batches())
        for start in range(0, len(data), accumulate):
            update = len(history) - 1
            reader.load_state_dict(history[update - min(delay(update), update)])
            reader.zero_grad()
            for batch in data[start : start + accumulate]:
                (reader.loss(batch) / accumulate).backward()
            for parameter, source in zip(module.parameters(), reader.parameters(), strict=True):
                parameter.grad = source.grad
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            scheduler["scheduler"].step()
            history.append(copy.deepcopy(module.state_dict()))
    return module.flat_parameters()


@pytest.mark.parametrize("name", MAKE)
def test_no_delay_is_plain_training_bit_for_bit(tmp_path: Path, name: str) -> None:
    plain, ours = (make_module(make=MAKE[name]) for _ in range(2))

    fit(tmp_path, plain, "auto", gradient_clip_val=0.1)
    trainer = fit(tmp_path, ours, SimulatedDelayStrategy(max_delay=0), gradient_clip_val=0.1)

    assert torch.equal(ours.flat_parameters(), plain.flat_parameters())
    assert trainer.strategy.stats.staleness == {0: 2 * BATCHES}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("distribution", "max_delay"), [("fixed", 1), ("fixed", 7), ("uniform", 5), ("geometric", 6)])
def test_a_delayed_run_is_the_loop_written_by_hand_bit_for_bit(
    tmp_path: Path, name: str, distribution: Any, max_delay: int
) -> None:
    alone, ours = (make_module(make=MAKE[name]) for _ in range(2))
    delays = Delays(max_delay, distribution, seed=3)

    trainer = fit(tmp_path, ours, SimulatedDelayStrategy(max_delay, distribution, seed=3))

    assert torch.equal(ours.flat_parameters(), by_hand(alone, delays.draw))
    expected = Counter(min(update, delays.draw(update)) for update in range(2 * BATCHES))
    assert trainer.strategy.stats.staleness == expected
    assert any(not torch.equal(*pair) for pair in zip(ours.newest, ours.stepped_at, strict=True))


def test_accumulated_and_clipped_gradients_are_delayed_as_one(tmp_path: Path) -> None:
    alone, ours = make_module(), make_module()

    trainer = fit(
        tmp_path,
        ours,
        SimulatedDelayStrategy(2, "fixed"),
        accumulate_grad_batches=3,
        gradient_clip_val=0.05,
    )

    assert torch.equal(ours.flat_parameters(), by_hand(alone, lambda update: 2, accumulate=3, clip=0.05))
    assert trainer.strategy.stats.updates == 10
    assert trainer.strategy.stats.batches_by_rank == {0: 2 * BATCHES}


def test_validation_and_hooks_between_batches_see_the_newest_parameters(tmp_path: Path) -> None:
    plain, ours = make_module(), make_module()
    every = {"limit_val_batches": 1, "val_check_interval": 1, "max_steps": 6, "max_epochs": 1}

    trainer = fork_trainer(tmp_path, 1, SimulatedDelayStrategy(3, "fixed"), accumulate_grad_batches=2, **every)
    trainer.fit(ours, batches(), batches())

    # After each batch, also where an update's gradient is still incomplete.
    assert len(ours.validated_at) == 12
    for validated, newest in zip(ours.validated_at, ours.newest[1:], strict=False):
        assert torch.equal(validated, newest)
    assert torch.equal(ours.validated_at[-1], ours.flat_parameters())
    assert torch.equal(plain.flat_parameters(), ours.stepped_at[7])
    assert not torch.equal(ours.stepped_at[7], ours.newest[7])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    first, second, third = (make_module() for _ in range(3))

    for module, seed in ((first, 1), (second, 1), (third, 2)):
        fit(tmp_path, module, SimulatedDelayStrategy(8, seed=seed))

    assert torch.equal(first.flat_parameters(), second.flat_parameters())
    assert not torch.equal(first.flat_parameters(), third.flat_parameters())


def test_a_resumed_run_starts_its_history_anew_and_draws_the_same_delays(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore", ".*The dirpath has changed")
    save = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    whole = make_module()
    full = fit(tmp_path, whole, SimulatedDelayStrategy(4, seed=1), callbacks=[save], enable_checkpointing=True)
    middle = torch.load(tmp_path / "all" / "epoch=0.ckpt", weights_only=False)

    ours = make_module()
    trainer = fork_trainer(tmp_path, 1, SimulatedDelayStrategy(4, seed=1), max_epochs=2)
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    trainer.fit(ours, batches(), ckpt_path=tmp_path / "all" / "epoch=0.ckpt")

    saved = torch.cat([value.reshape(-1) for value in middle["state_dict"].values()])
    assert torch.equal(saved, whole.newest[BATCHES])
    assert torch.equal(ours.stepped_at[0], saved)
    draw = Delays(4, seed=1).draw
    assert trainer.strategy.stats.staleness == Counter(min(k, draw(BATCHES + k)) for k in range(BATCHES))
    assert full.strategy.stats.staleness == Counter(min(k, draw(k)) for k in range(2 * BATCHES))


class Manual(Module):
    """Two optimizers by hand; each step is an update."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            self.stepped_at.append(self.flat_parameters())
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]


def test_under_manual_optimization_every_step_has_a_delay_of_its_own(tmp_path: Path) -> None:
    alone, ours = make_module(Manual), make_module(Manual)

    trainer = fit(tmp_path, ours, SimulatedDelayStrategy(3, "fixed"), max_epochs=1)

    history, reader = [copy.deepcopy(alone.state_dict())], copy.deepcopy(alone)
    optimizers = alone.configure_optimizers()
    for batch in batches():
        for optimizer in optimizers:
            update = len(history) - 1
            reader.load_state_dict(history[update - min(3, update)])
            reader.zero_grad()
            reader.loss(batch).backward()
            for parameter, source in zip(alone.parameters(), reader.parameters(), strict=True):
                parameter.grad = source.grad
            optimizer.step()
            history.append(copy.deepcopy(alone.state_dict()))
    assert torch.equal(ours.flat_parameters(), alone.flat_parameters())
    assert trainer.strategy.stats.updates == 2 * BATCHES
    for seen, newest in zip(ours.newest, history[::2], strict=False):
        assert torch.equal(seen, torch.cat([value.reshape(-1) for value in newest.values()]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_leaves_the_newest_parameters_in_place(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 1 else loss

    module = make_module(Skips)
    trainer = fork_trainer(tmp_path, 1, SimulatedDelayStrategy(2, "fixed"), limit_train_batches=6)
    trainer.fit(module, batches())

    assert torch.equal(module.newest[1], module.newest[2])
    assert not torch.equal(module.newest[2], module.newest[3])
    assert torch.equal(module.stepped_at[5], module.newest[3])


def test_the_delays_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)

    fit(tmp_path, make_module(), SimulatedDelayStrategy(3, "fixed"), logger=logger, log_every_n_steps=10)

    logged = [row for row in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines() if row.strip(",")]
    names = logged[0].split(",")
    rows = [dict(zip(names, row.split(","), strict=True)) for row in logged[1:]]
    seen = [(row["async/version"], row["async/staleness_mean"]) for row in rows if row["async/version"]]
    assert seen == [("10.0", "2.4"), ("20.0", "3.0"), ("30.0", "3.0")]


def test_the_loggers_get_the_configuration_and_what_the_whole_run_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {"versions": []}

    class Writer(ScalarWriter):
        def configure(self, configuration: dict[str, Any]) -> None:
            told["configuration"] = configuration

        def log(self, metrics: dict[str, float], staleness: Counter[int], step: int) -> None:
            told["versions"].append(metrics["async/version"])

        def summarize(self, summary: dict[str, float], metrics: dict[str, float], step: int) -> None:
            told["summary"] = summary

    skipped = [0.0]

    class SlowToValidate(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            skipped[0] += 3600.0

    monkeypatch.setattr("lightning_async.strategies.simulated_delay.writer_for", lambda logger, prefix: Writer(logger))
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + skipped[0])
    monkeypatch.setattr("lightning_async.monitoring.stats.time", clock)
    strategy = SimulatedDelayStrategy(3, "fixed", seed=7)
    trainer = fork_trainer(
        tmp_path, 1, strategy, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=7, limit_val_batches=2
    )

    trainer.fit(make_module(SlowToValidate), batches(), batches())

    assert told["configuration"] == {
        "strategy": "SimulatedDelayStrategy",
        "max_delay": 3,
        "distribution": "fixed",
        "seed": 7,
    }
    assert told["versions"] == [*range(7, 2 * BATCHES, 7), 2 * BATCHES]
    assert told["summary"]["updates"] == 2 * BATCHES
    # The hours of validation are not training.
    assert 0.0 < told["summary"]["train_seconds"] < 3600.0 < skipped[0]


# ------------------------------------------------------------------------------------------------------- the delays


@given(max_delay=st.integers(0, 50), seed=st.integers(-(10**6), 10**6), update=st.integers(0, 10**9))
def test_a_delay_is_within_its_bound_and_the_same_every_time(max_delay: int, seed: int, update: int) -> None:
    for distribution in ("uniform", "fixed", "geometric"):
        delays = Delays(max_delay, distribution, seed)  # type: ignore[arg-type]

        drawn = delays.draw(update)

        assert 0 <= drawn <= max_delay
        assert drawn == delays.draw(update)
        assert distribution != "fixed" or drawn == max_delay


@pytest.mark.parametrize(("distribution", "ratio"), [("uniform", 1.0), ("geometric", 0.75)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_delays_have_the_distribution_that_they_are_said_to_have(
    distribution: Any, ratio: float, seed: int
) -> None:
    draws = 20_000

    counts = Counter(map(Delays(6, distribution, seed).draw, range(draws)))

    weights = [ratio**delay for delay in range(7)]
    expected = [draws * weight / sum(weights) for weight in weights]
    squares = sum((counts[delay] - mean) ** 2 / mean for delay, mean in enumerate(expected))
    # The chi-squared distribution with 6 degrees of freedom exceeds 22.5 once in a thousand times.
    assert squares < 22.5


def test_consecutive_delays_have_nothing_to_do_with_each_other() -> None:
    drawn = torch.tensor([Delays(9, seed=4).draw(update) for update in range(5000)], dtype=torch.float64)

    correlation = torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]

    assert abs(correlation) < 0.05


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_delay": -1}, "max_delay must be an int of at least 0, not -1"),
        ({"max_delay": 2.0}, "max_delay must be an int of at least 0, not 2.0"),
        ({"max_delay": True}, "max_delay must be an int of at least 0, not True"),
        ({"max_delay": 1, "distribution": "normal"}, "distribution must be 'uniform', 'fixed' or 'geometric', not"),
        ({"max_delay": 1, "seed": 0.5}, "seed must be an int, not 0.5"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_argument_without_a_meaning_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        SimulatedDelayStrategy(**arguments)


def test_more_than_one_device_or_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"one device, and the Trainer has 2. Take devices=1"):
        fork_trainer(tmp_path, 2, SimulatedDelayStrategy(1))
    with pytest.raises(MisconfigurationException, match="the Trainer has num_nodes=2"):
        fork_trainer(tmp_path, 1, SimulatedDelayStrategy(1), num_nodes=2).fit(make_module(), batches())


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


@pytest.mark.parametrize("kind", [Twice, torch.optim.LBFGS])
def test_an_optimizer_that_evaluates_its_closure_again_is_refused_if_there_is_a_delay(
    tmp_path: Path, kind: Any
) -> None:
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__}, which evaluates its closure more than once"):
        fit(tmp_path, make_module(make=lambda params: kind(params, lr=0.1)), SimulatedDelayStrategy(1))

    fit(tmp_path, make_module(make=lambda params: kind(params, lr=0.1)), SimulatedDelayStrategy(0), max_steps=2)


def test_copies_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_device, "memory_bytes", lambda device: 10 * 74 * 4)

    with pytest.raises(MisconfigurationException, match=r"max_delay=10 keeps 11 copies of 0\.000296 MB = "):
        fit(tmp_path, make_module(), SimulatedDelayStrategy(10))
    fit(tmp_path, make_module(), SimulatedDelayStrategy(9), max_steps=1)


def test_it_is_configured_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n"
        "  accelerator: cpu\n"
        "  devices: 1\n"
        "  strategy:\n"
        "    class_path: lightning_async.SimulatedDelayStrategy\n"
        "    init_args: {max_delay: 20, distribution: geometric, seed: 3}\n"
    )

    cli = AsyncCLI(["--config", RECIPE, "--config", str(config)], run=False)

    strategy = cli.trainer.strategy
    assert isinstance(strategy, SimulatedDelayStrategy)
    assert (strategy.max_delay, strategy._delays.draw(5)) == (20, Delays(20, "geometric", 3).draw(5))
    assert strategy.root_device == torch.device("cpu")
