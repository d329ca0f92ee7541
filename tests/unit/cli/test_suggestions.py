"""A misspelt option, command or key is told with what was meant; a file of another command with that command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_async.cli.app import main
from lightning_async.cli.suggestions import did_you_mean
from tests.refusals import refused_in_one_line

RECIPES = Path(__file__).parents[3] / "recipes"
RECIPE = str(RECIPES / "lenet5_digits.yaml")
COMPARISON = str(RECIPES / "compare_strategies.yaml")


@pytest.fixture(autouse=True)
def no_arguments_of_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-async"])
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)


@pytest.mark.parametrize("word", ["horovod", "", "x"])
def test_nothing_is_suggested_that_is_not_close(word: str) -> None:
    assert did_you_mean(word, ["ddp", "async", "fsdp"]) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--config", RECIPE, "--trainer.max_epoch=1"], "; did you mean --trainer.max_epochs?"),
        (["fit", "--config", RECIPE, "--trainer.max_epoch", "1"], "; did you mean --trainer.max_epochs?"),
        (["fit", "--confg", RECIPE], "; did you mean --config?"),
        (["fitt"], "did you mean fit?"),
        ([], "a command is missing: one of fit, validate, test, predict, compare, report"),
        (["compare", "--dryrun"], "; did you mean --dry_run?"),
        (["compare", "--config", RECIPE], f"`lightning-async fit --config {RECIPE}` trains it"),
        (["compare", f"-c={RECIPE}"], f"with `recipe: {RECIPE}`, `out`, and `variants` or `grid`"),
        (["fit", "--config", COMPARISON], f"lightning-async compare --config {COMPARISON}"),
        (["fit", f"--config={COMPARISON}"], "is a comparison, of several runs"),
    ],
)
def test_what_was_meant_is_told_in_one_line_with_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused_in_one_line(arguments, capsys)


def test_a_misspelt_key_of_a_file_is_told_with_what_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "typo.yaml").write_text("trainer:\n  max_epoch: 3\n")

    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "typo.yaml")])

    assert "did you mean trainer.max_epochs?" in capsys.readouterr().err


@pytest.mark.parametrize("spelt", ["1", "true", "yes"])
def test_any_spelling_of_yes_asks_for_tracebacks(spelt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", spelt)

    with pytest.raises(Exception, match=r"unrecognized arguments: --trainer.max_epoch=1"):
        main(["fit", "--config", RECIPE, "--trainer.max_epoch=1"])
