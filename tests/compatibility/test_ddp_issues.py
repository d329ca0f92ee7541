"""What people report of DDP does not happen here: the tests that docs/ddp-issues.md names beside those of other files.

Each test is the report's own situation. Under DDP most of them wait for ever.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tests.compatibility.runs import RANKS, Reporting, train
from tests.compatibility.test_data import Hand, Noting, Stream, both, by_rank, fit, indices_in
from tests.faults.injector import Fault
from tests.faults.runs import POPEN, explanations, start_script
from tests.faults.train import Run
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, indexed_data, loader

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "ddp-issues.md"


@both
def test_streams_of_unlike_length_are_validated_in_mid_epoch_by_all_ranks(tmp_path: Path, batches: Hand) -> None:
    # Lightning #6798: stalls at the validation for any val_check_interval above one.
    run = fit(tmp_path, lambda _: DataLoader(Stream(8, more=8), 4), loader(6), batches, val_check_interval=2)

    for epoch in range(2):
        for number, rank in enumerate(by_rank(run, epoch)):
            expected = [position * RANKS + number for position in range(8 + 8 * number)]
            assert [index for batch in rank for index in batch[""]] == expected
    assert {rank["version"] for rank in run.reports()} == {2 * (2 + 4 + 6)}
    # After each 2 batches a rank, twice in each epoch of 4.
    assert [len(rank["validated"]) for rank in run.reports()] == [4] * RANKS


class Packed(BatchSampler):
    """Takes samples of unlike size up to a size that fits: as many batches as the order makes, at most thirty."""

    def __iter__(self) -> Iterator[list[int]]:
        packed: list[int] = []
        for index in self.sampler:
            if sum(size_of(each) for each in [*packed, index]) > 20:
                yield packed
                packed = []
            packed.append(index)
        yield packed

    def __len__(self) -> int:
        return 30


def size_of(index: int) -> int:
    return 1 + index % 9


@both
def test_the_number_of_batches_may_vary_from_epoch_to_epoch(tmp_path: Path, batches: Hand) -> None:
    # Lightning #18023 and #20330: ranks that run out wait for ever, or the end of the epoch goes unnoticed.
    def packed(module: Noting) -> Any:
        data = indexed_data(60)
        return DataLoader(data, batch_sampler=Packed(RandomSampler(data), 4, False))

    run = fit(tmp_path, packed, loader(6), batches, max_epochs=4)

    assert [indices_in(run, epoch) for epoch in range(4)] == [list(range(60))] * 4
    counts = [sum(len(rank["trained"][epoch]) for rank in run.reports()) for epoch in range(4)]
    assert len(set(counts)) > 1
    assert {rank["version"] for rank in run.reports()} == {sum(counts)}
    assert [len(rank["validated"]) for rank in run.reports()] == [4] * RANKS


class NothingToLearn(Reporting):
    """Rank 1's loss is a constant in every other batch, for want of anything to find in it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        # Also in its first batch, and it may have no other.
        if self.global_rank == 1 and batch_idx % 2 == 0:
            return torch.tensor([0.0], requires_grad=True)
        return loss


@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_a_loss_of_zero_that_depends_on_no_parameter_holds_nobody_up(tmp_path: Path, batches: str) -> None:
    # Lightning #12190.
    run = train(tmp_path, NothingToLearn, {"batches": batches})

    ranks, updates = run.reports(), run.report(0)["updates"]
    assert sum(rank["batches"] for rank in ranks) == 24
    constant = -(-ranks[1]["batches"] // 2)
    assert ranks[0]["version"] == len(updates) == 24 - constant < 24
    assert sum(update["worker"] == 1 for update in updates) == ranks[1]["batches"] - constant


@pytest.mark.soak
def test_an_error_in_a_script_ranks_validation_ends_the_script_and_names_the_rank(tmp_path: Path) -> None:
    # Lightning #8130, whose first comment has a validation_step that raises on rank 1, with ranks that are scripts.
    run = start_script(Run((Fault(1, 3, "raise", "validation_step"),), ranks=2, strategy=POPEN), tmp_path)

    assert run.returncode != 0
    assert "rank 1 failed: InjectedError: injected into validation_step" in explanations(run.output)


@pytest.mark.parametrize("slow", [0, 2])
def test_the_others_do_not_go_at_the_pace_of_the_slowest(tmp_path: Path, slow: int) -> None:
    # PyTorch #81395: the time of a step is that of the slowest rank.
    def script(folder: Path) -> None:
        class Module(TinyClassifier):
            def on_train_end(self) -> None:
                report(folder, self.global_rank, batches=self.batches, seen=self.seen[0])

        sleep_s = tuple(0.15 if rank == slow else 0.002 for rank in range(RANKS))
        fork_trainer(folder, RANKS).fit(Module(sleep_s), loader(480))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    batches = [rank["batches"] for rank in run.reports()]
    assert sorted(index for rank in run.reports() for index in rank["seen"]) == list(range(480))
    # Under DDP each has a third.
    assert 0 < batches[slow] < 120 / RANKS


def test_every_issue_on_the_page_has_tests_and_every_test_exists() -> None:
    answered, _, wishes = PAGE.read_text().partition("## What is not answered")

    _, *found = answered.split("\n### ")
    assert len(found) >= 12
    for text in found:
        title, _, body = text.partition("\n")
        assert all(f"- {part}:" in body for part in ("Under DDP", "Here", "Test")), title
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", body)
        assert named, f"{title} has no test"
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
    assert wishes.count("](https://github.com/") >= 5, "the page has to say what is not answered"


def test_every_issue_is_linked_under_its_number() -> None:
    links = re.findall(
        r"\[(?:\w+ )?#(\d+)\]\(https://github.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)\)", PAGE.read_text()
    )

    assert len(links) == PAGE.read_text().count("](https://github.com/")
    assert all(shown == linked for shown, _, linked in links)
    assert {repository for _, repository, _ in links} <= {"Lightning-AI/pytorch-lightning", "pytorch/pytorch"}
