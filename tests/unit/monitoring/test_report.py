"""The report is one page that fetches nothing, says what the record says, and refuses what is none."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import lightning_async.monitoring.report
from lightning_async.monitoring.record import RECORD_NAME, RunRecord
from lightning_async.monitoring.report import report_main, write_report
from lightning_async.monitoring.report.page import page
from lightning_async.monitoring.report.plots import _speeds, _staleness_over_time, draw
from lightning_async.monitoring.series import Evaluation, Point

RANKS = 4


def record(**changes: object) -> RunRecord:
    updates = {0: 100, 1: 90, 2: 95, 3: 25}
    values = {
        "strategy": "S",
        "ranks": RANKS,
        "max_epochs": 3,
        "configuration": {
            "strategy": "S",
            "max_staleness": 8,
            "on_stale": "wait",
            "batches": "shared",
            "gradients_per_update": 1,
            "worker_timeout_s": 60.0,
        },
        "stats": {
            "updates": 310,
            "staleness": {0: 10, 3: 250, 8: 50},
            "staleness_by_rank": {rank: {3: own} for rank, own in updates.items()},
            "updates_by_rank": updates,
            "batches_by_rank": updates,
            "wait_seconds_by_rank": dict.fromkeys(range(RANKS), 0.4),
            "parked_seconds_by_rank": dict.fromkeys(range(RANKS), 0.02),
            "host_by_rank": dict.fromkeys(range(RANKS), "node-1"),
            "cores_by_rank": dict.fromkeys(range(RANKS), 8),
            "cores_used_by_rank": dict.fromkeys(range(RANKS), 0.9),
            "all_reduce_seconds": 1e-4,
            "dropped": 0,
            "rejected": 0,
            "ranks": RANKS,
            "rejected_by_rank": dict.fromkeys(range(RANKS), 0),
            "refused": 0,
            "evicted": [],
            "joined": [],
            "train_seconds": 1.0,
            "median_step_seconds_by_rank": {0: 0.01, 1: 0.01, 2: 0.01, 3: 0.041},
        },
        "step_seconds": [[0.01] * 20] * 3 + [[0.041] * 20],
        "series": [Point(0.1 * i, 0.12 * i, 31 * i, 90 * i, 1.0 / i) for i in range(1, 11)],
        "evaluations": [
            Evaluation(1.0, 150, 150, 0.5, 0.6, 0.7, {"val/acc": 0.5}),
            Evaluation(2.0, 310, 310, 1.0, 1.2, None, {"val/acc": 0.75, "<b>": 1e-6}),
        ],
        "finished": True,
        "written_at": "2026-01-01T00:00:00+00:00",
        "about": {"module": "<script>alert(1)</script>"},
    }
    return RunRecord(**{**values, **changes})  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Collects what a page refers to, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    record().write(tmp_path / RECORD_NAME)

    path = write_report(tmp_path)

    text, reader = path.read_text(), Reader()
    reader.feed(text)
    assert path == tmp_path / "report.html"
    assert reader.open == []
    assert "script" not in reader.seen
    assert all(reference.startswith(("#", "data:")) for reference in reader.references)
    assert not re.search(r"url\((?!#)|@import", text)
    assert reader.seen.count("svg") == 8
    assert "http-equiv" not in text
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_the_record_says(tmp_path: Path) -> None:
    record().write(tmp_path / RECORD_NAME)
    text = write_report(tmp_path, tmp_path / "else" / "page.html").read_text()

    assert "Rank 3 takes 4.1x the median step of the others." in text
    assert "The barrier cost 2% of worker time; a bound of" in text
    assert (
        "<td>3</td><td>8%</td><td>40%</td><td>3.0 / 3 / 3</td><td>41.0 ms</td><td>2.0%</td><td>25</td><td>25</td>"
        in text
    )
    assert "<b>3.7 / 8 / 8</b>" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<td>worker timeout (s)</td><td>60.0</td>" in text
    assert "<th>epoch</th><th>val/acc</th><th>&lt;b&gt;</th><th>train loss</th>" in text
    assert "<td>1</td><td>0.5</td><td>-</td><td>0.7</td><td>150</td><td>0.5 s</td>" in text
    assert "<td>2</td><td>0.75</td><td>1e-06</td><td>-</td><td>310</td><td>1.0 s</td>" in text


def test_a_long_run_shows_evaluations_at_even_distances_and_the_last(tmp_path: Path) -> None:
    evaluations = [Evaluation(float(epoch), epoch, epoch, 1.0, 1.0, None, {}) for epoch in range(1, 101)]
    record(evaluations=evaluations).write(tmp_path / RECORD_NAME)

    card = write_report(tmp_path).read_text().partition("<h2>Evaluations</h2>")[2].partition("</table>")[0]

    epochs = [int(epoch) for epoch in re.findall(r"<tr><td>(\d+)</td>", card)]
    assert epochs == list(range(2, 101, 7))


def test_the_figures_take_their_colours_from_the_page() -> None:
    plots = draw(record())

    titles = [plot.title for plot in plots]
    assert titles == [
        "Staleness",
        "Where the time went",
        "Share of the updates",
        "Step time",
        "Updates a second",
        "Staleness over time",
        "Training loss",
        "val/acc",
    ]
    for plot in plots:
        root = ElementTree.fromstring(plot.svg.replace("xlink:href", "href"))
        assert "width" not in root.attrib and "viewBox" in root.attrib
        assert "var(--ink)" in plot.svg
        assert not re.search(r"(?:fill|stroke): #[0-9a-f]{6}", plot.svg)


def test_a_moment_without_updates_at_the_end_is_not_drawn_as_a_standstill() -> None:
    seconds, speed = _speeds([0.0, *(0.05 * i for i in range(1, 101)), 5.0001], [0, *range(3, 301, 3), 300])

    assert len(seconds) == len(speed) == 30
    assert speed.min() > 59.0 and speed.max() < 61.0


def test_staleness_over_time_is_the_mean_of_each_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages of 2 in the first half, of 6 in the second."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.update(x=x, y=y))
    series = [Point(0.1 * i, 0.1 * i, 10 * i, 20 * min(i, 10) + 60 * max(0, i - 10), None) for i in range(1, 21)]

    _staleness_over_time(Figure().add_subplot(), record(series=series))

    middle = len(drawn["y"]) // 2
    assert drawn["y"][:middle] == pytest.approx([2.0] * middle)
    assert drawn["y"][middle:] == pytest.approx([6.0] * middle)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"finished": True, "about": {}}, "The run &middot; finished 2026-01-01 00:00:00 UTC"),
        (
            {"finished": False, "about": {"started_at": "2026-01-01T00:00:00+00:00", "host": "<h>"}},
            "Started 2026-01-01 00:00:00 UTC on &lt;h&gt; &middot; goes on, or was killed; last heard of 2026-01-01",
        ),
        (
            {"finished": False, "about": {"ended_by": "ValueError: <no>\nand more", "ended_at": "2026-01-02"}},
            "The run &middot; ended early 2026-01-02: ValueError: &lt;no&gt;<",
        ),
    ],
)
def test_the_page_says_when_the_run_was_and_how_it_ended(changes: dict[str, Any], said: str) -> None:
    assert said in page(record(**changes), [])


def test_only_a_page_of_a_run_that_goes_on_asks_for_itself_again() -> None:
    asking = '<meta http-equiv="refresh" content="7">'

    assert asking in page(record(finished=False), [], refresh_s=7)
    assert asking not in page(record(finished=True), [], refresh_s=7)
    assert asking not in page(record(finished=False, about={"ended_by": "KeyboardInterrupt"}), [], refresh_s=7)


def test_a_run_that_has_just_begun_has_a_page() -> None:
    ranks = {name: dict.fromkeys(range(RANKS), 0) for name in record().stats if name.endswith("_by_rank")}
    nothing = {**record().stats, **ranks, "updates": 0, "staleness": {}, "train_seconds": 0.0}
    nothing["staleness_by_rank"] = {rank: {} for rank in range(RANKS)}
    begun = record(finished=False, stats=nothing, step_seconds=[[]] * RANKS, series=[], evaluations=[])

    assert "No update was applied yet." in page(begun, draw(begun))


def test_a_metric_that_is_no_number_is_drawn_where_it_is_one() -> None:
    values = [0.5, float("nan"), 0.7]
    evaluations = [Evaluation(i, 1, i, i, i, None, {"val<b>": value}) for i, value in enumerate(values)]

    (plot,) = [plot for plot in draw(record(evaluations=evaluations)) if plot.title == "val<b>"]

    assert 'aria-label="val&lt;b&gt;"' in plot.svg


def test_a_run_without_losses_or_steps_has_fewer_figures() -> None:
    poor = record(step_seconds=[[]] * RANKS, series=[])
    assert [plot.title for plot in draw(poor)] == [
        "Staleness",
        "Where the time went",
        "Share of the updates",
        "val/acc",
    ]
    assert draw(record(stats={**record().stats, "updates": 0})) == []


@pytest.mark.parametrize("content", [None, "{}"])
def test_the_command_refuses_in_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / RECORD_NAME).write_text(content)

    assert report_main([str(tmp_path)]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert report_main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_command_refuses_a_run_that_was_not_asynchronous(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(strategy="DDPStrategy", configuration={}, stats={}, step_seconds=[]).write(tmp_path / RECORD_NAME)

    assert report_main([str(tmp_path)]) == 1
    assert "DDPStrategy is not asynchronous" in capsys.readouterr().err


def test_the_command_prints_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record().write(tmp_path / RECORD_NAME)

    assert report_main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0

    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!DOCTYPE html>")


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record().write(tmp_path / RECORD_NAME)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lightning_async.monitoring.report.plots")
    monkeypatch.delattr(lightning_async.monitoring.report, "plots")

    assert report_main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "error: a report draws with matplotlib, which is not installed: pip install matplotlib\n"
    )
