"""From the runs of `quality.py` to the table that is kept, and its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quality_figures import cost_figure
from quality_methods import SEVEN

from ib_explain.files import write_file
from ib_explain.leaderboard import Leaderboard
from ib_explain.metrics import METRICS
from ib_explain.pictures import Pictures
from ib_explain.results import RunStore
from ib_explain.rows import Row
from ib_explain.summary import Interval, MetricFacts, Summary, summarise
from ib_explain.tables import ABSENT, Notes, shown_mean_rank, verdict

CHEAP = 3.0
"""Passes up to which methods are held against one-pass maps."""
GAP = MetricFacts("insertion_minus_deletion", "perturbation", "probability", True)
HEADS = {
    "insertion": "insertion",
    "deletion": "deletion",
    GAP.name: "ins. − del.",
    "degradation_10_steps": "degradation",
    "road_3_shares": "ROAD",
    "energy_inside": "energy inside",
    "pointing_game": "pointing",
    "effective_heat_ratio": "heat ratio",
}


@dataclass(frozen=True)
class Roles:
    """Which of a run's methods are what."""

    best: str
    """Grad-CAM at its best layer, which others are held against."""
    seeds: Sequence[str]
    """The fitted `ib` of each seed."""
    earlier: str
    """The one of the first seed that sits a stage before the default layer: without a rank beside it."""
    refined: Sequence[str]
    """The same, refined per image."""
    controls: Sequence[str]
    """Made from `ib` itself, so without a rank of their own."""
    rivals: Sequence[str]
    """What the fitted ones are held against besides Grad-CAM."""
    costly: Sequence[str]
    """What the refined ones are held against."""
    energy: str
    """The energy of the layer's own features, whose lattice is the measure of ours."""


def facts(name: str) -> MetricFacts:
    """What tables say of a metric, also of the difference of two."""
    if name == GAP.name:
        return GAP
    metric = METRICS.get(name)
    return MetricFacts(name, metric.family, metric.unit, metric.higher_is_better, (metric.__doc__ or "").split("\n")[0])


def with_gap(rows: Sequence[Row]) -> list[Row]:
    """The rows, and each image's insertion minus deletion."""
    deletion = {(row.image, row.method): row.value for row in rows if row.metric == "deletion"}
    gaps = [
        replace(row, metric=GAP.name, value=row.value - deletion[row.image, row.method])
        for row in rows
        if row.metric == "insertion"
    ]
    return [*rows, *gaps]


def best_by_gap(board: Leaderboard) -> str:
    """The method with the largest insertion minus deletion."""
    summary = summarise(with_gap(board.rows), [GAP], methods=board.summary.methods)
    return summary.methods[0]


def join(boards: Sequence[Leaderboard], best: str, folder: Path) -> Leaderboard:
    """One leaderboard, with its page in `folder`, of runs over the same images."""
    settings = dict(boards[0].run["settings"])
    settings["methods"] = {name: told for b in boards for name, told in b.run["settings"]["methods"].items()}
    settings["metrics"] = {name: told for name, told in settings["metrics"].items() if name != "lattice"}
    store = RunStore.open(None, settings, {**boards[0].run["info"], "reference": best})
    store.append(0, [row for b in boards for row in b.rows], [curve for b in boards for curve in b.curves])
    sheets = [sheet for b in boards for sheet in b.pictures.sheets]
    cases = {key: picture for b in boards for key, picture in b.pictures.cases.items()}
    joined = Leaderboard.of(store, reference=best, pictures=Pictures(sheets, cases))
    shutil.rmtree(folder, ignore_errors=True)  # made anew from the runs, which are kept
    joined.save(folder)
    return joined


def write(board: Leaderboard, roles: Roles, about: dict[str, Any], folder: Path) -> None:
    """Write table.md, table.json and cost_faithfulness.png into `folder`."""
    rows = with_gap(board.rows)
    table = list(board.run["settings"]["methods"])
    repeated = (*roles.seeds[1:], *roles.refined[1:], roles.earlier)
    ranked = [name for name in table if name not in (*roles.controls, *repeated)]
    shown = summarise(rows, [facts(name) for name in (*HEADS, "passes")], roles.best, methods=table)
    cost = {name: shown.cells[name, "passes"].mean for name in table}
    cheap = [name for name in ranked if cost[name] <= CHEAP]
    everyone, one_pass = (summarise(rows, [facts(name) for name in SEVEN], methods=m) for m in (ranked, cheap))
    pairs = _pairs(roles, table)
    compared = {pair: _compare(rows, *pair, [*HEADS]) for pair in pairs}
    grid = summarise(rows, [facts("lattice")], roles.energy, methods=table)
    rivals = [name for name in cheap if name not in roles.seeds]
    by_seed = {
        ib: summarise(rows, [facts(name) for name in SEVEN], methods=[*rivals, ib]).mean_ranks[ib]
        for ib in (*roles.seeds, roles.earlier)
    }

    order = [*everyone.methods, *(name for name in table if name not in ranked)]
    text = [
        f"# Quality on the host `{about['host']}`",
        f"`{about['command']}`",
        f"Means over {shown.images} images ({about['data']}; {about['precision']}) ± half of the 95 % bootstrap "
        f"interval. ▲ better, ▼ worse than `{roles.best}` by a paired 95 % interval that leaves 0 out; that layer is "
        "the best for Grad-CAM, chosen on these very images. Ranks are means over the seven measures (not the "
        "difference ins. − del.), among all methods that have a rank, and among those of up to "
        f"{CHEAP:g} passes. Passes: forward plus backward, counted by their arithmetic. Controls made from `ib`, and "
        "its further seeds and layers, have no rank here.",
        _main_table(shown, everyone, one_pass, order),
    ]
    notes = Notes(shown).texts
    text += ["\n".join(f"- {note}" for note in notes)] * bool(notes)
    text += ["## Paired differences", "The first minus the second, ▲ where the first is better, ▼ where it is worse."]
    text += [_pair_table(compared)]
    text += ["## Mean rank of `ib` by seed and layer", f"Among the methods of up to {CHEAP:g} passes, [95 % interval]."]
    text += ["\n".join(f"- `{ib}`: {r.mean:.2f} [{r.low:.2f}, {r.high:.2f}]" for ib, r in by_seed.items())]
    text += ["## Lattice", _lattice_text(grid, roles)]
    write_file(folder / "table.md", "\n\n".join(text) + "\n")

    numbers = about | {"best_grad_cam": roles.best, "measures": {name: facts(name).protocol for name in SEVEN}}
    numbers |= {
        "scores": {m: {k.name: _numbers(shown.cells[m, k.name]) for k in shown.metrics} for m in order},
        "mean_rank": {m: _numbers(rank) for m, rank in everyone.mean_ranks.items()},
        "mean_rank_up_to_3_passes": {m: _numbers(rank) for m, rank in one_pass.mean_ranks.items()},
        "mean_rank_by_seed": {ib: _numbers(rank) for ib, rank in by_seed.items()},
        "differences_to_best_grad_cam": {
            m: {k: _numbers(shown.differences[m, k]) for k in HEADS} for m in order if m != roles.best
        },
        "paired_differences": _pair_numbers(compared),
        "lattice": {m: _numbers(grid.cells[m, "lattice"]) for m in order},
        "lattice_minus_features": {m: _numbers(grid.differences[m, "lattice"]) for m in roles.seeds},
    }
    write_file(folder / "table.json", _json(numbers))
    cost_figure(summarise(rows, [GAP, facts("degradation_10_steps"), facts("passes")], methods=ranked), folder)


def write_own(board: Leaderboard, roles: Roles, about: dict[str, Any], folder: Path) -> None:
    """Write own.md and own.json into `folder`: the fitted `ib` of each seed, its controls, Grad-CAM; no ranks."""
    head = [
        f"# `ib` and Grad-CAM on the host `{about['host']}`",
        f"`{about['command']}`",
        f"Means over {board.summary.images} images ({about['data']}; {about['precision']}) ± half of the 95 % "
        f"bootstrap interval. ▲ better, ▼ worse than `{roles.best}` by a paired 95 % interval that leaves 0 out; that "
        "layer is the best for Grad-CAM, chosen on these very images.",
    ]
    write_short(board, roles.best, head, about, folder / "own", _pairs(roles, list(board.run["settings"]["methods"])))


def write_short(
    board: Leaderboard,
    reference: str,
    head: Sequence[str],
    about: dict[str, Any],
    path: Path,
    pairs: Sequence[tuple[str, str]] = (),
) -> None:
    """Write scores beside those of one method as path.md and path.json, without ranks.

    Args:
        board: the run.
        reference: the method that the others are held against.
        head: paragraphs above the table.
        about: what was run, for the numbers.
        path: without suffix.
        pairs: methods whose paired difference is told as well, the first minus the second.
    """
    methods = list(board.run["settings"]["methods"])
    rows = with_gap(board.rows)
    shown = summarise(rows, [facts(name) for name in (*HEADS, "passes")], reference, methods=methods)
    heads = ["method", *(f"{head} {shown.facts(name).arrow}" for name, head in HEADS.items()), "passes"]
    lines = [
        [f"`{m}`", *(_score(shown, m, name) for name in HEADS), f"{shown.cells[m, 'passes'].mean:.2f}"] for m in methods
    ]
    compared = {pair: _compare(rows, *pair, [*HEADS]) for pair in pairs}
    text = [*head, _markdown(heads, lines)]
    if pairs:
        text += ["The first minus the second, ▲ where the first is better, ▼ where it is worse:", _pair_table(compared)]
    write_file(path.with_suffix(".md"), "\n\n".join(text) + "\n")
    numbers = about | {
        "reference": reference,
        "scores": {m: {k.name: _numbers(shown.cells[m, k.name]) for k in shown.metrics} for m in methods},
        "differences": {m: {k: _numbers(shown.differences[m, k]) for k in HEADS} for m in methods if m != reference},
    }
    if pairs:
        numbers["paired_differences"] = _pair_numbers(compared)
    write_file(path.with_suffix(".json"), _json(numbers))


def _pair_numbers(compared: dict[tuple[str, str], Summary]) -> list[dict[str, Any]]:
    return [
        {"of": one, "to": other} | {k: _numbers(found.differences[one, k]) for k in HEADS}
        for (one, other), found in compared.items()
    ]


def _pairs(roles: Roles, table: Sequence[str]) -> list[tuple[str, str]]:
    first = roles.seeds[0]
    wanted = [(ib, roles.best) for ib in (*roles.seeds, roles.earlier)]
    wanted += [(ib, rival) for ib in roles.seeds for rival in roles.rivals]
    wanted += [(first, name) for name in table if name.startswith("grad_cam ") and name != roles.best]
    wanted += [(first, control) for control in roles.controls]
    for fitted, refined in zip(roles.seeds, roles.refined, strict=True):
        wanted += [(refined, other) for other in (roles.best, fitted, *roles.costly)]
    return [pair for pair in wanted if set(pair) <= set(table)]


def _compare(rows: Sequence[Row], one: str, other: str, metrics: Sequence[str]) -> Summary:
    return summarise(rows, [facts(name) for name in metrics], other, methods=[one, other])


def _main_table(shown: Summary, everyone: Summary, one_pass: Summary, order: Sequence[str]) -> str:
    heads = ["method", "mean rank", "≤ 3 passes"]
    heads += [f"{head} {shown.facts(name).arrow}" for name, head in HEADS.items()] + ["passes"]
    lines = []
    for method in order:
        ranks = [shown_mean_rank(s, method).value if method in s.methods else "–" for s in (everyone, one_pass)]
        cost = shown.cells[method, "passes"]
        lines.append(
            [f"`{method}`", *ranks]
            + [_score(shown, method, name) for name in HEADS]
            + [f"{cost.mean:.2f}" if cost.n else ABSENT[cost.status]]
        )
    return _markdown(heads, lines)


def _score(shown: Summary, method: str, metric: str) -> str:
    cell = shown.cells[method, metric]
    if cell.status != "ok":
        return ABSENT[cell.status]
    mark = "" if method == shown.reference else _mark(shown, method, metric)
    return f"{cell.mean:.3f} ± {(cell.high - cell.low) / 2:.3f}{mark}"


def _pair_table(compared: dict[tuple[str, str], Summary]) -> str:
    lines = []
    for (one, other), found in compared.items():
        differences = [found.differences[one, name] for name in HEADS]
        cells = [
            f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{_mark(found, one, name)}" if d.n else "–"
            for name, d in zip(HEADS, differences, strict=True)
        ]
        lines.append([f"`{one}` − `{other}`", *cells])
    return _markdown(["", *HEADS.values()], lines)


def _lattice_text(grid: Summary, roles: Roles) -> str:
    own = grid.cells[roles.energy, "lattice"]
    lines = [
        "Share of a map's energy at the Nyquist frequencies of the layer's grid, its mean aside, beside that of the "
        "features' own energy there, and the paired difference.",
        f"- `{roles.energy}`: {own.mean:.4f} ± {(own.high - own.low) / 2:.4f}",
    ]
    for ib in roles.seeds:
        cell, difference = grid.cells[ib, "lattice"], grid.differences[ib, "lattice"]
        lines.append(
            f"- `{ib}`: {cell.mean:.4f} ± {(cell.high - cell.low) / 2:.4f}, "
            f"difference {difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        )
    return "\n".join(lines)


def _mark(summary: Summary, method: str, metric: str) -> str:
    return {1: " ▲", -1: " ▼", 0: ""}[verdict(summary.differences[method, metric], summary.facts(metric))]


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _numbers(found: Interval | Any) -> list[float | None]:
    """Mean and interval, five digits; None where there is no number."""
    return [None if value != value else float(f"{value:.5g}") for value in (found.mean, found.low, found.high)]


def _json(numbers: dict[str, Any]) -> str:
    """Indented twice; what lies deeper is on one line."""

    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    def entry(value: Any) -> str:
        if isinstance(value, dict) and value:
            return "{\n" + ",\n".join(f"  {dumped(key)}: {dumped(inner)}" for key, inner in value.items()) + "\n }"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {dumped(inner)}" for inner in value) + "\n ]"
        return dumped(value)

    return "{\n" + ",\n".join(f" {dumped(key)}: {entry(value)}" for key, value in numbers.items()) + "\n}\n"
