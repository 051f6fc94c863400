"""A summary as text: for the terminal, as Markdown, CSV and JSON. The report shows the same cells in HTML."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ib_explain.summary import Cell, Interval, MetricFacts, Summary

__all__ = ["ABSENT", "Notes", "Shown", "counted", "csv_table", "json_summary", "markdown_tables", "number_format"]
__all__ += ["legend", "shown_difference", "shown_mean_rank", "shown_rank", "shown_score", "text_table", "verdict"]

ABSENT = {"not_applicable": "n/a", "failed": "failed", "undefined": "undefined", "missing": "–"}
"""What stands in a cell without a number."""
CSV_COLUMNS = (
    *("method", "metric", "family", "unit", "higher_is_better"),
    *("mean", "low", "high", "n", "undefined", "failed", "status", "reason"),
    *("difference", "difference_low", "difference_high", "difference_n", "rank", "rank_low", "rank_high"),
)


@dataclass(frozen=True)
class Shown:
    """A cell in words: number, interval, and what is special about it."""

    value: str
    interval: str = ""
    mark: str = ""
    """"*" for the best of a column, "▲" or "▼" for a difference whose interval leaves zero out."""
    note: int | None = None
    """Number of its footnote, from 1."""


class Notes:
    """Footnotes to a summary: why a cell is empty, or over which images its mean is. The same text has one number."""

    def __init__(self, summary: Summary) -> None:
        self.texts: list[str] = []
        self._numbers: dict[tuple[str | None, str], int] = {}
        images = summary.images
        for facts in summary.metrics:
            # Most often a metric is undefined on the same images for all methods: then the column has the note.
            counts = {cell.undefined for (_, k), cell in summary.cells.items() if k == facts.name and _plain(cell)}
            shared = max(counts) if len(counts) == 1 else 0
            if shared:
                self._add(None, facts.name, f"undefined on {shared} of {images} images, which are left out")
            told: dict[tuple[str, str], list[str]] = {}  # by what stands before and behind the methods' names
            for method in summary.methods:
                cell = summary.cells[method, facts.name]
                if cell.status == "not_applicable":
                    told.setdefault(("not applicable:", f"({cell.reason})"), []).append(method)
                elif cell.failed or cell.left_out:
                    rest = "; the mean is over the others" if cell.n else ""
                    what = f"failed on {cell.failed}" if cell.failed else f"does not apply to {cell.left_out}"
                    text = f"{what} of {images} images{rest}: {cell.reason}"
                    told.setdefault(("", text), []).append(method)
                elif cell.status == "undefined":
                    told.setdefault((f"{facts.name} is undefined on all images for", ""), []).append(method)
                elif cell.undefined and not shared:
                    text = f"undefined on {cell.undefined} of {images} images, which are left out, for"
                    told.setdefault((text, ""), []).append(method)
            for (before, behind), methods in told.items():
                names = "all methods" if len(methods) == len(summary.methods) > 1 else ", ".join(methods)
                for method in methods:
                    self._add(method, facts.name, " ".join(part for part in (before, names, behind) if part))

    def of(self, method: str | None, metric: str) -> int | None:
        """The number of the note to a cell, or to a whole column (method None), if there is one."""
        return self._numbers.get((method, metric))

    def _add(self, method: str | None, metric: str, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)
        self._numbers[method, metric] = self.texts.index(text) + 1


def number_format(intervals: Sequence[Interval]) -> Callable[[float], str]:
    """How to print the numbers of one column: two digits of the typical interval's half-width, the same for all.

    Without such a width, or if the column spans three decades and each mean is certain, each number has three digits of
    its own.
    """
    widths = [i for i in intervals if _has_width(i)]
    halves = [(i.high - i.low) / 2 for i in widths]
    sizes = [abs(i.mean) for i in intervals if i.mean != 0 and math.isfinite(i.mean)]
    certain = all(abs(i.mean) > i.high - i.low for i in widths)
    if not halves or (certain and max(sizes) > 1000 * min(sizes)):
        return _three_digits
    decimals = 1 - math.floor(math.log10(float(np.median(halves))))
    if decimals > 6:
        return _three_digits
    digits = max(decimals, 0)
    return lambda value: f"{round(value, digits) + 0.0:.{digits}f}"  # no minus in front of a zero


def shown_score(summary: Summary, notes: Notes, method: str, metric: str) -> Shown:
    """A mean with its interval."""
    cell, note = summary.cells[method, metric], notes.of(method, metric)
    if cell.status != "ok":
        return Shown(ABSENT[cell.status], note=note)
    form = number_format([summary.cells[name, metric] for name in summary.methods])
    return Shown(form(cell.mean), _bounds(cell, form), "*" if method in summary.best(metric) else "", note)


def shown_difference(summary: Summary, notes: Notes, method: str, metric: str) -> Shown:
    """A paired difference to the reference; marked if its interval leaves zero out: ▲ better, ▼ worse."""
    cell = summary.cells[method, metric]
    difference = summary.differences[method, metric]
    if method == summary.reference:
        return Shown("reference")
    if not difference.n:
        return Shown(ABSENT.get(cell.status, "–"), note=notes.of(method, metric))
    plain = number_format([summary.differences[name, metric] for name in summary.methods if name != summary.reference])

    def form(value: float) -> str:
        text = plain(value)
        return text if text.startswith("-") else f"+{text}"

    sign = verdict(difference, summary.facts(metric))
    return Shown(form(difference.mean), _bounds(difference, form), {1: "▲", -1: "▼", 0: ""}[sign])


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def verdict(difference: Interval, facts: MetricFacts) -> int:
    """1 if the method is better than the reference beyond the interval, -1 if it is worse, 0 if that is open."""
    above, below = difference.low > 0, difference.high < 0
    return int(above - below if facts.higher_is_better else below - above)


def shown_rank(summary: Summary, method: str, metric: str) -> Shown:
    """A rank with its interval."""
    rank = summary.ranks.get((method, metric))
    if rank is None:
        return Shown(ABSENT.get(summary.cells[method, metric].status, "–"))
    within = "" if math.isnan(rank.low) else f"[{rank.low:g}, {rank.high:g}]"
    return Shown(f"{rank.mean:g}", within, "*" if method in summary.best(metric) else "")


def shown_mean_rank(summary: Summary, method: str) -> Shown:
    """A mean rank with its interval; a method that lacks ranks says in how many metrics it has one."""
    rank = summary.mean_ranks[method]
    if not rank.metrics:
        return Shown("–")
    complete = [r.mean for r in summary.mean_ranks.values() if r.metrics == summary.ranked_metrics]
    partial = rank.metrics < summary.ranked_metrics
    best = not partial and rank.mean == min(complete)
    among = f" in {rank.metrics} of {summary.ranked_metrics}" if partial else ""
    within = "" if math.isnan(rank.low) else f"[{rank.low:.2f}, {rank.high:.2f}]"
    return Shown(f"{rank.mean:.2f}", f"{within}{among}".strip(), "*" if best else "")


def text_table(summary: Summary, *, width: int | None = None) -> str:
    """Scores as plain text; columns that do not fit `width` characters (None: the terminal's) go into a next block."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    notes = Notes(summary)
    names = ["method", "", *summary.methods]
    columns = [_column("mean rank ↓", "", [shown_mean_rank(summary, method) for method in summary.methods])]
    for facts in summary.metrics:
        cells = [shown_score(summary, notes, method, facts.name) for method in summary.methods]
        note = notes.of(None, facts.name)
        head = f"{facts.name} {facts.arrow}" + (f" [{note}]" if note else "")
        columns.append(_column(head, facts.unit, cells))
    lead = [name.ljust(max(map(len, names))) for name in names]
    blocks: list[list[str]] = [lead]
    for column in columns:
        if blocks[-1] is not lead and len(blocks[-1][0]) + 3 + len(column[0]) > width:
            blocks.append(lead)
        blocks[-1] = [f"{left}   {right}" for left, right in zip(blocks[-1], column, strict=True)]
    text = "\n\n".join("\n".join([*_strip(block[:2]), "-" * len(block[0]), *_strip(block[2:])]) for block in blocks)
    footnotes = [f"[{number}] {note}" for number, note in enumerate(notes.texts, 1)]
    below = ["* best of its column, compared over common images. " + legend(summary), *footnotes]
    return "\n".join(
        [text, "", *(line for note in below for line in textwrap.wrap(note, width, subsequent_indent="    "))]
    )


def markdown_tables(summary: Summary) -> str:
    """Scores, paired differences and ranks as GitHub Markdown, the best in bold."""
    notes, metrics = Notes(summary), [facts.name for facts in summary.metrics]
    heads = [f"{_escape(facts.name)} {facts.arrow}<br>{_escape(facts.unit)}" for facts in summary.metrics]
    noted = [f"{head}{_superscript(notes.of(None, name))}" for head, name in zip(heads, metrics, strict=True)]
    rows = [
        [_markdown(shown_mean_rank(summary, m)), *(_markdown(shown_score(summary, notes, m, k)) for k in metrics)]
        for m in summary.methods
    ]
    parts = ["## Scores", _markdown_table(["mean rank ↓", *noted], summary.methods, rows), legend(summary)]
    parts += ["\n".join(f"{number}. {_escape(text)}" for number, text in enumerate(notes.texts, 1))] * bool(notes.texts)
    if summary.reference is not None:
        rows = [[_markdown(shown_difference(summary, notes, m, k)) for k in metrics] for m in summary.methods]
        parts += [
            f"## Paired differences to {_escape(summary.reference)}",
            _markdown_table(heads, summary.methods, rows),
        ]
        parts += ["▲ better, ▼ worse than the reference: the interval of the difference leaves zero out."]
    rows = [[_markdown(shown_rank(summary, m, k)) for k in metrics] for m in summary.methods]
    parts += ["## Ranks", _markdown_table(heads, summary.methods, rows)]
    return "\n\n".join(parts) + "\n"


def csv_table(summary: Summary) -> str:
    """One line for each method and metric, full precision; an empty field where there is no number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for method in summary.methods:
        for facts in summary.metrics:
            key = method, facts.name
            cell, difference, rank = summary.cells[key], summary.differences.get(key), summary.ranks.get(key)
            line = [method, facts.name, facts.family, facts.unit, facts.higher_is_better]
            line += [_exact(cell.mean), _exact(cell.low), _exact(cell.high), cell.n, cell.undefined, cell.failed]
            line += [cell.status, cell.reason]
            line += [_exact(v) for v in (difference.mean, difference.low, difference.high)] if difference else [""] * 3
            line += [difference.n if difference else ""]
            line += [_exact(value) for value in (rank.mean, rank.low, rank.high)] if rank else [""] * 3
            writer.writerow(line)
    return buffer.getvalue()


def json_summary(summary: Summary) -> str:
    """Everything a summary holds; null where there is no finite number."""

    def listed(found: dict[tuple[str, str], Interval]) -> list[dict[str, object]]:
        return [{"method": method, "metric": metric} | asdict(entry) for (method, metric), entry in found.items()]

    content = {name: getattr(summary, name) for name in ("images", "reference", "confidence", "resamples", "seed")}
    content |= {"methods": summary.methods, "metrics": [asdict(facts) for facts in summary.metrics]}
    content |= {"cells": listed(dict(summary.cells)), "differences": listed(summary.differences)}
    content |= {"ranks": listed(summary.ranks), "ranked_metrics": summary.ranked_metrics}
    content["mean_ranks"] = [{"method": method} | asdict(rank) for method, rank in summary.mean_ranks.items()]
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def legend(summary: Summary) -> str:
    """What the numbers are and what the order is."""
    means = (
        f"Means over {counted(summary.images, 'image')} with {100 * summary.confidence:g} % bootstrap percentile "
        f"intervals ({summary.resamples} resamples of images, seed {summary.seed})."
    )
    if summary.ranked_metrics == 0:
        return means
    order = f"Ordered by the mean rank over {counted(summary.ranked_metrics, 'metric')}"
    if aside := [facts.name for facts in summary.metrics if not facts.counts and summary.counts_some]:
        order += f" ({', '.join(aside)} {'does' if len(aside) == 1 else 'do'} not count)"
    elif any(facts.family == "cost" for facts in summary.metrics):
        order += ", cost aside"
    if any(rank.metrics < summary.ranked_metrics for rank in summary.mean_ranks.values()):
        order += "; methods without a rank in some of them come last"
    return f"{means} {order}."


def _plain(cell: Cell) -> bool:
    return cell.status == "ok" and not cell.failed and not cell.left_out


def _has_width(interval: Interval) -> bool:
    """Whether the values differ by more than rounding; a count of forward passes, for instance, does not."""
    width = interval.high - interval.low
    return math.isfinite(width) and width > 1e-9 * abs(interval.mean)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


def _bounds(interval: Interval, form: Callable[[float], str]) -> str:
    return f"[{form(interval.low)}, {form(interval.high)}]" if _has_width(interval) else ""


def _column(name: str, unit: str, cells: Sequence[Shown]) -> list[str]:
    """Header, unit and cells of one column, all equally wide, numbers aligned at their right end."""
    left = max(len(cell.value) for cell in cells)
    lines = []
    for cell in cells:
        note = f" [{cell.note}]" if cell.note else ""
        lines.append(f"{cell.value:>{left}}{cell.mark or ' '} {cell.interval}{note}".rstrip())
    lines = [name, unit, *lines]
    return [line.ljust(max(map(len, lines))) for line in lines]


def _strip(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in lines]


def _markdown(cell: Shown) -> str:
    value = f"**{cell.value}**" if cell.mark == "*" else f"{cell.mark} {cell.value}".strip()
    return f"{value} {cell.interval}".strip() + _superscript(cell.note)


def _superscript(note: int | None) -> str:
    return f"<sup>{note}</sup>" if note else ""


def _markdown_table(heads: Sequence[str], methods: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [["method", *heads], ["---", *["---:"] * len(heads)]]
    lines += [[_escape(method), *row] for method, row in zip(methods, rows, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape(text: str) -> str:
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\\", "\\\\"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(sign, escaped)
    return text.replace("`", "\\`")


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
