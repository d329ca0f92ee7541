"""The report's HTML. Pure: from a record and its figures to a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_async.monitoring.diagnosis import RunFacts, conclusions
from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.report.wording import metric_names, readable
from lightning_async.monitoring.stats import staleness_text

if TYPE_CHECKING:
    from lightning_async.monitoring.report.plots import Plot
    from lightning_async.monitoring.series import Evaluation

__all__ = ["page"]

# A longer table is not read; a wider one neither.
_MOST_ROWS, _MOST_METRICS = 16, 8

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #1d2430; --soft: #5b6675; --faint: #cfd6df;
  --one: #2f6fdb; --two: #d4551b; --three: #e0a526; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --card: #1a2028; --ink: #e6eaf0; --soft: #9aa6b5;
  --faint: #3a4452; --one: #6aa1ff; --two: #ff8a52; --three: #f0c04f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.05rem; margin: 0 0 2px; }
p, ul { margin: 0; }
.soft { color: var(--soft); font-size: .9rem; }
.diagnosis { background: var(--card); border-left: 5px solid var(--one); border-radius: 8px; padding: 16px 20px;
  margin: 20px 0; }
.diagnosis li { margin: 4px 0; } .diagnosis ul { padding-left: 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.tile { flex: 1 1 148px; }
.tile, .card { background: var(--card); border-radius: 8px; padding: 14px 16px; min-width: 0; }
.tile.long { flex-basis: 190px; }
.tile b { display: block; white-space: nowrap; font-size: 1.45rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.card { margin: 0; } .wide { margin: 16px 0; } figure.card { display: flex; flex-direction: column; }
.card svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: 8px; overflow: visible; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
  align-items: start; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.pairs td:first-child { color: var(--soft); width: 36%; }
tr:last-child td { border-bottom: 0; }
"""


def page(record: RunRecord, plots: Sequence[Plot], refresh_s: int | None = None) -> str:
    """The whole page.

    Args:
        record: of the run.
        plots: its figures.
        refresh_s: seconds after which the browser asks for it anew while the run goes on; None if that is of no use.
    """
    stats = record.stats
    facts = RunFacts.of(record.configuration, stats, record.step_seconds)
    is_over = record.finished or "ended_by" in record.about
    said = conclusions(facts) if stats["updates"] or is_over else ["no update was applied yet"]
    sentences = "".join(f"<li>{escape(text[0].upper() + text[1:])}.</li>" for text in said)
    refresh = "" if is_over or refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n'
    module = escape(str(record.about.get("module", "a run")))
    ranks = len(stats["updates_by_rank"])
    heading = f"What asynchrony did: {module} on {ranks} rank{'' if ranks == 1 else 's'}"
    figures = "".join(
        f'<figure class="card"><h2>{escape(plot.title)}</h2>'
        f'<figcaption class="soft">{escape(plot.note)}</figcaption>{plot.svg}</figure>'
        for plot in plots
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}<title>{heading}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{heading}</h1>
<p class="soft">{_state(record)}</p></header>
<section class="diagnosis" aria-label="diagnosis"><h2>Diagnosis</h2><ul>{sentences}</ul></section>
<section class="tiles" aria-label="totals">{_tiles(stats)}</section>
<section class="grid" aria-label="figures">{figures}</section>
<section class="card wide"><h2>Ranks</h2><div class="scroll" tabindex="0">{_ranks(stats)}</div></section>
{_evaluated(record.evaluations)}<section class="halves">
<div class="card"><h2>Configuration</h2>{_pairs(readable(record.configuration))}</div>
<div class="card"><h2>Run</h2>{_pairs(record.about)}</div>
</section>
</main>
</body>
</html>
"""


def _state(record: RunRecord) -> str:
    """When the run was, and how it ended; with when it was written if it goes on, which a killed run seems to."""
    about = record.about
    started = f"Started {_time(about['started_at'])}" if "started_at" in about else "The run"
    host = f" on {escape(str(about['host']))}" if "host" in about else ""
    ended = _time(str(about.get("ended_at", record.written_at)))
    if record.finished:
        return f"{started}{host} &middot; finished {ended}"
    if "ended_by" in about:
        reason = escape(str(about["ended_by"]).partition("\n")[0])
        return f"{started}{host} &middot; ended early {ended}: {reason}"
    return f"{started}{host} &middot; goes on, or was killed; last heard of {_time(record.written_at)}"


def _time(moment: str) -> str:
    return escape(moment.replace("T", " ").replace("+00:00", " UTC"))


def _tiles(stats: Mapping[str, Any]) -> str:
    seconds, updates = max(stats["train_seconds"], 1e-9), stats["updates"]
    ranks = max(1, len(stats["updates_by_rank"]))
    waited = sum(stats["wait_seconds_by_rank"].values()) / (ranks * seconds)
    tiles = [
        (f"{updates:,}", "updates"),
        (f"{updates / seconds:,.1f}", "updates a second"),
        (f"{seconds:,.1f} s", "of training"),
        (f"{min(waited, 1.0):.0%}", "of worker time waiting"),
        (staleness_text(stats["staleness"]), "staleness mean / p95 / max"),
    ]
    if stats["dropped"]:
        tiles.append((f"{stats['dropped']:,}", "gradients dropped"))
    if stats["rejected"]:
        of = ", ".join(str(rank) for rank, count in stats["rejected_by_rank"].items() if count)
        tiles.append((f"{stats['rejected']:,}", f"gradients rejected, not finite: of rank {of}"))
    if lost := stats.get("evicted"):
        tiles.append((f"{len(lost)}", f"rank{'s' if len(lost) > 1 else ''} lost, {len(stats['joined'])} joined"))
    return "".join(
        f'<div class="tile{" long" if "/" in value else ""}"><b>{value}</b><span class="soft">{name}</span></div>'
        for value, name in tiles
    )


def _ranks(stats: Mapping[str, Any]) -> str:
    seconds, updates = max(stats["train_seconds"], 1e-9), max(1, stats["updates"])
    # A phone shows the first of them.
    head = ("rank", "share", "waiting", "staleness mean / p95 / max", "median step", "barrier", "updates", "batches")
    rows = [
        (
            str(rank),
            f"{own / updates:.0%}",
            f"{stats['wait_seconds_by_rank'][rank] / seconds:.0%}",
            staleness_text(stats["staleness_by_rank"][rank]),
            f"{1000 * stats['median_step_seconds_by_rank'][rank]:.1f} ms",
            f"{stats['parked_seconds_by_rank'][rank] / seconds:.1%}",
            f"{own:,}",
            f"{stats['batches_by_rank'][rank]:,}",
        )
        for rank, own in stats["updates_by_rank"].items()
    ]
    return _table(head, rows)


def _evaluated(evaluations: Sequence[Evaluation]) -> str:
    """The card with the run at its evaluations; at even distances where there are many, the last one always."""
    if not evaluations:
        return ""
    every = -(-len(evaluations) // _MOST_ROWS)
    shown = evaluations[::-1][::every][::-1]
    metrics = metric_names(shown)[:_MOST_METRICS]
    rows = [
        (
            f"{evaluation.epoch:.4g}",
            *(_four_digits(evaluation.metrics.get(name)) for name in metrics),
            _four_digits(evaluation.train_loss),
            f"{evaluation.updates:,}",
            f"{evaluation.seconds:,.1f} s",
        )
        for evaluation in shown
    ]
    table = _table(("epoch", *metrics, "train loss", "updates", "of training"), rows)
    return f'<section class="card wide"><h2>Evaluations</h2><div class="scroll" tabindex="0">{table}</div></section>\n'


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr>{_cells((_words(name), 'none' if value is None else str(value)), 'td')}</tr>"
        for name, value in values.items()
    )
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _words(name: str) -> str:
    stem = name.removesuffix("_s")
    return stem.replace("_", " ") + (" (s)" if stem != name else "")


def _cells(values: Iterable[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)
