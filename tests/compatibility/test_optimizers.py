"""Optimizers that user code holds: replaced in mid-run, with hooks and methods, groups and gradients of many kinds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_async import AMSGrad, AsyncAMSGradStrategy, AsyncStrategy
from tests.compatibility.runs import RANKS, UNEVEN, History, Reporting, fail, train
from tests.elsewhere import ScheduleFreeSGD
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader


class Switching(Reporting):
    """Goes on with other optimizers: a new one, one of configure_optimizers with a scheduler, and the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = 0
        self.first: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters(), lr=10.0**-self.phase)
        if self.phase == 2:
            return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]
        return optimizer

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.phase = self.current_epoch
        strategy: Any = self.trainer.strategy
        if self.current_epoch == 1:
            self.first = self.trainer.optimizers[0]
            strategy.optimizers = [torch.optim.Adam(self.parameters(), lr=0.1, amsgrad=True)]
        elif self.current_epoch == 2:
            strategy.setup_optimizers(self.trainer)
        elif self.current_epoch == 3:
            self.trainer.optimizers = [self.first]
            strategy.lr_scheduler_configs = []

    def facts(self) -> dict[str, Any]:
        optimizer = self.trainer.optimizers[0]
        return {"identity": optimizer is self.first, "steps": int(optimizer.state[self.net[0].weight]["step"])}


@pytest.mark.compatibility(
    "Optimization",
    "optimizers replaced in mid-run: `trainer.optimizers = [...]`, `strategy.setup_optimizers(trainer)`",
    note="In hooks where the ranks meet, in force from the next batch, with the state that the new one has. Between "
    "two batches it is refused.",
)
@pytest.mark.parametrize("holder", ["thread", "process"])
def test_a_replaced_optimizer_is_in_force_with_its_own_state(tmp_path: Path, holder: Any) -> None:
    run = train(tmp_path, Switching, {"holder": holder}, max_epochs=4)

    first = run.report(0)
    rates = [update["lrs"][0] for update in first["updates"]]
    assert (first["version"], first["step"]) == (96, 32)
    assert rates[:48] == [1.0] * 24 + [0.1] * 24
    assert set(rates[48:72]) == {0.01, 0.005}
    assert rates[72:] == [1.0] * 24
    for rank in run.reports():
        # Its state is what it had when it was replaced.
        assert (rank["identity"], rank["steps"]) == (True, 48)


REPLACED = "optimizers replaced on one rank only, or between two batches"


@pytest.mark.compatibility("Refused", REPLACED, "refused", "Replace them on every rank, where the ranks meet.")
def test_an_optimizer_that_one_rank_replaces_is_refused(tmp_path: Path) -> None:
    class OneRank(TinyClassifier):
        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            if self.current_epoch == 1 and self.global_rank == 1:
                self.trainer.strategy.optimizers = [AMSGrad(self.parameters())]

    output = fail(tmp_path, OneRank(UNEVEN))

    assert "rank 1 now has the optimizers AMSGrad (parameters per group: 4; new), and rank 0 AMSGrad" in output


@pytest.mark.compatibility("Refused", REPLACED, "refused", "Replace them on every rank, where the ranks meet.")
def test_optimizers_are_not_replaced_between_two_batches(tmp_path: Path) -> None:
    class InTheMiddle(TinyClassifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers = [AMSGrad(self.parameters())]

    output = fail(tmp_path, InTheMiddle(UNEVEN))

    assert "the optimizers were replaced between two batches" in output
    assert "on_train_epoch_start" in output


class Hooked(Reporting):
    """Counts its steps by hooks, of this optimizer and of all; one changes what is pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"pre": 0, "post": 0, "any": 0}
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(self.fill)
        optimizer.register_step_post_hook(lambda *arguments: self.count("post"))
        register_optimizer_step_post_hook(lambda *arguments: self.count("any"))
        return optimizer

    def count(self, kind: str) -> None:
        self.calls[kind] += 1

    def fill(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.count("pre")
        for parameter in self.parameters():
            parameter.grad.fill_(3.0)  # type: ignore[union-attr]

    def facts(self) -> dict[str, Any]:
        return {"calls": self.calls}


HOOKS = "`register_step_pre_hook`, `register_step_post_hook`, and those for all optimizers"
HOOKS_NOTE = (
    "Called on the rank that steps, around its push. One that changes parameters is refused: the next ones that come "
    "from the holder would overwrite the change. Put it in the optimizer's `step`, or use a parametrization."
)


@pytest.mark.compatibility("Optimization", HOOKS, "differs", HOOKS_NOTE)
def test_hooks_of_a_step_are_called_around_the_push(tmp_path: Path) -> None:
    run = train(tmp_path, Hooked)

    for rank in run.reports():
        assert rank["calls"] == dict.fromkeys(("pre", "post", "any"), rank["batches"])
    for update in run.report(0)["updates"]:
        assert all((gradient == 3.0).all() for gradient in update["gradients"])


class Clipping(TinyClassifier):
    """Clips its weights after each step, past autograd's eyes."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(self.clip)
        return optimizer

    def clip(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.1, 0.1)


@pytest.mark.compatibility("Optimization", HOOKS, "differs", HOOKS_NOTE)
def test_a_hook_that_changes_parameters_at_each_step_is_refused(tmp_path: Path) -> None:
    output = fail(tmp_path, Clipping(UNEVEN))

    assert "Clipping.clip, registered by register_step_post_hook, changes the parameters of AMSGrad" in output
    assert "a subclass whose step does it" in output


def test_with_one_rank_such_a_hook_works_as_it_does_without(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        ends = []
        for strategy in ("async_amsgrad", "auto"):
            torch.manual_seed(1)
            module = Clipping()
            # The order of the data, which is shuffled else.
            fork_trainer(folder, 1, strategy, use_distributed_sampler=False).fit(module, loader(32))
            ends.append(module.flat_parameters())
        assert ends[0].abs().max() <= 0.1
        torch.testing.assert_close(*ends)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output


class ScheduleFree(Reporting):
    """Validated at the average, trained between it and the iterate, as schedule-free optimizers ask."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = {name: value.clone() for name, value in self.state_dict().items()}
        self.validated: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        return ScheduleFreeSGD(self.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.trainer.optimizers[0].train()  # type: ignore[attr-defined]

    def on_validation_epoch_start(self) -> None:
        self.trainer.optimizers[0].eval()  # type: ignore[attr-defined]
        self.validated.append(self.flat_parameters())

    def on_validation_epoch_end(self) -> None:
        self.trainer.optimizers[0].train()  # type: ignore[attr-defined]


class KeepsGradients(Callback):
    """Reports what each rank validated with, and rank 0 the gradients that were applied."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.gradients: list[list[Tensor]] = []
        strategy.observers.append(lambda update, tickets: self._keep(update))

    def _keep(self, update: Any) -> None:
        self.gradients.append([gradient.clone() for gradient in update.push.gradients])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        facts = {"validated": pl_module.validated, "count": group["count"], "begin": pl_module.begin}
        report(Path.cwd(), trainer.global_rank, gradients=self.gradients, **facts)


@pytest.mark.compatibility(
    "Optimization",
    "optimizers with `train()` and `eval()` (schedule-free)",
    note='With `strategy="async"`. Their methods, and any other that reads or writes the state and the parameters, '
    "work where the ranks meet.",
)
@pytest.mark.parametrize("holder", ["thread", "process"])
def test_a_schedule_free_optimizer_is_validated_at_its_average(tmp_path: Path, holder: Any) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncStrategy(start_method="fork", holder=holder)
        callback = KeepsGradients(strategy)
        fork_trainer(folder, RANKS, strategy, max_epochs=2, callbacks=[callback]).fit(
            ScheduleFree(), loader(96), loader(12)
        )

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first = run.report(0)
    for rank in run.reports():
        assert rank["count"] == 48
        assert len(rank["validated"]) == 2
        for mine, rank_0s in zip(rank["validated"], first["validated"], strict=True):
            assert torch.equal(mine, rank_0s)
    if holder == "process":
        return
    module = ScheduleFree()
    module.load_state_dict(first["begin"])
    optimizer: Any = module.configure_optimizers()
    averages = []
    for start in (0, 24):
        optimizer.train()
        for gradients in first["gradients"][start : start + 24]:
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        optimizer.eval()
        averages.append(module.flat_parameters())
    for mine, expected in zip(first["validated"], averages, strict=True):
        torch.testing.assert_close(mine, expected)


class Grouped(Reporting):
    """Has a quantised layer's codes, an empty param group, and a part that it saves by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.arange(12, dtype=torch.uint8), requires_grad=False)
        self.body = nn.Linear(500, 500)
        self.size = 0

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.body.weight.square().mean()

    def configure_optimizers(self) -> Any:
        norms = [parameter for name, parameter in self.named_parameters() if "norm" in name]
        return torch.optim.AdamW([{"params": self.parameters()}, {"params": norms, "weight_decay": 0.0}], amsgrad=True)

    def on_train_epoch_end(self) -> None:
        path = Path.cwd() / f"head{self.global_rank}.pt"
        torch.save(self.net.state_dict(), path)
        self.size = path.stat().st_size
        # What is read is the parameter itself, and what is written there is in force.
        self.net.state_dict()["0.bias"].fill_(5.0)

    def facts(self) -> dict[str, Any]:
        return {"size": self.size}


@pytest.mark.compatibility("Optimization", "an empty param group")
@pytest.mark.compatibility(
    "Optimization", "frozen parameters that are not real numbers (quantised layers)", note="Left out of the exchange."
)
@pytest.mark.compatibility("State", "a part of the module saved by user code (`torch.save(module.head.state_dict())`)")
def test_groups_and_parts_are_as_torch_has_them(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
    arguments: dict[str, Any] = {"callbacks": [checkpoint], "enable_checkpointing": True}

    run = train(tmp_path, Grouped, **arguments, max_epochs=2)

    for rank in run.reports():
        assert rank["version"] == 48
        assert rank["size"] < 5000
        assert rank["parameters"]["codes"].tolist() == list(range(12))
        assert (rank["parameters"]["net.0.bias"] == 5.0).all()
    saved = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt")
    module = Grouped()
    module.load_state_dict(saved["state_dict"])
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(saved["optimizer_states"][0])
    assert module.codes not in optimizer.state
    assert optimizer.state[module.body.weight]["exp_avg"].shape == (500, 500)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"

    def resume(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(start_method="fork")
        strategy.observers.append(History())
        warnings.filterwarnings("ignore", "The dirpath has changed")
        trainer = fork_trainer(folder, RANKS, strategy, max_epochs=2, enable_checkpointing=True)
        trainer.fit(Grouped(), loader(96), ckpt_path=path)

    again = launch(resume, resumed)
    assert again.returncode == 0, again.output
    (last,) = resumed.rglob("*.ckpt")
    states = torch.load(last)["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in states.values()} == {48}


class Sparse(TinyClassifier):
    """Looks its input up in a table with sparse gradients."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.table = nn.Parameter(torch.randn(96, 6))

    def loss(self, batch: Any) -> Tensor:
        found = nn.functional.embedding(batch[2], self.table, sparse=True)
        return super().loss((batch[0] + found, *batch[1:]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.compatibility(
    "Refused", "sparse gradients", "refused", "The error names the parameter: pass sparse=False."
)
def test_a_sparse_gradient_is_refused_by_its_parameters_name(tmp_path: Path) -> None:
    output = fail(tmp_path, Sparse(UNEVEN), AsyncStrategy(start_method="fork"))

    assert "the gradient of table is sparse_coo" in output
    assert "pass sparse=False" in output


class Rotated(TinyClassifier):
    """Trains a complex parameter."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rotation = nn.Parameter(torch.ones(2, dtype=torch.complex64))


@pytest.mark.compatibility(
    "Refused",
    "complex parameters that are trained",
    "refused",
    "Keep a real one and take torch.view_as_complex of it.",
)
def test_a_trained_complex_parameter_is_refused_by_name(tmp_path: Path) -> None:
    output = fail(tmp_path, Rotated(UNEVEN))

    assert "rotation is trained and of torch.complex64" in output
    assert "view_as_complex" in output
