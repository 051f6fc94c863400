"""Figures and the page, from made-up rows."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ib_explain.figures import DARK, LIGHT, plots
from ib_explain.markup import Picture, scale
from ib_explain.pictures import Pictures
from ib_explain.report import report_html
from ib_explain.rows import CurveBatch, Row
from ib_explain.summary import Interval, MetricFacts, summarise, summarise_curves
from ib_explain.tables import Notes, csv_table, json_summary, text_table
from tests.reporting import (
    HOSTILE,
    LEVELS,
    METHODS,
    make_curves,
    png,
)


@pytest.fixture(scope="module")
def page(board) -> str:
    pictures = Pictures([Picture(png(), "All <methods>")], {("ib", 0): Picture(png(), "ib on it")})
    curves = board.mean_curves()
    return report_html(board.summary, board.run, curves=curves, rows=board.rows, pictures=pictures)


class Page(HTMLParser):
    """Collects what the page is made of."""

    VOID = ("meta", "img", "source", "br", "wbr", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_plots_are_pictures_of_all_methods_in_both_themes(board):
    drawn = {plot.name: plot for plot in plots(board.summary, board.mean_curves())}
    assert list(drawn) == ["curve-insertion", "cost-insertion", "cost-deletion", "ranks"]
    for plot in drawn.values():
        assert plot.alt and plot.caption and plot.title
        for theme in (LIGHT, DARK):
            image = Image.open(io.BytesIO(plot.png(theme, dpi=40))).convert("RGB")
            assert image.getpixel((0, 0)) == tuple(bytes.fromhex(theme.paper[1:]))
            assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 20
    axes = drawn["curve-insertion"].draw(LIGHT).axes[0]
    curve = summarise_curves(make_curves())[0]
    lines = [line.get_ydata() for line in axes.get_lines()]
    assert len(lines) == 3 and all(np.array_equal(line, curve.mean) for line in lines)
    labels = [label.get_text() for label in drawn["ranks"].draw(LIGHT).axes[0].get_yticklabels()]
    assert labels == ["ib", r"\$rise_\$|", "grad_cam"]


def test_names_that_differ_in_their_last_option_stay_apart_and_inside_the_picture(board):
    names = [f"ib(steps=20, lr=0.1, copies=10, beta=0.1, gate={gate})" for gate in ("noise", "gaussian")]
    rows = [Row(0, "x", name, "insertion", 0.5) for name in names]
    curves = [CurveBatch(name, "insertion", np.arange(1), np.linspace(0, 1, 6), np.ones((1, 6))) for name in names]
    drawn = plots(summarise(rows, board.summary.metrics[:1]), summarise_curves(curves))
    figure = next(plot for plot in drawn if plot.name == "curve-insertion").draw(LIGHT)
    figure.draw_without_rendering()
    labels = figure.legends[0].get_texts()
    assert [text.get_text().rpartition("gate=")[2] for text in labels] == ["noise)", "gaussian)"]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in (text.get_window_extent() for text in labels))


def test_cost_plot_takes_free_methods_and_inverts_for_lower_is_better(board):
    rows = [dataclasses.replace(r, value=0.0) if (r.method, r.metric) == ("ib", "passes") else r for r in board.rows]
    summary = summarise(rows, board.summary.metrics, methods=list(METHODS))
    drawn = {plot.name: plot for plot in plots(summary)}
    assert drawn["cost-insertion"].draw(LIGHT).axes[0].get_xscale() == "symlog"
    assert drawn["cost-deletion"].draw(LIGHT).axes[0].yaxis_inverted()
    assert drawn["cost-insertion"].alt.endswith("Pareto front, cheapest first: ib.")


@pytest.mark.parametrize(
    ("costs", "labels"),
    [
        ((1.02, 1.1, 1.6), ["1", "1.2", "1.4", "1.6"]),
        ((1, 3.1, 9), ["1", "2", "5", "10"]),
        ((1.04, 50, 4100), ["1", "10", "100", "1000", "10000"]),
        ((0.02, 30, 3e6), ["0.001", "0.1", "10", "1000", "100000", "1e7"]),
        ((0, 0.86, 230), ["0", "1", "10", "100"]),
        ((0, 0.87, 2.1), ["0", "1", "2"]),
        ((0, 0, 0), ["0"]),
    ],
)
def test_ticks_of_the_cost_axis_are_plain_numbers_that_keep_apart(board, costs, labels):
    cost = dict(zip(LEVELS, costs, strict=True))
    rows = [
        dataclasses.replace(r, value=cost[r.method]) if r.metric == "passes" and r.method in cost else r
        for r in board.rows
    ]
    figure = plots(summarise(rows, board.summary.metrics, methods=list(METHODS)))[0].draw(LIGHT)
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = figure.axes[0].get_xlim()
    shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert [label.get_text() for label in shown] == labels
    boxes = [label.get_window_extent() for label in shown]
    assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))
    assert not any(label.get_text() for label in axis.get_minorticklabels())


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained(page):
    parsed = Page(page)
    assert parsed.open == []
    for tag, attrs in parsed.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/png;base64,", "#")), (tag, attrs[name][:60])
    assert not re.search(r"@import|url\(|https?:", page)
    targets = {attrs["id"] for _, attrs in parsed.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in parsed.all("a")} <= targets
    assert len(targets) == sum("id" in attrs for _, attrs in parsed.tags), "an id is given twice"


def test_a_sheet_of_many_methods_keeps_the_size_of_its_maps(board, undrawn):
    pictures = Pictures([Picture(png(width=4000), "many methods")], {("ib", 0): Picture(png(), "ib on it")})
    shown = Page(report_html(board.summary, board.run, rows=board.rows, pictures=pictures)).all("img")
    assert [one["style"] for one in shown if "style" in one] == ["min-width:3000px"]


def test_everything_that_users_named_is_escaped(page):
    assert page.count("<script") == 1 and "alert" in page
    for text in (HOSTILE, "no <attention> here", "All <methods>", "RISE <b>", "resnet<18>", "mean <i>"):
        assert text not in page
        assert text in "".join(Page(page).text)
    assert "a&amp;b" in page


def test_policy_allows_the_own_script_only(page):
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for attrs in Page(page).all("meta") if "http-equiv" in attrs)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_page_is_accessible(page):
    parsed = Page(page)
    assert parsed.all("html") == [{"lang": "en"}]
    assert len(parsed.all("h1")) == 1
    assert len(parsed.all("img")) > 5
    for attrs in parsed.all("img"):
        assert attrs["alt"] and attrs["width"].isdigit() and attrs["height"].isdigit()
    assert all(attrs.get("scope") in ("row", "col") for attrs in parsed.all("th"))
    scrolled = [attrs for attrs in parsed.all("div") if attrs.get("class", "").startswith("scroll")]
    assert len(scrolled) >= len(parsed.all("table"))
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolled)


@pytest.mark.parametrize("theme", [":root {", "@media screen and (prefers-color-scheme: dark)"])
def test_text_has_contrast(page, theme):
    """WCAG AA: 4.5 to 1 for all text colours on all backgrounds they stand on."""
    block = page[page.index(theme) :]
    colours = dict(re.findall(r"--(\w+): #(\w+);", block[: block.index("}")]))

    def luminance(colour: str) -> float:
        wide = colour if len(colour) == 6 else "".join(2 * sign for sign in colour)
        parts = [value / 255 for value in bytes.fromhex(wide)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for text in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("paper", "tint", "mark"):
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_page_says_who_leads_and_what_did_not_run(page):
    text = re.sub(r"\s+", " ", "".join(Page(page).text))
    assert re.search(r"Best mean rank over 3 metrics: ib, 1\.00 \[1\.00, 1\.\d+\]\. No other method's interval", text)
    gaps = text[text.index("What did not run, and why", 500) :]
    assert "rollout" in gaps and "not applicable" in gaps and "4 of 12" in gaps and "OutOfMemoryError" in gaps
    for title in ("What was measured", "Leaderboard", "How to read it", "Against grad_cam", "Ranks", "Curves"):
        assert title in text
    assert "higher is better" in text and "seed" in text and "cpu" in text


def test_overlap_is_told(board, undrawn):
    rows = [
        Row(i, "x", method, "insertion", value)
        for i in range(10)
        for method, value in (("a", float(i)), ("b", 8.9 - i))
    ]
    summary = summarise(rows, board.summary.metrics[:1])
    assert "Its interval overlaps with b, so that lead is not certain." in report_html(summary, {})


def test_what_counts_in_the_mean_rank_is_told_as_it_was(board, undrawn):
    facts = [MetricFacts("insertion", "perturbation", "x", True), MetricFacts("infidelity", "robustness", "x", False)]
    rows = [Row(0, "x", method, fact.name, value) for fact in facts for value, method in enumerate("ab")]
    told = [re.sub(r"\s+", " ", report_html(summarise(rows, chosen), {})) for chosen in (facts, facts[1:])]
    assert "human attention; others have a rank and do not count." in told[0]
    assert "weighs alike all metrics but costs, as none here" in told[1]


def test_smallest_report(board, undrawn):
    """One image, one method, one metric, no run facts: nothing breaks, nothing is invented."""
    summary = summarise([Row(0, "x", "a", "insertion", 0.5)], board.summary.metrics[:1])
    text = report_html(summary, {})
    Page(text)
    assert "Everything ran" in text and "no ranking was possible" in text
    assert "nan" not in re.sub(r"<(style|script)>.*?</\1>|base64,[^\"]*", "", text, flags=re.DOTALL).lower()
    assert text_table(summary) and csv_table(summary) and json_summary(summary)


def test_nothing_ran_still_reports(board):
    """Also with a cost, against which there is nothing to draw."""
    rows = [Row(0, "x", "a", facts.name, status="failed", reason="broke") for facts in board.summary.metrics]
    summary = summarise(rows, board.summary.metrics)
    assert Notes(summary).texts == ["a failed on 1 of 1 images: broke"]
    assert "broke" in report_html(summary, {}, rows=rows)
    assert plots(summary) == []


def test_resumed_run_says_so(board, undrawn):
    starts = [
        {"device": "cpu", "command": "a b"},
        {"device": "cuda", "command": "a b"},
        {"device": "cpu", "command": "a c"},
    ]
    run = {"info": starts[0], "resumed": starts[1:]}
    text = re.sub("<[^>]+>", " ", report_html(board.summary, run))
    assert re.search(r"resumed\s+2 times", text) and re.search(r"device when resumed\s+cuda", text)
    assert re.search(r"a b\na c\s", text)  # each command once


def test_bars_place_values():
    place = scale([Interval(1.0, 0.0, 2.0, 9), Interval(3.0, 2.0, 4.0, 9)])
    assert [place(value) for value in (0.0, 2.0, 4.0)] == [2.0, 50.0, 98.0]
    place = scale([Interval(1.0, 1.0, 1.0, 9), Interval(1e4, 1e4, 1e4, 9)])
    assert place(100.0) == pytest.approx(50.0)
    assert scale([Interval(1.0, 1.0, 1.0, 9)]) is None


def test_picture_must_be_png():
    assert Picture(png(7, 9), "x").size == (7, 9)
    with pytest.raises(ValueError, match="must be the content of a PNG file, got b'GIF89a'"):
        Picture(b"GIF89a", "x")


def test_extremes_are_those_of_the_page(board, page):
    best, worst = board.extremes()["ib"]
    assert all(f"{case.value:.3f}"[:4] in page for case in best + worst)
    assert best[0].value > worst[0].value and len(best) == 3
