"""Staleness policies and the momentum correction in whole runs: replayed, resumed, refused, and written by users."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from lightning_async import AMSGrad, AsyncAMSGradStrategy, AsyncStrategy, StalenessPolicy
from lightning_async.exchange import auto
from lightning_async.policies import AgeDamping, Arrival
from tests.integration.test_equality import assert_equal_bit_for_bit, train_and_replay
from tests.launch import launch, report, run_as_script
from tests.models import TinyClassifier, fork_trainer, loader


@pytest.mark.parametrize(
    "options",
    [
        {"staleness_policy": AgeDamping(0.4)},
        pytest.param({"staleness_policy": "delay_adaptive", "gradients_per_update": 2}, marks=pytest.mark.soak),
        {"staleness_policy": "rescaled", "max_staleness": 1, "on_stale": "drop"},
        {"staleness_policy": "ordered_momentum", "max_staleness": 5, "overlap": True},
        {"staleness_policy": "ordered_momentum", "gradients_per_update": 2, "momentum_correction": "auto"},
        {"staleness_policy": "look_ahead", "transport": "tcp", "momentum_correction": "auto"},
        pytest.param({"gradients_per_update": "auto", "holder": "process"}, marks=pytest.mark.soak),
        {"gradients_per_update": "auto"},
    ],
    ids=[
        "damping",
        "adaptive-mean",
        "rescaled-drop",
        "ordered-overlap",
        "ordered-mean",
        "ahead-tcp",
        "auto-process",
        "auto",
    ],
)
def test_a_recorded_run_replayed_through_the_policy_gives_the_same_bits(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # "auto" chooses in the first epoch's middle, and what it does not choose on its own.
    monkeypatch.setattr(auto, "WARM_UP_STEPS", 6)
    monkeypatch.setattr(auto, "LEAST_GAIN", 1.0)
    run = launch(lambda folder: train_and_replay(folder, {"max_staleness": "auto", **options}), tmp_path)

    assert run.returncode == 0, run.output
    updates = torch.load(tmp_path / "updates.pt")
    assert {update["worker"] for update in updates} == {0, 1, 2}
    assert any(update["staleness"] > 0 for update in updates if update["applied"])
    replayed = torch.load(tmp_path / "replayed.pt")
    for rank in run.reports():
        assert_equal_bit_for_bit(rank["parameters"], replayed)


class Module(TinyClassifier):
    """Saves on rank 0 in the middle of an epoch, and reports what the policy has learned."""

    saves = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # An epoch that is resumed in its middle does not begin.
        self.seen = self.seen or [[]]
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.saves and self.batches == 4 and self.global_rank == 0:
            self.trainer.save_checkpoint("middle.ckpt")

    def on_train_end(self) -> None:
        snapshot = self.trainer.strategy.engine.snapshot()
        report(Path.cwd(), self.global_rank, policy=None if snapshot is None else snapshot.policy)


class Saving(Module):
    saves = True


@pytest.mark.parametrize("holder", ["thread", pytest.param("process", marks=pytest.mark.soak)])
def test_a_run_that_is_resumed_in_the_middle_of_an_epoch_goes_on_with_what_the_policy_has_learned(
    tmp_path: Path, holder: Any
) -> None:
    def fit(folder: Path, module: TinyClassifier, policy: Any, path: Path | None) -> None:
        seed_everything(3, verbose=False)
        strategy = AsyncStrategy(
            start_method="fork", batches="sharded", gradients_per_update=2, holder=holder, staleness_policy=policy
        )
        fork_trainer(folder, 2, strategy).fit(module, loader(64, 4), ckpt_path=path)

    whole = launch(lambda folder: fit(folder, Saving(), "rescaled", None), tmp_path)
    assert whole.returncode == 0, whole.output
    noted = torch.load(tmp_path / "middle.ckpt")["async_amsgrad"]
    applied = sum(stop - start for start, stop in zip(noted["applied"][::2], noted["applied"][1::2], strict=True))
    (tmp_path / "rest").mkdir()
    rest = launch(lambda folder: fit(folder, Module(), "rescaled", tmp_path / "middle.ckpt"), tmp_path / "rest")

    assert (noted["staleness_policy"], noted["momentum_correction"]) == ("rescaled", None)
    assert sum(noted["policy"]["state"]["counts"]) == applied > 0
    assert rest.returncode == 0, rest.output
    assert rest.report(0)["policy"]["state"] == whole.report(0)["policy"]["state"] == {"counts": [8, 8]}
    if holder == "process":
        return
    (tmp_path / "other").mkdir()
    other = launch(lambda folder: fit(folder, Module(), "damping", tmp_path / "middle.ckpt"), tmp_path / "other")
    assert other.returncode == 0, other.output
    assert "The checkpoint is from a run with staleness_policy=rescaled; this one begins with damping" in other.output


_SCRIPT = """
import torch
from lightning.pytorch import Trainer
from lightning_async import AsyncStrategy, StalenessPolicy
from tests.models import TinyClassifier, loader

class Forgets(StalenessPolicy):
    '''Leaves out what is older than a bound.'''

    def __init__(self, oldest):
        self.oldest = oldest
        self._taken = self._left = 0

    def gradient_factor(self, arrival):
        self._taken += 1
        self._left += arrival.staleness > self.oldest
        return float(arrival.staleness <= self.oldest)

    def state_dict(self):
        return {"taken": self._taken, "left": self._left}

class Module(TinyClassifier):
    def on_train_end(self):
        if self.global_rank == 0:
            print(self.trainer.strategy.engine.snapshot().policy["state"], self.trainer.strategy.configuration)

if __name__ == "__main__":
    strategy = AsyncStrategy(start_method="fork", staleness_policy=Forgets(oldest=2), holder="HOLDER")
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), loader(48, 4))
"""


@pytest.mark.parametrize("holder", ["thread", "process"])
def test_a_users_policy_is_one_class_in_their_script(tmp_path: Path, holder: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT.replace("HOLDER", holder))

    run = launch(lambda folder: run_as_script(script), tmp_path)

    if holder == "thread":
        assert run.returncode == 0, run.output
        assert "{'taken': 12, 'left': " in run.output
        assert "'staleness_policy': 'Forgets(oldest=2)'" in run.output
    else:
        assert run.returncode == 1
        assert 'holder="process" sends the staleness policy to another process, and Forgets cannot go' in run.output
        assert 'Define it in a module that can be imported, or take holder="thread"' in run.output
        # Before there are ranks that would all say so.
        assert "GLOBAL_RANK" not in run.output


class TwoOptimizers(TinyClassifier):
    """Steps one optimizer after the other, by hand."""

    def __init__(self) -> None:
        super().__init__((0.0, 0.002))
        self.automatic_optimization = False
        self.head = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            logits = self.head(self.net(batch[0]))
            self.manual_backward(nn.functional.cross_entropy(logits, batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.net.parameters(), lr=1e-2), AMSGrad(self.head.parameters(), lr=1e-2)

    def on_train_end(self) -> None:
        finite = all(bool(parameter.isfinite().all()) for parameter in self.parameters())
        policy = self.trainer.strategy.engine.snapshot()
        report(Path.cwd(), self.global_rank, finite=finite, policy=policy and policy.policy["state"])


class SeesBoth(StalenessPolicy):
    """Does what every built-in policy does, and notes what it is asked."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}

    def _note(self, name: str) -> None:
        self._asked[name] = self._asked.get(name, 0) + 1

    def gradient_factor(self, arrival: Arrival) -> float:
        self._note("gradient_factor")
        return 0.9**arrival.staleness

    def step_factor(self, arrivals: Any) -> float:
        self._note("step_factor")
        assert len(arrivals) == 1
        return 0.5

    def lateness(self, arrival: Arrival, group: Any) -> float:
        return 0.1

    def after_step(self, optimizer: Any, late: Any) -> None:
        self._note(f"after_step of {len(late)}")

    def look_ahead(self, out: Any, optimizer: Any) -> None:
        self._note(f"look_ahead of {len(out)}")

    def state_dict(self) -> dict[str, Any]:
        return self._asked

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("nothing is resumed here")


def test_with_several_optimizers_each_push_is_asked_about_and_each_answer_moved(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(start_method="fork", staleness_policy=SeesBoth())
        fork_trainer(folder, 2, strategy).fit(TwoOptimizers(), loader(48, 4))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert all(rank["finite"] for rank in run.reports())
    asked = run.report(0)["policy"]
    # Two optimizers, of four parameters and of two; twelve batches.
    assert {asked[name] for name in ("gradient_factor", "step_factor")} == {24}
    assert (asked["after_step of 4"], asked["after_step of 2"]) == (12, 12)
    assert asked["look_ahead of 4"] == asked["look_ahead of 2"] > 0


class ReplacesTheOptimizer(Module):
    """Takes a new optimizer where the ranks meet."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            self.trainer.optimizers = [AMSGrad(self.parameters(), lr=1e-2)]


def test_what_a_policy_has_learned_stays_when_an_optimizer_is_replaced(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncStrategy(start_method="fork", staleness_policy="rescaled")
        fork_trainer(folder, 2, strategy, max_epochs=2).fit(ReplacesTheOptimizer(), loader(32, 4))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert sum(run.report(0)["policy"]["state"]["counts"]) == 16


class Adagrad(TinyClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters())


class Fails(StalenessPolicy):
    """Gives a meaningless answer after a while."""

    def gradient_factor(self, arrival: Arrival) -> float:
        return 1.0 if arrival.version < 5 else float("nan")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"staleness_policy": "ordered_momentum"}, "OrderedMomentum corrects the momentum of AMSGrad, Adam, AdamW or"),
        ({"momentum_correction": "auto"}, "momentum_correction changes beta1 or momentum, and Adagrad has neither"),
        ({"staleness_policy": Fails()}, "gradient_factor of the staleness policy Fails() returned nan, and must"),
    ],
    ids=["policy", "momentum", "nonsense"],
)
def test_what_cannot_be_ends_the_run_with_its_name(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncStrategy(start_method="fork", **options)
        fork_trainer(folder, 2, strategy).fit(Adagrad(), loader())

    run = launch(script, tmp_path)

    assert run.returncode == 1
    assert says in run.output
