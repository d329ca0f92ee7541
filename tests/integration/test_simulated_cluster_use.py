"""What users do with a simulated cluster, what they are shown, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_async import AMSGrad, SimulatedClusterStrategy
from lightning_async.cli.app import AsyncCLI
from lightning_async.policies import StalenessPolicy
from lightning_async.strategies import one_device
from tests.models import fork_trainer
from tests.simulated import BATCHES, MAKE, Module, batches, cluster, fit, make_module, resumed

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

TUNING = Path(__file__).parents[2] / "docs" / "tuning.md"
RECIPE = str(Path(__file__).parents[2] / "recipes" / "lenet5_digits.yaml")


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


class FarAhead(StalenessPolicy):
    def look_ahead(self, out: Any, optimizer: Any) -> None:
        torch._foreach_add_(out, 1000.0)


def test_what_a_worker_has_read_is_gone_with_its_skipped_batch(tmp_path: Path) -> None:
    class Skips(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 7 else None

    module = make_module(Skips, make=MAKE["AMSGrad"])
    fit(tmp_path, module, cluster([1, 2], staleness_policy=FarAhead()))

    assert module.flat_parameters().abs().max() < 10


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
