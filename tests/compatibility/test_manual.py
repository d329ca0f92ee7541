"""Optimization by hand: optimizers that take turns, accumulated batches, steps and schedules that are counted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.compatibility.runs import RANKS, History, Reporting, train
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader


class SmallGAN(Reporting):
    """A generator and a discriminator on six features; the generator steps first, as in Lightning's example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        del self.net
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.untouched: list[bool] = []
        self.trainable: list[bool] = []

    def verdict(self, x: Tensor, real: bool) -> Tensor:
        logits = self.discriminator(x)
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def turn(self, loss: Tensor, optimizer: Any, others: nn.Module) -> None:
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        self.untouched.append(all(parameter.grad is None for parameter in others.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        self.batches += 1
        noise = torch.randn(len(batch[0]), 3)
        self.toggle_optimizer(generator)
        self.trainable.append(any(parameter.requires_grad for parameter in self.discriminator.parameters()))
        self.turn(self.verdict(self.generator(noise), real=True), generator, self.discriminator)
        self.toggle_optimizer(discriminator)
        fake = self.verdict(self.generator(noise).detach(), real=False)
        self.turn(self.verdict(batch[0], real=True) + fake, discriminator, self.generator)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [AMSGrad(self.generator.parameters(), lr=1e-3), AMSGrad(self.discriminator.parameters(), lr=4e-3)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1000) for optimizer in optimizers]

    def facts(self) -> dict[str, Any]:
        schedulers: Any = self.lr_schedulers()
        return {
            "untouched": self.untouched,
            "trainable": self.trainable,
            "scheduled": [scheduler.last_epoch for scheduler in schedulers],
        }


@pytest.mark.compatibility(
    "Optimization",
    "manual optimization with two optimizers (a GAN), `toggle_optimizer`, `clip_gradients`",
    note="Each step refreshes all parameters; k counts the steps of both, as `global_step` does.",
)
@pytest.mark.compatibility(
    "Optimization",
    "schedulers that are stepped by hand",
    note="Every rank makes a step for each N calls that all ranks together have made. After resuming in mid-epoch a "
    "schedule may be one step behind.",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_a_gan_is_trained_by_two_optimizers_in_turns(tmp_path: Path, batches: str) -> None:
    run = train(tmp_path, SmallGAN, {"batches": batches})

    ranks, updates = run.reports(), run.report(0)["updates"]
    assert sum(rank["batches"] for rank in ranks) == 24
    assert (ranks[0]["version"], ranks[0]["step"]) == (48, 48 // RANKS)
    for number, rank in enumerate(ranks):
        turns = [update["optimizer"] for update in updates if update["worker"] == number]
        assert turns == [0, 1] * rank["batches"]
        assert rank["untouched"] == [True] * 2 * rank["batches"]
        assert rank["trainable"] == [False] * rank["batches"]
        assert rank["scheduled"] == [24 // RANKS] * 2
    assert [update["lrs"] for update in updates] == [[(1e-3, 4e-3)[update["optimizer"]]] for update in updates]
    for update in updates:
        assert 0 < torch.cat([part.reshape(-1) for part in update["gradients"]]).norm() <= 0.1 * 1.001
    assert sorted(ticket for update in updates for ticket in update["tickets"]) == list(range(24))
    steps = [{state["step"].item() for state in optimizer["state"].values()} for optimizer in ranks[0]["holder"]]
    assert steps == [{24}, {24}]


class RareGenerator(SmallGAN):
    """Steps the generator in every third batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        self.batches += 1
        noise = torch.randn(len(batch[0]), 3)
        if batch_idx % 3 == 0:
            self.turn(self.verdict(self.generator(noise), real=True), generator, nn.Module())
        # The generator's backward leaves gradients in the discriminator, which is not toggled here.
        discriminator.zero_grad()
        fake = self.verdict(self.generator(noise).detach(), real=False)
        self.turn(self.verdict(batch[0], real=True) + fake, discriminator, nn.Module())


@pytest.mark.compatibility("Optimization", "manual optimization where one optimizer steps in some batches only")
def test_an_optimizer_may_sit_batches_out(tmp_path: Path) -> None:
    run = train(tmp_path, RareGenerator)

    ranks, updates = run.reports(), run.report(0)["updates"]
    rare = sum(-(-rank["batches"] // 3) for rank in ranks)
    assert [sum(update["optimizer"] == index for update in updates) for index in (0, 1)] == [rare, 24]
    assert ranks[0]["version"] == rare + 24
    assert sorted(ticket for update in updates for ticket in update["tickets"]) == list(range(24))


# --- batches that are accumulated ------------------------------------------------------------------------------------


class Accumulating(Reporting):
    """Lightning's example of accumulation by hand."""

    def __init__(self, every: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def on_fit_start(self) -> None:
        # Warnings are errors in tests, and kept from the output; this one is what some of them are about.
        warnings.filterwarnings("always", ".* left over")
        warnings.showwarning = lambda message, *details, **named: print(message)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()


def sizes(run: Any) -> list[int]:
    """Batches of each update; fails unless every batch of every epoch took part in one."""
    updates = run.report(0)["updates"]
    tickets = sorted(ticket for update in updates for ticket in update["tickets"])
    epochs = tickets.count(0)
    assert tickets == sorted([*range(len(tickets) // epochs)] * epochs)
    return sorted(len(update["tickets"]) for update in updates)


@pytest.mark.compatibility(
    "Optimization",
    "accumulation by hand (`if (batch_idx + 1) % n == 0`)",
    note="The batches of a step stay on one rank. In the first epoch each rank takes an equal share until its steps "
    "have shown n. The leftover of an epoch makes one update, with a warning.",
)
@pytest.mark.parametrize("options", [{}, {"batches": "sharded"}, {"holder": "process"}], ids=str)
def test_batches_that_are_accumulated_by_hand_all_take_part_in_an_update(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = train(tmp_path, Accumulating, options, samples=4 * 4 * 9, max_epochs=2)

    assert sizes(run) == [4] * 18
    assert run.report(0)["step"] == 18 // RANKS


def test_what_an_epoch_leaves_of_an_accumulation_is_applied_and_told(tmp_path: Path) -> None:
    run = train(tmp_path, Accumulating, samples=4 * 47, max_epochs=2, val_check_interval=5, validation_samples=8)

    assert sizes(run) == [3, 3] + [4] * 22
    assert run.output.count("3 of the last segment's batches were left over") == 1


def test_a_step_in_the_first_batch_of_each_group_loses_none(tmp_path: Path) -> None:
    class StepsFirst(Accumulating):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            # As if the group had begun three batches before.
            super().training_step(batch, batch_idx + 3)

    run = train(tmp_path, StepsFirst, samples=4 * 48, max_epochs=2)

    assert sum(sizes(run)) == 96


@pytest.mark.parametrize("batches", [4, 7, 11, 16])
def test_a_short_epoch_ends_before_the_rhythm_is_known_and_loses_none(tmp_path: Path, batches: int) -> None:
    class StepsFirst(Accumulating):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx + 3)

    run = train(tmp_path, StepsFirst, samples=4 * batches, max_epochs=2)

    assert sum(sizes(run)) == 2 * batches


def test_a_step_that_is_left_out_now_and_then_is_no_accumulation(tmp_path: Path) -> None:
    class Careful(Accumulating):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(TinyClassifier.training_step(self, batch, batch_idx))
            if 0 not in batch[2] and 50 not in batch[2]:
                optimizer.step()

    run = train(tmp_path, Careful, samples=96)

    assert run.report(0)["version"] == 22
    assert "left over" not in run.output


class AccumulatingOnASchedule(Accumulating):
    """Steps a schedule with each step of the optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        # An epoch that is gone on with has no start.
        self.seen = self.seen or [[]]
        super().training_step(batch, batch_idx)
        if (batch_idx + 1) % self.every == 0:
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters())
        return [optimizer], [OneCycleLR(optimizer, max_lr=0.01, total_steps=8)]

    def facts(self) -> dict[str, Any]:
        return {"last": self.lr_schedulers().last_epoch}


def test_a_run_that_is_resumed_in_mid_epoch_goes_on_with_whole_groups_and_its_schedule(tmp_path: Path) -> None:
    samples, groups, path = 4 * 4 * 24, 24, tmp_path / "mid.ckpt"

    def first(folder: Path) -> None:
        class Saving(AccumulatingOnASchedule):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                # Rank 0 writes.
                if self.trainer.global_step >= 3 and not path.exists():
                    self.trainer.save_checkpoint(path)

        strategy = AsyncAMSGradStrategy(start_method="fork")
        strategy.observers.append(History())
        trainer = fork_trainer(folder, RANKS, strategy)
        trainer.fit(Saving(), loader(samples))

    (tmp_path / "first").mkdir()
    begun = launch(first, tmp_path / "first")
    assert begun.returncode == 0, begun.output
    saved = torch.load(path)["async_amsgrad"]
    bounds = saved["applied"]
    applied = [n for start, stop in zip(bounds[::2], bounds[1::2], strict=True) for n in range(start, stop)]
    (tmp_path / "second").mkdir()

    run = train(tmp_path / "second", AccumulatingOnASchedule, samples=samples, ckpt_path=path)

    updates = run.report(0)["updates"]
    trained = [ticket for update in updates for ticket in update["tickets"]]
    assert len(applied) == 4 * saved["version"] < 4 * groups
    assert sorted(applied + trained) == [*range(4 * groups)]
    assert {len(update["tickets"]) for update in updates} == {4}
    steps = groups // RANKS
    assert [rank["step"] for rank in run.reports()] == [steps] * RANKS
    # Calls that other ranks had made since their last push are in no checkpoint.
    (last,) = {rank["last"] for rank in run.reports()}
    assert last in (steps - 1, steps)


# --- what is counted as a step ---------------------------------------------------------------------------------------


class TwoNets(TinyClassifier):
    """Two optimizers that step in every batch; reports what was trained on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(sleep_s=(0.001, 0.002, 0.004))
        self.automatic_optimization = False
        self.other = nn.Linear(6, 2)
        self.folder = folder

    def step(self, optimizer: Any, net: nn.Module, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
        optimizer.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.step(first, self.net, batch)
        self.step(second, self.other, batch)
        self.seen[-1] += batch[2].tolist()

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.net.parameters()), AMSGrad(self.other.parameters())

    def on_fit_end(self) -> None:
        report(
            self.folder,
            self.global_rank,
            step=self.trainer.global_step,
            seen=[index for epoch in self.seen for index in epoch],
        )


class CountsOne(TwoNets):
    """Lightning #17958: only the first optimizer's steps are to be counted."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        _, second = self.optimizers()
        second._on_before_step = lambda: self.trainer.profiler.start("optimizer_step")
        second._on_after_step = lambda: self.trainer.profiler.stop("optimizer_step")
        super().training_step(batch, batch_idx)


class CountsItself(TwoNets):
    """Raw optimizers, whose steps Lightning does not count, and a count that user code raises."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers(use_pl_optimizer=False)
        self.step(first, self.net, batch)
        self.step(second, self.other, batch)
        self.seen[-1] += batch[2].tolist()
        trainer: Any = self.trainer
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1


@pytest.mark.compatibility(
    "Loop",
    "max_steps under manual optimization",
    note="Steps are counted as Lightning counts them: of all optimizers, except where user code replaces "
    "`_on_before_step` and `_on_after_step` or raises the count itself.",
)
@pytest.mark.parametrize(
    ("kind", "max_steps", "steps", "batches"),
    [(TwoNets, 5, 6, 3), (TwoNets, 8, 8, 4), (CountsOne, 5, 5, 5), (CountsItself, 5, 5, 5), (CountsOne, 20, 20, 20)],
)
def test_a_fit_ends_after_the_steps_that_lightning_counts(
    tmp_path: Path, kind: type[TwoNets], max_steps: int, steps: int, batches: int
) -> None:
    def script(folder: Path) -> None:
        for name in ("ddp", "async"):
            (folder / name).mkdir()
            strategy = (
                AsyncAMSGradStrategy(start_method="fork") if name == "async" else "ddp_fork_find_unused_parameters_true"
            )
            trainer = fork_trainer(folder, RANKS, strategy, max_epochs=-1, max_steps=max_steps)
            trainer.fit(kind(folder / name), loader(4 * RANKS * 12))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    for name in ("ddp", "async"):
        ranks = [torch.load(tmp_path / name / f"rank{rank}.pt") for rank in range(RANKS)]
        assert [rank["step"] for rank in ranks] == [steps] * RANKS
        assert sum(len(rank["seen"]) for rank in ranks) == 4 * batches * RANKS


# --- schedules -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_saved_after_fit_keeps_the_counts_of_user_code(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, 1, "async_amsgrad")

        class SavesAtTheEnd(CountsOne):
            def on_train_epoch_end(self) -> None:
                self.trainer.save_checkpoint(folder / "within.ckpt")

        trainer.fit(SavesAtTheEnd(folder), loader(32))
        trainer.save_checkpoint(folder / "after.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    within, after = (torch.load(tmp_path / f"{when}.ckpt")["async_amsgrad"] for when in ("within", "after"))
    # Two optimizers step in each of eight batches, and one of them counts.
    assert (after["version"], after["counts"][0]) == (16, 8)
    assert after == {name: within[name] for name in after}
    assert within.keys() - after.keys() == {"epoch", "order", "clock", "applied", "policy"}


class OneCycle(Reporting):
    """Steps a schedule of a fixed length in every batch."""

    def __init__(self, own_attribute: bool) -> None:
        super().__init__()
        self.automatic_optimization = own_attribute
        self.own_attribute = own_attribute

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.own_attribute:
            self.schedule.step()
            return loss
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters())
        self.schedule = OneCycleLR(optimizer, max_lr=0.01, total_steps=int(self.trainer.estimated_stepping_batches))
        return optimizer if self.own_attribute else ([optimizer], [self.schedule])

    def facts(self) -> dict[str, Any]:
        return {"last": self.schedule.last_epoch, "kind": type(self.schedule).__name__}


@pytest.mark.parametrize("own_attribute", [False, True], ids=["manual", "automatic, in the module's own hands"])
def test_a_schedule_that_is_stepped_by_hand_ends_where_it_ends_under_ddp(tmp_path: Path, own_attribute: bool) -> None:
    run = train(tmp_path, lambda: OneCycle(own_attribute), max_epochs=2)

    ranks = run.reports()
    assert [(rank["last"], rank["kind"]) for rank in ranks] == [(16, "OneCycleLR")] * RANKS
    assert len({rank["lrs"][0][0] for rank in ranks}) == 1
    assert ranks[0]["lrs"][0][0] < 1e-3


# --- graphs from before a step ---------------------------------------------------------------------------------------


class DCGAN(SmallGAN):
    """Keeps the generated batch from before the discriminator's step, as PyTorch's tutorial does."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        self.batches += 1
        fake = self.generator(torch.full((len(batch[0]), 3), float(batch_idx + 1)))
        discriminator.zero_grad()
        self.manual_backward(self.verdict(batch[0], real=True) + self.verdict(fake.detach(), real=False))
        discriminator.step()
        generator.zero_grad()
        self.manual_backward(self.verdict(fake, real=True))
        generator.step()

    def configure_optimizers(self) -> Any:
        return [AMSGrad(net.parameters(), lr=1e-2) for net in (self.generator, self.discriminator)]

    def on_train_end(self) -> None:
        """Reports nothing."""


ROW = "a graph from before another optimizer's step (DCGAN)"


def test_one_rank_keeps_the_parameters_that_an_optimizer_did_not_step(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        torch.manual_seed(1)
        ours, plain = DCGAN(), DCGAN()
        plain.load_state_dict(ours.state_dict())
        for strategy, module in (("auto", plain), ("async_amsgrad", ours)):
            fork_trainer(folder, 1, strategy, use_distributed_sampler=False).fit(module, loader())
        torch.save([ours.state_dict(), plain.state_dict()], folder / "states.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ours, plain = torch.load(tmp_path / "states.pt")
    torch.testing.assert_close(ours, plain)


@pytest.mark.compatibility(
    "Refused",
    ROW,
    "refused",
    "Each step refreshes all parameters, which other ranks have moved. Compute the generated batch once more after the "
    "discriminator's step. With one rank it works as in plain PyTorch.",
)
def test_several_ranks_are_told_what_to_compute_again(tmp_path: Path) -> None:
    run = launch(lambda folder: fork_trainer(folder, 2).fit(DCGAN(), loader()), tmp_path)

    assert run.returncode != 0
    assert "computed through a graph from before an optimizer's step" in run.output
    assert "`fake = self.generator(z)` once more" in run.output
