"""Claims about `lightning-async compare` itself, without any training."""

import json
from pathlib import Path

import pytest

from lightning_async.cli.compare import compare_main
from lightning_async.cli.compare.command import compare_parser, read_comparison
from lightning_async.cli.compare.plan import digest, plan_runs

RECIPE = str(Path(__file__).parents[3] / "recipes" / "lenet5_digits.yaml")
# As `compare` wrote it before a run's record had a format.
OLD_RECORD = {"finished": True, "strategy": "DDPStrategy", "ranks": 2, "max_epochs": 3, "points": [], "stats": None}


@pytest.mark.parametrize("options", [[], ["--draw_only"]])
def test_a_finished_run_with_an_old_record_is_refused_in_one_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", RECIPE, "--out", str(tmp_path), "--variants=[{name: a}]"]
    comparison = read_comparison(compare_parser().parse_args(arguments))
    (run,) = plan_runs(comparison)
    status = {"digest": digest(Path(RECIPE).read_text(), run, comparison.environment), "status": 0}
    folder = tmp_path / run.folder
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(status))
    (folder / "record.json").write_text(json.dumps(OLD_RECORD))

    with pytest.raises(SystemExit) as exit_info:
        compare_main([*arguments, *options])

    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.startswith(f"error: {folder / 'record.json'} is not a record of a run")
    assert "format version 4. Train the run anew. `--fresh` does that" in message
    assert len(message.splitlines()) == 1
    # Nothing was run, and nothing is lost.
    assert json.loads((folder / "record.json").read_text()) == OLD_RECORD
