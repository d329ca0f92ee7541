"""What the strategy cannot do it refuses, and says what to do instead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.launch import launch
from tests.models import TinyClassifier, fork_trainer, loader


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        *[
            ({"max_staleness": value}, ["max_staleness", "at least 0", '"auto"', "None", repr(value)])
            for value in (-1, True, "x", 1.5)
        ],
        *[({"on_stale": value}, ["on_stale", "'wait'", "'drop'", repr(value)]) for value in ("skip", None)],
        ({"batches": "equal"}, ["batches", "'shared'", "'sharded'", "'equal'"]),
        ({"wire_dtype": "int4"}, ["wire_dtype", "'bf16'", "'fp16'", "'int8'", "'int4'"]),
        ({"parameter_wire_dtype": None}, ["parameter_wire_dtype", "'bf16'", "None"]),
        ({"overlap": "yes"}, ["overlap", "True", "'yes'"]),
        ({"transport": "pigeon"}, ["transport", "'auto'", "'tcp'", "'pigeon'"]),
        *[
            ({"worker_timeout": value}, ["worker_timeout", "positive number of seconds", repr(value)])
            for value in (0, -1.0, True, "60", None, math.nan)
        ],
    ],
    ids=str,
)
def test_an_argument_without_a_meaning_is_refused_with_those_that_have_one(
    arguments: dict[str, Any], advice: list[str]
) -> None:
    with pytest.raises(MisconfigurationException) as error:
        AsyncAMSGradStrategy(**arguments)

    assert [words for words in advice if words not in str(error.value)] == []


@pytest.mark.compatibility(
    "Refused",
    "`sync_batchnorm=True`",
    "refused",
    "It is a collective in each forward. Leave it out: buffers are averaged at each stop.",
)
def test_synchronised_batch_norm_is_refused_before_anything_is_launched(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r'sync_batchnorm=True.* Leave it out .*strategy="ddp"'):
        fork_trainer(tmp_path, 2, sync_batchnorm=True)


def refusal(folder: Path, module: LightningModule, data: Any = None, **arguments: Any) -> str:
    """The message with which a fit of one rank, in a process of its own, is refused."""

    def script(folder: Path) -> None:
        # Lightning warns of some of this input before it is refused.
        warnings.simplefilter("ignore")
        trainer = fork_trainer(folder, 1, "async_amsgrad", **arguments)
        try:
            trainer.fit(module, loader() if data is None else data)
        except MisconfigurationException as error:
            (folder / "refusal.txt").write_text(str(error))

    run = launch(script, folder)
    assert run.returncode == 0, run.output
    assert (folder / "refusal.txt").exists(), "the fit was not refused"
    return (folder / "refusal.txt").read_text()


class WithOptimizers(TinyClassifier):
    def __init__(self, make_optimizers: Callable[[TinyClassifier], Any]) -> None:
        super().__init__()
        self.make_optimizers = make_optimizers

    def configure_optimizers(self) -> Any:
        return self.make_optimizers(self)


RETURN_THIS = (
    "Return lightning_async.AMSGrad(...) or torch.optim.Adam(..., amsgrad=True) from configure_optimizers, "
    'or use strategy="async", which takes other optimizers too, or strategy="ddp".'
)


@pytest.mark.compatibility(
    "Refused",
    "optimizers other than Adam, AdamW and AMSGrad; LBFGS",
    "refused",
    "The holder's update is AMSGrad; LBFGS re-evaluates its closure. "
    "Return `lightning_async.AMSGrad` or `torch.optim.Adam(..., amsgrad=True)`.",
)
@pytest.mark.parametrize(
    ("make_optimizers", "problem", "advice"),
    [
        (lambda module: torch.optim.SGD(module.parameters(), lr=0.1), "SGD, which is not AMSGrad", RETURN_THIS),
        (lambda module: torch.optim.LBFGS(module.parameters()), "LBFGS, which re-evaluates its closure", RETURN_THIS),
        (
            lambda module: torch.optim.Adam(module.parameters(), amsgrad=True, capturable=True),
            "capturable=True",
            "Leave capturable out",
        ),
        (lambda module: None, "needs an optimizer", "Return lightning_async.AMSGrad(...) from configure_optimizers."),
    ],
    ids=["SGD", "LBFGS", "capturable", "none"],
)
def test_another_optimizer_is_refused(
    tmp_path: Path, make_optimizers: Callable[[TinyClassifier], Any], problem: str, advice: str
) -> None:
    message = refusal(tmp_path, WithOptimizers(make_optimizers))

    assert problem in message
    assert advice in message


class Manual(WithOptimizers):
    """Two optimizers, stepped by hand."""

    def __init__(self, make_optimizers: Callable[[TinyClassifier], Any], one_after_the_other: bool) -> None:
        super().__init__(make_optimizers)
        self.automatic_optimization = False
        self.one_after_the_other = one_after_the_other

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        first.step()
        if self.one_after_the_other:
            first.zero_grad()
            self.manual_backward(self.loss(batch))
        second.step()
        second.zero_grad()


def one_each(module: TinyClassifier) -> list[torch.optim.Optimizer]:
    return [AMSGrad(module.net[0].parameters()), AMSGrad(module.net[2].parameters())]


@pytest.mark.compatibility(
    "Refused",
    "several backward passes before several optimizers step",
    "refused",
    "Each step refreshes all parameters, so the others' gradients would be older than they say. "
    "Call `manual_backward` and `step` for one optimizer after the other.",
)
def test_a_gradient_from_before_another_optimizers_step_is_refused(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        fork_trainer(folder, 2).fit(Manual(one_each, one_after_the_other=False), loader())

    run = launch(script, tmp_path)

    assert run.returncode != 0
    message = run.output
    assert "optimizer 1 steps on a gradient from before another optimizer's step" in message
    assert "call manual_backward and step for one optimizer after the other" in message


def test_two_optimizers_one_after_the_other_are_trained(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, 2)
        trainer.fit(Manual(one_each, one_after_the_other=True), loader())
        torch.save(trainer.strategy.stats.updates, folder / "updates.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert torch.load(tmp_path / "updates.pt") == 2 * 16


@pytest.mark.compatibility(
    "Refused",
    "a parameter in two optimizers",
    "refused",
    "The holder keeps one state for each parameter. Give each parameter to one optimizer.",
)
def test_a_parameter_of_two_optimizers_is_refused(tmp_path: Path) -> None:
    def shared(module: TinyClassifier) -> list[torch.optim.Optimizer]:
        return [AMSGrad(module.parameters()), AMSGrad(module.net[0].parameters())]

    message = refusal(tmp_path, Manual(shared, one_after_the_other=True))

    assert "two optimizers share a parameter" in message
    assert "give each parameter to one optimizer" in message


@pytest.mark.compatibility(
    "Refused",
    "complex parameters",
    "refused",
    "The holder's buffer is of a real dtype. Keep real and imaginary part as two parameters.",
)
def test_parameters_that_are_not_real_numbers_are_refused(tmp_path: Path) -> None:
    class Complex(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))

    message = refusal(tmp_path, Complex())

    assert "phase is trained and of torch.complex64" in message


@pytest.mark.compatibility(
    "Refused",
    "`training_step(dataloader_iter)`",
    "refused",
    "Batches are handed out one by one. Take `batch` (and `batch_idx`).",
)
def test_a_step_that_takes_the_loaders_iterator_is_refused(tmp_path: Path) -> None:
    class TakesIterator(TinyClassifier):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
            return self.loss(next(dataloader_iter)[0])

    message = refusal(tmp_path, TakesIterator())

    assert "`dataloader_iter`" in message
    assert "Take `batch` (and `batch_idx`) instead" in message


@pytest.mark.parametrize("fails", [True, False])
def test_a_fit_that_fails_before_its_first_batch_leaves_no_empty_folder(tmp_path: Path, fails: bool) -> None:
    def script(folder: Path) -> None:
        optimizer = torch.optim.SGD if fails else AMSGrad
        module = WithOptimizers(lambda module: optimizer(module.parameters(), lr=0.1))
        logger = CSVLogger(folder / "runs", name="digits")
        fork_trainer(folder, 2, logger=logger).fit(module, loader())

    run = launch(script, tmp_path)

    assert (run.returncode != 0) == fails
    assert (tmp_path / "runs").exists() != fails


def test_a_refusal_ends_all_ranks_soon_and_is_told_once(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        module = WithOptimizers(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        fork_trainer(folder, 3).fit(module, loader())

    run = launch(script, tmp_path)

    assert run.returncode != 0
    assert RETURN_THIS in run.output
