"""One self-contained HTML page: what was measured, how the methods stand, and how to read it.

It needs no network and no model; all that users named (files, methods, reasons) is escaped, and a content policy in the
page forbids any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ib_explain.figures import DARK, LIGHT, Plot, plots
from ib_explain.files import write_file
from ib_explain.markup import Picture, cell, flat, grid, heading, image, named, scale, scroll, uri
from ib_explain.pictures import Pictures
from ib_explain.rows import Row
from ib_explain.summary import CurveSummary, Extreme, Interval, MetricFacts, Summary, extremes
from ib_explain.tables import (
    Notes,
    Shown,
    counted,
    legend,
    number_format,
    shown_difference,
    shown_mean_rank,
    shown_rank,
    shown_score,
    verdict,
)

__all__ = ["case_metric", "report_html", "write_report"]

SHEET_SCALE = 0.75  # of a sheet's pixels at least, whatever the page's width: with 30 methods it scrolls
DIGESTED = ("batches", "first_batch", "names", "structure", "weights")  # tell runs apart, and a reader nothing


def case_metric(summary: Summary) -> MetricFacts:
    """The metric by which images are called best and worst: the first that is not a cost."""
    return next((facts for facts in summary.metrics if facts.family != "cost"), summary.metrics[0])


def write_report(
    path: str | Path,
    summary: Summary,
    run: Mapping[str, Any],
    *,
    curves: Sequence[CurveSummary] = (),
    rows: Iterable[Row] = (),
    pictures: Pictures | None = None,
) -> None:
    """Write `report_html` to `path`, beside the name and then renamed."""
    page = report_html(summary, run, curves=curves, rows=rows, pictures=pictures)
    write_file(Path(path), page)


def report_html(
    summary: Summary,
    run: Mapping[str, Any],
    *,
    curves: Sequence[CurveSummary] = (),
    rows: Iterable[Row] = (),
    pictures: Pictures | None = None,
) -> str:
    """The page as text.

    Args:
        summary: what to show.
        run: the content of run.json; of its settings, "model", "data", "methods", "metrics" have places of their own.
        curves: mean curves to plot.
        rows: for the best and worst images of each method; none, no such section.
        pictures: of maps; the page is complete without.
    """
    pictures = pictures or Pictures()
    notes = Notes(summary)
    drawn = plots(summary, curves)
    curve_plots, cost_plots, rank_plots = (
        [plot for plot in drawn if plot.name.startswith(kind)] for kind in ("curve-", "cost-", "ranks")
    )
    sections = [
        ("measured", "What was measured", _measured(summary, run)),
        ("leaderboard", "Leaderboard", _leaderboard(summary, notes)),
        ("reading", "How to read it", _how_to_read(summary)),
        ("differences", f"Against {summary.reference}", _differences(summary, notes)),
        ("ranks", "Ranks", _plots(rank_plots) + _ranks(summary)),
        ("curves", "Curves", _plots(curve_plots)),
        ("cost", "Cost against quality", _plots(cost_plots)),
        ("pictures", "The same images under all methods", _sheets(pictures.sheets)),
        ("cases", "Best and worst cases", _cases(summary, rows, pictures)),
        ("gaps", "What did not run, and why", _gaps(summary)),
        ("settings", "Settings", _settings(run)),
    ]
    sections = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections)
    bodies = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n{body}</section>'
        for name, title, body in sections
    )
    settings = run.get("settings", {})
    title = f"How well is {_name(settings.get('model', 'the model'))} explained?"
    parts = _data_name(run), counted(summary.images, "image")
    kicker = " · ".join(str(part) for part in parts if part)
    style, script = (_beside(f"report.{kind}") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_finding(summary))}</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{bodies}
</main>
<footer>Written by ib_explain. This file is complete in itself: it loads nothing and sends nothing.</footer>
<script>{script}</script>
</body>
</html>
"""


def _finding(summary: Summary) -> str:
    """The first sentence people read: who leads, and whether that is certain."""
    ranks = summary.mean_ranks
    full = [m for m in summary.methods if ranks[m].metrics == summary.ranked_metrics > 0]
    if not full:
        told = f"{counted(len(summary.methods), 'method')}, {counted(len(summary.metrics), 'metric')}"
        return f"{told}; no ranking was possible."
    lead = full[0]
    tied = [m for m in full[1:] if ranks[m].low <= ranks[lead].high]
    over = counted(summary.ranked_metrics, "metric")
    shown = shown_mean_rank(summary, lead)
    text = f"Best mean rank over {over}: {lead}, {f'{shown.value} {shown.interval}'.strip()}. "
    if math.isnan(ranks[lead].low):
        return text + "From one image nothing can be said on how certain that is."
    if tied:
        return text + f"Its interval overlaps with {_list(tied)}, so that lead is not certain."
    return text + ("No other method's interval overlaps with it." if len(full) > 1 else "")


def _measured(summary: Summary, run: Mapping[str, Any]) -> str:
    settings, info = run.get("settings", {}), run.get("info", {})
    facts: dict[str, Any] = {}
    for key in ("model", "data"):
        if isinstance(settings.get(key), Mapping):
            facts[key] = {name: value for name, value in settings[key].items() if name not in DIGESTED}
        elif key in settings:
            facts[key] = settings[key]
    if isinstance(facts.get("data"), Mapping):
        facts["data"] = {**facts["data"], "name": _data_name(run)}
    facts |= {"images": summary.images, "methods": len(summary.methods), "metrics": len(summary.metrics)}
    facts |= {key: value for key, value in info.items() if key not in ("command", "data", "reference")}
    facts |= {key: value for key, value in settings.items() if key not in ("model", "data", "methods", "metrics")}
    resumed = run.get("resumed", [])
    if resumed:
        facts["resumed"] = f"{len(resumed)} times" if len(resumed) > 1 else "once"
        other = {k: [r[k] for r in resumed if r.get(k, v) != v] for k, v in info.items() if k in ("device", "versions")}
        facts |= {f"{key} when resumed": changed[-1] for key, changed in other.items() if changed}
    entries = "".join(
        f"<div><dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(flat(value))}</dd></div>"
        for key, value in facts.items()
    )
    # One that went on with other options, or extended the run, stands below the first.
    commands = "\n".join(dict.fromkeys(str(start["command"]) for start in (info, *resumed) if start.get("command")))
    shown = f"<pre><code>{escape(commands)}</code></pre>" if commands else ""
    return f'<dl class="facts">{entries}</dl>\n{shown}\n'


def _leaderboard(summary: Summary, notes: Notes) -> str:
    columns = [heading("mean rank", "↓", "lower is better", f"over {counted(summary.ranked_metrics, 'metric')}", None)]
    columns += [_metric_heading(facts, notes.of(None, facts.name)) for facts in summary.metrics]
    scales = [scale([summary.mean_ranks[m] for m in summary.methods])]
    scales += [scale([summary.cells[m, facts.name] for m in summary.methods]) for facts in summary.metrics]
    body = []
    for method in summary.methods:
        cells = [cell(shown_mean_rank(summary, method), summary.mean_ranks[method], scales[0])]
        for facts, place in zip(summary.metrics, scales[1:], strict=True):
            shown = shown_score(summary, notes, method, facts.name)
            cells.append(cell(shown, summary.cells[method, facts.name], place))
        body.append((method, cells))
    footnotes = "".join(f'<li id="note-{number}">{escape(text)}</li>' for number, text in enumerate(notes.texts, 1))
    below = (
        f'<p class="note">The best of a column, compared over common images, is in bold. {escape(legend(summary))}</p>'
    )
    return grid("Leaderboard", columns, body) + below + (f'<ol class="notes">{footnotes}</ol>\n' if footnotes else "")


def _how_to_read(summary: Summary) -> str:
    entries = "".join(
        f'<dt>{escape(facts.name)} <span class="meta">{facts.arrow} {_better(facts)} is better · {escape(facts.unit)} '
        f"· {escape(facts.family)}</span></dt><dd>{escape(facts.protocol)}</dd>"
        for facts in summary.metrics
    )
    percent, rest = f"{100 * summary.confidence:g} %", f"{100 - 100 * summary.confidence:g} %"
    weighed = "all metrics but costs, as none here is one of perturbation, localisation or human attention"
    if summary.counts_some:
        weighed = "the metrics of perturbation, localisation and human attention; others have a rank and do not count"
    return f"""<p>Each number is a mean over images. Below it stands its {percent} bootstrap interval: had other
images of the same kind been drawn, the mean would mostly have stayed within it. The little bar shows both on the scale
of its column. All methods saw the same images, and the same resamples of them, so differences are between pairs. Each
interval speaks for its own cell alone: of many comparisons where nothing differs, {rest} look as if something did.</p>
<p>A rank is a method's place under one metric, 1 the best, ties shared; two methods are compared over the images on
which both have a value. The mean rank weighs alike {weighed}. Where a metric is undefined on an image (there is no
box, for instance), the image is left out, never counted as zero.</p>
<dl class="metrics">{entries}</dl>
"""


def _differences(summary: Summary, notes: Notes) -> str:
    if summary.reference is None:
        return ""
    qualities = [facts for facts in summary.metrics if facts.family != "cost"]
    columns = [heading("better · open · worse", "", "", "metrics, cost aside", None)]
    columns += [_metric_heading(facts, None) for facts in summary.metrics]
    scales = {
        facts.name: scale([summary.differences[m, facts.name] for m in summary.methods] + [Interval(0, 0, 0, 1)])
        for facts in summary.metrics
    }
    body = []
    for method in summary.methods:
        if method == summary.reference:
            continue
        signs = [verdict(d, f) for f in qualities if (d := summary.differences[method, f.name]).n]
        tally = f"{signs.count(1)} · {signs.count(0)} · {signs.count(-1)}" if signs else "–"
        balance = Interval(signs.count(1) - signs.count(-1), math.nan, math.nan, len(signs))
        cells = [cell(Shown(tally), balance)]
        for facts in summary.metrics:
            shown = shown_difference(summary, notes, method, facts.name)
            kind = {"▲": "better", "▼": "worse"}.get(shown.mark, "")
            cells.append(cell(shown, summary.differences[method, facts.name], scales[facts.name], kind, zero=True))
        body.append((method, cells))
    return (
        f"<p>Each method minus {escape(summary.reference)}, image by image. ▲ better or ▼ worse stands only where the "
        f"interval of the difference leaves zero out; everything else is open.</p>\n"
        + grid(f"Paired differences to {summary.reference}", columns, body)
    )


def _ranks(summary: Summary) -> str:
    columns = [_metric_heading(facts, None) for facts in summary.metrics]
    missing = Interval(math.nan, math.nan, math.nan, 0)
    body = [
        (
            method,
            [
                cell(shown_rank(summary, method, facts.name), summary.ranks.get((method, facts.name), missing))
                for facts in summary.metrics
            ],
        )
        for method in summary.methods
    ]
    return grid("Ranks for each metric", columns, body)


def _plots(drawn: Sequence[Plot]) -> str:
    figures = []
    for plot in drawn:
        light, dark = Picture(plot.png(LIGHT), plot.title), Picture(plot.png(DARK), plot.title)
        source = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{uri(dark)}">'
        figures.append(
            f"<figure><h3>{escape(plot.title)}</h3><picture>{source}{image(light, plot.alt)}</picture>"
            f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        )
    return f'<div class="plots">{"".join(figures)}</div>\n' if figures else ""


def _sheets(sheets: Sequence[Picture]) -> str:
    return "".join(
        f'<figure><div class="scroll sheet" role="region" tabindex="0" aria-label="{escape(sheet.caption)}">'
        f"{image(sheet, least=SHEET_SCALE)}</div><figcaption>{escape(sheet.caption)}</figcaption></figure>\n"
        for sheet in sheets
    )


def _cases(summary: Summary, rows: Iterable[Row], pictures: Pictures) -> str:
    facts = case_metric(summary)
    found = extremes(rows, facts)
    form = number_format([summary.cells[m, facts.name] for m in summary.methods])

    def cards(cases: Sequence[Extreme]) -> str:
        items = []
        for case in cases:
            picture = pictures.cases.get((case.method, case.image))
            shown = image(picture) if picture else ""
            items.append(f"<li>{shown}<b>{form(case.value)}</b> {escape(case.name)}</li>")
        return f'<ul class="cards">{"".join(items)}</ul>'

    blocks = [
        f'<h3>{escape(method)}</h3><div class="cases"><div><h4>best</h4>{cards(best)}</div>'
        f"<div><h4>worst</h4>{cards(worst)}</div></div>\n"
        for method in summary.methods
        for best, worst in [found.get(method, ([], []))]
        if best
    ]
    intro = f"<p>By {escape(facts.name)} ({_better(facts)} is better), the most extreme first.</p>\n"
    return intro + "".join(blocks) if blocks else ""


def _gaps(summary: Summary) -> str:
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for method in summary.methods:
        for facts in summary.metrics:
            found = summary.cells[method, facts.name]
            what = {"not_applicable": "not applicable", "missing": "not run", "undefined": "undefined"}.get(
                found.status
            )
            what = "failed" if found.failed else "not applicable" if found.left_out else what
            if what:
                some = found.failed or found.left_out
                images = f"{some} of {summary.images}" if some else "all"
                groups[method, what, images, found.reason].append(facts.name)
    if not groups:
        return "<p>Everything ran: each method has a value under each metric.</p>\n"
    lines = []
    for (method, what, images, reason), names in groups.items():
        which = "all" if len(names) == len(summary.metrics) else ", ".join(names)
        told = "".join(f"<td>{escape(text)}</td>" for text in (what, images, which, reason))
        lines.append(f'<tr><th scope="row">{named(method)}</th>{told}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("method", "what", "images", "metrics", "reason"))
    return scroll("What did not run", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def _settings(run: Mapping[str, Any]) -> str:
    parts = []
    settings = run.get("settings", {})
    for kind in ("methods", "metrics"):
        known = settings.get(kind)
        if not isinstance(known, Mapping) or not known:
            continue
        skip = ("family", "unit", "higher_is_better", "protocol")
        lines = []
        for name, options in known.items():
            told = {k: v for k, v in options.items() if k not in skip} if isinstance(options, Mapping) else options
            lines.append(
                f'<tr><th scope="row">{named(name)}</th><td><code>{escape(flat(told) or "–")}</code></td></tr>'
            )
        head = f'<tr><th scope="col">{kind[:-1]}</th><th scope="col">settings</th></tr>'
        table = f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
        parts.append(f"<h3>{kind.capitalize()}</h3>\n" + scroll(f"Settings of the {kind}", table))
    if run.get("fingerprint"):
        parts.append(
            f'<p class="note">Fingerprint of all settings: <code>{escape(str(run["fingerprint"]))}</code></p>\n'
        )
    return "".join(parts)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _metric_heading(facts: MetricFacts, note: int | None) -> str:
    return heading(facts.name, facts.arrow, f"{_better(facts)} is better", facts.unit, note)


def _better(facts: MetricFacts) -> str:
    return "higher" if facts.higher_is_better else "lower"


def _data_name(run: Mapping[str, Any]) -> str:
    """What the user called the data at the last start, else what they are."""
    given = [info["data"] for info in (run.get("info", {}), *run.get("resumed", [])) if info.get("data")]
    return str(given[-1]) if given else _name(run.get("settings", {}).get("data", ""))


def _name(value: Any) -> str:
    return str(value.get("name", "")) if isinstance(value, Mapping) else str(value)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
