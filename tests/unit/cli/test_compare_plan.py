"""Claims about what a comparison consists of: variants, arguments, digests, folders."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from lightning_async.cli.compare.command import compare_parser, fit_command, read_comparison
from lightning_async.cli.compare.config import Arguments, Comparison, Plot, Sweep, Variant
from lightning_async.cli.compare.plan import PlannedRun, argument_list, digest, plan_runs, plan_variants

words = st.text("abcxyz", min_size=1, max_size=4)
numbers = st.one_of(st.integers(0, 500), st.floats(0.125, 8.0, width=16))
axes = st.one_of(
    st.builds(Sweep, words, st.lists(numbers, min_size=1, max_size=4, unique_by=(str, float))),
    st.lists(
        st.builds(Variant, st.one_of(words, numbers), st.builds(Arguments, st.dictionaries(words, st.integers()))),
        min_size=1,
        max_size=4,
        unique_by=(lambda variant: str(variant.name), lambda variant: variant.name),
    ),
)
grids = st.dictionaries(words, axes, min_size=1, max_size=3)


@contextmanager
def words_of_different_axes_may_make_one_name() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "names that differ" in str(error):
            reject()
        raise


def comparison(**fields: Any) -> Comparison:
    return Comparison("recipe.yaml", "out", **fields)


@given(grid=grids, seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
def test_every_combination_is_run_once_with_every_seed(grid: dict[str, Any], seeds: list[int]) -> None:
    compared = comparison(grid=grid, seeds=seeds)
    with words_of_different_axes_may_make_one_name():
        runs = plan_runs(compared)

    expected = len(seeds)
    for axis in compared.axes().values():
        expected *= len(axis)
    assert len(runs) == expected
    assert len({(tuple(run.variant.labels.items()), run.seed) for run in runs}) == expected
    assert len({run.folder for run in runs}) == expected
    # Whole rounds: with the first seed all variants have been run.
    assert [run.seed for run in runs] == sorted((run.seed for run in runs), key=seeds.index)


@given(common=st.dictionaries(words, st.integers()), grid=grids)
def test_an_argument_has_the_value_of_the_last_that_names_it(common: dict[str, int], grid: dict[str, Any]) -> None:
    compared = comparison(common=Arguments(common), grid=grid)
    with words_of_different_axes_may_make_one_name():
        variants = plan_variants(compared)

    for variant in variants:
        expected: dict[str, Any] = dict(common)
        for axis, members in compared.axes().items():
            member = next(member for member in members if member.name == variant.labels[axis])
            expected.update(member.arguments)
        assert dict(variant.arguments) == expected


def test_the_arguments_of_a_class_stay_behind_its_class_path() -> None:
    variants = plan_variants(
        comparison(
            common=Arguments({"strategy.init_args.delay": 1, "strategy": "a"}),
            grid={"s": [Variant("b", Arguments({"strategy": "B", "strategy.init_args.delay": 2}))]},
        )
    )

    assert list(variants[0].arguments.items()) == [("strategy", "B"), ("strategy.init_args.delay", 2)]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("ddp", "--k=ddp"),
        (3, "--k=3"),
        (1e-4, "--k=0.0001"),
        (None, "--k=null"),
        (False, "--k=false"),
        ({"class_path": "a.B", "init_args": {"x": [1, 2]}}, '--k={"class_path": "a.B", "init_args": {"x": [1, 2]}}'),
    ],
)
def test_a_value_is_written_as_the_command_line_reads_it(value: Any, written: str) -> None:
    assert argument_list({"k": value}) == [written]


@given(arguments=st.dictionaries(words, st.one_of(st.integers(), words)), changed=words, value=st.integers())
def test_a_digest_changes_with_anything_that_goes_into_a_run(
    arguments: dict[str, Any], changed: str, value: int
) -> None:
    run = plan_runs(comparison(variants=[Variant("v", Arguments(arguments))]))[0]
    other = replace(run, variant=replace(run.variant, arguments={**arguments, changed: value}))
    of = digest("text", run, {"A": "1"})

    assert of == digest("text", run, {"A": "1"})
    assert (of == digest("text", other, {"A": "1"})) == (argument_list(run.arguments) == argument_list(other.arguments))
    assert of != digest("texts", run, {"A": "1"})
    assert of != digest("text", replace(run, seed=1), {"A": "1"})
    assert of != digest("text", run, {"A": "2"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "nothing to compare"),
        ({"grid": {"a": []}}, "no variants"),
        ({"grid": {"a": Sweep("x", [1, 1])}}, "a name twice"),
        ({"grid": {"a": Sweep("x", [1, 1.0])}}, "a name twice"),
        ({"variants": [Variant("a b"), Variant("a-b")]}, "differ in letters"),
        ({"variants": [Variant("a")], "seeds": []}, "seeds"),
        ({"variants": [Variant("a")], "seeds": [1, 1]}, "seeds"),
        ({"variants": [Variant("a")], "parallel": 0}, "parallel"),
        ({"variants": [Variant("a")], "timeout_s": 0.0}, "timeout_s"),
        ({"variants": [Variant("a")], "baseline": "b"}, "the variants are ['a']"),
        ({"variants": [Variant("a")], "grid": {"variant": Sweep("x", [1])}}, "cannot be called"),
        ({"variants": [Variant("a")], "plots": [Plot("final")]}, "needs `against`"),
        ({"variants": [Variant("a")], "plots": [Plot("final", "variant")]}, "are not numbers"),
        ({"variants": [Variant("a")], "plots": [Plot("curves", "delay")]}, "there are ['variant']"),
        ({"grid": {"a": Sweep("x", [1])}, "plots": [Plot("final", "a", "a")]}, "separate pictures"),
    ],
)
def test_what_cannot_be_run_or_drawn_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_variants(comparison(**fields))


def test_a_file_says_all_that_a_comparison_has(tmp_path: Path) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text(
        'recipe: r.yaml\nout: out\ncommon: {trainer.max_epochs: 2}\nseeds: [1, 2]\nbaseline: "SGD, delay 0"\n'
        "grid:\n"
        "  optimizer:\n"
        "  - name: SGD\n"
        "    arguments:\n"
        "      trainer.strategy: {class_path: lightning_async.AsyncAMSGradStrategy, init_args: {max_staleness: 3}}\n"
        "  - {name: Adam}\n"
        "  delay: {argument: trainer.delay, values: [0, 5, 0.5]}\n"
        "plots: [{kind: final, against: delay}]\n"
    )

    compared = read_comparison(compare_parser().parse_args(["--config", str(config), "--seeds=[7]"]))

    runs = plan_runs(compared)
    assert [run.variant.name for run in runs][:4] == ["SGD, delay 0", "SGD, delay 5", "SGD, delay 0.5", "Adam, delay 0"]
    # As written: the class is the run's to complete.
    assert runs[0].arguments == {
        "trainer.max_epochs": 2,
        "trainer.strategy": {"class_path": "lightning_async.AsyncAMSGradStrategy", "init_args": {"max_staleness": 3}},
        "trainer.delay": 0,
        "seed_everything": 7,
    }
    assert compared.plots == [Plot("final", "delay")]


def test_a_runs_own_arguments_replace_those_that_compare_adds() -> None:
    compared = comparison(variants=[Variant("a", Arguments({"trainer.logger": False, "trainer.callbacks+": "x.Y"}))])
    run: PlannedRun = plan_runs(compared)[0]

    command = fit_command(compared, run, Path("folder"))

    loggers = [word for word in command if word.startswith("--trainer.logger")]
    callbacks = [word for word in command if word.startswith("--trainer.callbacks+=")]
    assert command[:3] == ["fit", "--config", "recipe.yaml"]
    assert loggers == ["--trainer.logger=false"]
    assert callbacks[0] == "--trainer.callbacks+=x.Y"
    assert json.loads(callbacks[1].partition("=")[2])["init_args"] == {"path": "folder/record.json"}


CONFIGS = sorted((Path(__file__).parents[3] / "recipes").glob("compare_*.yaml"))


def test_there_are_configs_to_compare() -> None:
    assert {path.stem for path in CONFIGS} >= {"compare_strategies", "compare_delay", "compare_workers"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_comparison_parses_and_names_a_recipe_that_exists(config: Path) -> None:
    compared = read_comparison(compare_parser().parse_args(["--config", str(config)]))

    assert len(plan_runs(compared)) > 1
    assert (config.parents[1] / compared.recipe).exists()
