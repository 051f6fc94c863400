"""Tables of a leaderboard: text, Markdown, CSV, JSON, and the numbers in them."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from ib_explain.leaderboard import Leaderboard
from ib_explain.rows import Row
from ib_explain.summary import Interval, MetricFacts, summarise
from ib_explain.tables import markdown_tables, number_format, shown_mean_rank, verdict
from tests.reporting import METHODS, METRICS, make_store


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return Leaderboard.of(make_store())


def test_text_table_is_aligned_and_complete(board):
    text = board.table(width=300)
    lines = text.splitlines()
    assert re.search(r"insertion ↑ +deletion ↓ +energy ↑ \[3\] +passes ↓", lines[0])
    header = lines[0]
    assert lines[3].startswith("ib ")  # best mean rank
    for metric in ("insertion", "deletion"):
        column = header.index(metric)
        points = {line.index(".", column) for line in lines[3:6]}
        assert len(points) == 1, "decimal points stand below each other"
    assert re.search(r"^ib +1\.00\* .* 0\.7\d+\* \[0\.\d+, 0\.\d+\]", lines[3])
    assert re.search(r"^rollout +– +n/a +\[\d\] +n/a", lines[6])
    assert "not applicable: rollout (no <attention> here)" in text
    assert "ib failed on 4 of 12 images; the mean is over the others: OutOfMemoryError: 2 GiB" in text
    assert "undefined on 1 of 12 images" in text
    assert "Means over 12 images with 95 % bootstrap percentile intervals (10000 resamples of images, seed 3)." in text


def test_text_table_breaks_into_blocks_no_wider_than_the_terminal(board):
    text = board.table(width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert sum(line.startswith("ib ") for line in text.splitlines()) > 1
    assert all(f"{metric} " in text for metric in METRICS)
    assert str(board) == board.table()


def test_markdown_rows_have_as_many_cells_as_the_head(board):
    tables = re.findall(r"(?:^\|.*\|$\n?)+", board.to_markdown(), re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "| $rise\\_$" not in board.to_markdown() and "$rise_$\\|" in board.to_markdown()
    assert re.search(r"\| ib \| \*\*1\.00\*\*", tables[0])
    assert "n/a<sup>" in tables[0] and "reference" in tables[1]
    assert re.search(r"\| ib \| ▲ \+0\.\d+ \[\+0\.\d+, \+0\.\d+\]", tables[1])


def test_csv_and_json_keep_full_precision(board):
    lines = {(line["method"], line["metric"]): line for line in csv.DictReader(io.StringIO(board.to_csv()))}
    assert len(lines) == len(METHODS) * len(METRICS)
    for (method, metric), cell in board.summary.cells.items():
        line = lines[method, metric]
        assert float(line["mean"] or "nan") == pytest.approx(cell.mean, rel=0, abs=0, nan_ok=True)
        assert (int(line["n"]), line["status"], line["reason"]) == (cell.n, cell.status, cell.reason)
    content = json.loads(board.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    cells = {(cell["method"], cell["metric"]): cell for cell in content["cells"]}
    assert cells["ib", "insertion"]["mean"] == board.summary.cells["ib", "insertion"].mean
    assert cells["rollout", "insertion"]["mean"] is None
    assert content["metrics"][0] == {"name": "insertion", "derived": False} | METRICS["insertion"]


@pytest.mark.parametrize(
    ("intervals", "value", "shown"),
    [
        ([Interval(0.61234, 0.60, 0.624, 9)], 0.61234, "0.612"),
        ([Interval(61.234, 59.0, 63.0, 9)], 61.234, "61.2"),
        ([Interval(6123.4, 5900.0, 6300.0, 9)], 6123.4, "6123"),
        ([Interval(1.04, 1.04, 1.04, 9), Interval(4000.0, 4000.0, 4000.0, 9)], 1.04, "1.04"),
        ([Interval(1.04, 1.04, 1.04, 9), Interval(4000.0, 4000.0, 4000.0, 9)], 4000.0, "4000"),
        ([Interval(1e-3, 0.99e-3, 1.01e-3, 9), Interval(30.0, 29.0, 31.0, 9)], 1e-3, "0.001"),
        ([Interval(1e-9, 0.9e-9, 1.1e-9, 9)], 1e-9, "1e-09"),
        ([Interval(2e-4, -0.012, 0.013, 9), Interval(0.3, 0.29, 0.31, 9)], 2e-4, "0.000"),
        ([], 0.5, "0.5"),
    ],
)
def test_numbers_show_what_is_certain(intervals, value, shown):
    assert number_format(intervals)(value) == shown


def test_difference_is_judged_by_direction():
    facts = [MetricFacts("up", "p", "u", True), MetricFacts("down", "p", "u", False)]
    rows = [
        Row(i, "x", method, metric, float(i) + shift)
        for i in range(5)
        for method, shift in (("ref", 0.0), ("more", 1.0))
        for metric in ("up", "down")
    ]
    text = markdown_tables(summarise(rows, facts, "ref"))
    assert re.search(r"\| more \| ▲ \+1 +\| ▼ \+1 +\|", text)


def test_three_decades_share_their_digits():
    def forms(large):
        form = number_format([Interval(1.0, 0.99, 1.01, 9), Interval(large, large - 0.1, large + 0.1, 9)])
        return form(1.0), form(large)

    assert forms(500.0) == ("1.000", "500.000") and forms(1001.0) == ("1", "1001")


def test_an_interval_that_ends_at_zero_says_nothing():
    higher = MetricFacts("insertion", "perturbation", "probability", higher_is_better=True)
    intervals = [Interval(1, 0, 2, 9), Interval(-1, -2, 0, 9), Interval(1, 0.1, 2, 9)]
    assert [verdict(interval, higher) for interval in intervals] == [0, 0, 1]


def test_a_method_that_lacks_ranks_is_never_the_best():
    values = {"insertion": {"a": 1, "b": 1, "c": 0}, "deletion": {"b": 1, "c": 1}}
    rows = [Row(i, "x", method, name, v) for name, of in values.items() for method, v in of.items() for i in range(2)]
    facts = [MetricFacts(name, "perturbation", "probability", higher_is_better=name == "insertion") for name in values]
    summary = summarise(rows, facts)
    assert summary.mean_ranks["a"].mean == summary.mean_ranks["b"].mean == 1.5
    assert [shown_mean_rank(summary, method).mark for method in "abc"] == ["", "*", ""]
