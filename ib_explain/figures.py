"""Pictures of a summary: curves, cost against quality, ranks. Each is drawn for light and for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_explain.bootstrap import pareto_front
from ib_explain.summary import CurveSummary, MetricFacts, Summary
from ib_explain.tables import counted
from ib_explain.texts import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = ["DARK", "LIGHT", "Plot", "Theme", "log_axis", "plots"]

WIDTH = 4.4  # inches: at a phone's width the text stays at about 10 pixels
LONGEST_LABEL = 40  # characters of a method's name
IN_A_ROW = {13: 3, 20: 2}  # names of that many characters at most that stand beside each other
TICK_GAP = 0.1  # share of the axes' width between two ticks of the cost axis: room for four digits


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    paper: str
    ink: str
    muted: str
    rule: str
    colours: tuple[str, ...]
    """For methods, told apart also by people who do not see red and green; after the last one the line changes."""


LIGHT = Theme(
    "#ffffff",
    "#1c1f23",
    "#5c636d",
    "#dcdfe3",
    ("#1f5fa8", "#c2500a", "#12805c", "#8e3a9d", "#a67c00", "#b8264f", "#3f8ea8", "#5b5f66"),
)
DARK = Theme(
    "#16191d",
    "#e8e6e1",
    "#a5abb4",
    "#343a42",
    ("#7db4f0", "#f0985c", "#5cc9a0", "#d08be0", "#dcb84a", "#f0829f", "#7fcbe0", "#b4b8be"),
)


@dataclass(frozen=True)
class Plot:
    """One picture, ready to be drawn."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    alt: str
    """What it shows, for those who do not see it."""
    draw: Callable[[Theme], Figure]

    def png(self, theme: Theme = LIGHT, *, dpi: int = 160) -> bytes:
        """The picture as the content of a PNG file."""
        buffer = io.BytesIO()
        self.draw(theme).savefig(buffer, format="png", dpi=dpi, facecolor=theme.paper, metadata={"Software": None})
        return buffer.getvalue()


def plots(summary: Summary, curves: Sequence[CurveSummary] = ()) -> list[Plot]:
    """All pictures that these findings allow: a curve plot for each metric with curves, cost plots, ranks."""
    order = {method: i for i, method in enumerate(summary.methods)}
    found = []
    for metric in dict.fromkeys(curve.metric for curve in curves):
        chosen = sorted((c for c in curves if c.metric == metric and c.method in order), key=lambda c: order[c.method])
        if chosen:
            found.append(_curve_plot(summary, metric, chosen))
    cost = next((facts for facts in summary.metrics if facts.family == "cost"), None)
    if cost is not None:
        quality = [facts for facts in summary.metrics if facts.family == "perturbation"]
        quality = quality or [facts for facts in summary.metrics if facts.family != "cost"]
        for facts in quality[:2]:
            if known := [m for m in order if summary.cells[m, cost.name].n and summary.cells[m, facts.name].n]:
                found.append(_cost_plot(summary, cost, facts, known))
    if summary.ranked_metrics:
        found.append(_rank_plot(summary))
    return found


def _curve_plot(summary: Summary, metric: str, curves: Sequence[CurveSummary]) -> Plot:
    facts = next((facts for facts in summary.metrics if facts.name == metric), None)
    unit = facts.unit if facts else "score"

    def draw(theme: Theme) -> Figure:
        longest = max(len(curve.method) for curve in curves)
        beside = next((count for most, count in IN_A_ROW.items() if longest <= most), 1)
        figure, axes = _blank(theme, 3.1 + 0.19 * math.ceil(len(curves) / beside))
        handles = []
        for curve in reversed(curves):  # the best on top
            colour, dashes = _style(theme, summary.methods.index(curve.method))
            axes.fill_between(curve.fractions, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
            handles += axes.plot(curve.fractions, curve.mean, color=colour, linestyle=dashes, linewidth=1.4)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=min(0.0, *(float(np.nanmin(curve.low)) for curve in curves)))
        axes.set_xlabel("share of the image changed")
        axes.set_ylabel(f"mean {unit}")
        names = [_label(curve.method) for curve in curves]
        figure.legend(
            handles[::-1],
            names,
            loc="outside lower center",
            ncols=beside,
            frameon=False,
            fontsize=8,
            labelcolor=theme.ink,
        )
        return figure

    area = {curve.method: _area(curve) for curve in curves}
    first = sorted(area, key=lambda method: area[method], reverse=facts.higher_is_better if facts else True)
    better = "" if facts is None else (" Higher is better." if facts.higher_is_better else " Lower is better.")
    return Plot(
        f"curve-{_slug(metric)}",
        f"{metric} curves",
        f"Mean over images; the band is the pointwise {100 * summary.confidence:g} % interval.{better}",
        f"Line chart of {metric} against the share of the image changed, one line for each of {len(curves)} methods. "
        f"Best area: {', '.join(first[:3])}.",
        draw,
    )


def _cost_plot(summary: Summary, cost: MetricFacts, quality: MetricFacts, known: Sequence[str]) -> Plot:
    """Of the methods that have both numbers, one at least."""
    cells = summary.cells
    x = np.array([cells[m, cost.name].mean for m in known])
    y = np.array([cells[m, quality.name].mean for m in known])
    front = pareto_front(x, y, higher_is_better=quality.higher_is_better)

    def draw(theme: Theme) -> Figure:
        figure, axes = _blank(theme, 3.6)
        ends = sorted(zip(x[front], y[front], strict=True))
        axes.step(
            *zip(*ends, strict=True), where="post", color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1
        )
        for i, method in enumerate(known):
            colour, _ = _style(theme, summary.methods.index(method))
            cell = cells[method, quality.name]
            axes.plot([x[i], x[i]], [cell.low, cell.high], color=colour, linewidth=1.2, zorder=2)
            axes.plot(
                x[i],
                y[i],
                "o",
                markersize=5.5,
                color=colour,
                markerfacecolor=colour if front[i] else theme.paper,
                zorder=3,
            )
        axes.margins(x=0.16, y=0.1)
        log_axis(axes, x)
        axes.set_xlabel(f"{cost.name}: {cost.unit}" + " (log scale)" * bool((x > 0).any()))
        axes.set_ylabel(f"{quality.name}: {quality.unit}")
        if not quality.higher_is_better:
            axes.invert_yaxis()
        axes.set_title("better ↑", loc="left", fontsize=8, color=theme.muted)
        order = np.argsort(~front, kind="stable")  # where there is no room for all names, for those on the front
        _place_labels(figure, axes, x[order], y[order], [known[i] for i in order], theme)
        return figure

    leading = [known[i] for i in np.argsort(x, kind="stable") if front[i]]
    return Plot(
        f"cost-{_slug(quality.name)}",
        f"{quality.name} against cost",
        "Filled points are on the Pareto front (dashed): no other method is at once cheaper and better. "
        f"Bars are {100 * summary.confidence:g} % intervals.",
        f"Scatter chart of {quality.name} against {cost.name}. Pareto front, cheapest first: {', '.join(leading)}.",
        draw,
    )


def _rank_plot(summary: Summary) -> Plot:
    ranked = [m for m in summary.methods if summary.mean_ranks[m].metrics]

    def draw(theme: Theme) -> Figure:
        figure, axes = _blank(theme, 1.0 + 0.27 * len(ranked))
        if summary.reference in ranked:
            axes.axvline(
                summary.mean_ranks[summary.reference].mean, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 3))
            )
        for place, method in enumerate(ranked):
            rank = summary.mean_ranks[method]
            colour, _ = _style(theme, summary.methods.index(method))
            fill = colour if rank.metrics == summary.ranked_metrics else theme.paper
            axes.plot(
                [rank.low, rank.high], [place, place], color=colour, linewidth=2.4, alpha=0.55, solid_capstyle="butt"
            )
            axes.plot(rank.mean, place, "o", color=colour, markerfacecolor=fill, markersize=5.5)
        axes.set_yticks(range(len(ranked)), [_label(method) for method in ranked])
        axes.set_ylim(len(ranked) - 0.4, -0.6)
        axes.set_xlim(0.6, len(ranked) + 0.4)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.set_xlabel("mean rank (1 is the best)")
        return figure

    partial = any(summary.mean_ranks[m].metrics < summary.ranked_metrics for m in ranked)
    hollow = " Hollow: no rank in some metric." if partial else ""
    dotted = f" The dotted line is {summary.reference}." if summary.reference in ranked else ""
    return Plot(
        "ranks",
        f"Mean rank over {counted(summary.ranked_metrics, 'metric')}",
        f"Bars are {100 * summary.confidence:g} % intervals over resampled images.{dotted}{hollow}",
        "Mean ranks, best first: " + ", ".join(f"{m} {summary.mean_ranks[m].mean:.2f}" for m in ranked) + ".",
        draw,
    )


def _blank(theme: Theme, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.grid(color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, color=theme.rule, labelcolor=theme.muted)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.rule)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.muted, fontsize=8.5)
    return figure, axes


def log_axis(axes: Axes, x: np.ndarray) -> None:
    """Make the x axis of drawn points logarithmic, from zero where some stand there, with ticks that keep apart."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    positive = x[x > 0]
    if not positive.size:
        axes.set_xticks([0])
        return
    free = positive.size < x.size  # methods that never run the model
    if free:
        decades = math.log10(positive.max() / positive.min())
        axes.set_xscale("symlog", linthresh=float(positive.min()), linscale=max(0.15, decades / 4))
    else:
        axes.set_xscale("log")
    low, high = axes.get_xlim()
    low = float(positive.min()) if free else low
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for candidates in (powers, np.outer(powers, (1, 2, 5)).ravel(), MaxNLocator(5).tick_values(low, high)):
        ticks = [0.0] if free else []
        for value in map(float, np.ravel(candidates)):
            if low <= value <= high and (not ticks or _across(axes, value) - _across(axes, ticks[-1]) >= TICK_GAP):
                ticks.append(value)
        best = max(best, ticks, key=len)
        if len(best) > 2:
            break
    axes.xaxis.set_major_locator(FixedLocator(best))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: _plain(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _across(axes: Axes, value: float) -> float:
    """Where a value of x stands, as a share of the axes' width."""
    at = axes.transData.transform((value, 0.0))
    return float(axes.transAxes.inverted().transform(at)[0])


def _plain(value: float) -> str:
    """A number as short as it can be written: 0.5, 2, 100000, 1e6."""
    return f"{value:g}".replace("e+0", "e").replace("e-0", "e-")


def _style(theme: Theme, place: int) -> tuple[str, Any]:
    """Colour and line of the method at this place of the table, the same in all pictures."""
    dashes = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))
    return theme.colours[place % len(theme.colours)], dashes[place // len(theme.colours) % len(dashes)]


def _place_labels(figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], theme: Theme) -> None:
    """Write names beside their points, each at the first of a few places where it covers neither name nor point."""
    from matplotlib.patheffects import withStroke

    places = [
        (7, 0, "left", "center"),
        (-7, 0, "right", "center"),
        (0, 7, "center", "bottom"),
        (0, -7, "center", "top"),
    ]
    places += [(5, 6, "left", "bottom"), (5, -6, "left", "top"), (-5, 6, "right", "bottom"), (-5, -6, "right", "top")]
    places += [
        (7, 14, "left", "bottom"),
        (7, -14, "left", "top"),
        (-7, 14, "right", "bottom"),
        (-7, -14, "right", "top"),
    ]
    figure.draw_without_rendering()  # settles the layout, so that places on the canvas are known
    points = axes.transData.transform(np.column_stack([x, y]))
    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    for i, name in enumerate(names):
        for dx, dy, across, along in places:
            text = axes.annotate(
                _label(name),
                (x[i], y[i]),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=8,
                color=theme.ink,
                annotation_clip=False,
                path_effects=[withStroke(linewidth=2.5, foreground=theme.paper)],
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 8 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            others = np.delete(points, i, axis=0)
            hit = any(box.padded(3).contains(px, py) for px, py in others) or any(box.overlaps(o) for o in taken)
            if inside and not hit:
                taken.append(box)
                break
            text.remove()  # without a place the point has no name here; the table has all


def _area(curve: CurveSummary) -> float:
    """Under the mean curve, by trapezoids."""
    return float((np.diff(curve.fractions) * (curve.mean[1:] + curve.mean[:-1]) / 2).sum())


def _label(name: str) -> str:
    """A method's name as matplotlib shows it literally: $ is no formula, a leading _ hides nothing."""
    short = shortened(name, LONGEST_LABEL)
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)
