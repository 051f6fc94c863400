"""The docs say what is so: links lead somewhere, tables agree with the registries, figures with the committed runs."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import ib_explain as ibx
from ib_explain.methods import METHODS
from ib_explain.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RESULTS = ROOT / "benchmarks" / "results"


def rows(page):
    """The first cells of table rows that begin with a name in code style, by that name."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) > 4:
            found.setdefault(cells[0].strip("`"), cells)
    return found


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, fragment = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.M)
            assert fragment in map(anchor, headings), target


def test_every_method_has_a_row_with_its_unit():
    table = rows(ROOT / "docs" / "methods.md")
    assert sorted(table) == sorted(METHODS)
    assert {name: cells[3] for name, cells in table.items()} == {name: METHODS.get(name).unit for name in METHODS}


def test_every_metric_has_a_row_with_its_direction_and_unit():
    table = rows(ROOT / "docs" / "metrics.md")
    for name in METRICS:
        metric = METRICS.get(name)
        assert table[name][2:4] == ["↑" if metric.higher_is_better else "↓", metric.unit], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_the_docs_calls_what_is_there(page):
    """Each block parses, what it imports from the package exists, and keywords are those of the functions."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ib_explain"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = getattr(node.func.value, "id", None)
            function = getattr({"ibx": ibx, "ib": ibx.IBAttention}.get(owner), node.func.attr, None)
            if function is None:
                assert owner not in ("ibx", "ib"), node.func.attr
                continue
            known = inspect.signature(function).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
                assert {word.arg for word in node.keywords} <= {parameter.name for parameter in known}, node.func.attr


def test_the_readmes_figures_are_those_of_the_committed_table():
    table = json.loads((RESULTS / "quality" / "reference" / "table.json").read_text())
    against = table["differences_to_best_grad_cam"]["ib seed 0"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for metric, words in (
        ("insertion_minus_deletion", "in insertion minus deletion"),
        ("degradation_10_steps", "in degradation"),
        ("road_3_shares", "in ROAD"),
        ("energy_inside", "in energy inside boxes"),
    ):
        mean, low, high = against[metric]
        assert f".{round(mean * 1000):03d} ± .{round((high - low) / 2 * 1000):03d} {words}" in text, metric


def test_the_table_of_many_passes_is_that_of_its_run():
    page = (
        (ROOT / "docs" / "quality_hosts.md").read_text(encoding="utf-8").split("## RISE and others of many passes")[1]
    )
    run = json.loads((RESULTS / "quality" / "reference" / "many_passes.json").read_text())
    lines = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(run["scores"])
    columns = ("insertion_minus_deletion", "insertion", "deletion", "degradation_10_steps", "road_3_shares")
    columns += ("energy_inside", "pointing_game", "effective_heat_ratio")
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        for cell, metric in zip(cells, columns, strict=False):
            value, _, mark = cell.partition(" ")
            assert float(value) == pytest.approx(run["scores"][name.strip("`")][metric][0], abs=5.1e-4), line
            if name.strip("`") != run["reference"]:
                _, low, high = run["differences"][name.strip("`")][metric]
                better = 1 if metric != "deletion" else -1
                assert mark == ("" if low <= 0 <= high else "▲" if low * better > 0 else "▼"), (line, metric)


def test_the_tables_of_the_hosts_are_those_of_the_committed_runs():
    page = (ROOT / "docs" / "quality_hosts.md").read_text(encoding="utf-8")
    sections = [  # with the least number of rows
        ("reference/table", "## The reference host", 20),
        ("reference/table", "### Further methods", 10),
        ("cnn/table", "pictures: a CNN", 20),
        ("vit/table", "pictures: a ViT", 20),
        ("mixer/table", "pictures: an MLP-Mixer", 20),
        ("swin/table", "pictures: a Swin", 20),
    ]
    columns = ("insertion_minus_deletion", "insertion", "deletion", "degradation_10_steps", "road_3_shares")
    columns += ("energy_inside", "pointing_game", "effective_heat_ratio")
    for file, heading, least in sections:
        scores = json.loads((RESULTS / "quality" / f"{file}.json").read_text())["scores"]
        lines = page.split(heading)[1].split("\n##")[0].splitlines()
        compared = 0
        for line in lines:
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            if not line.startswith("| `"):
                continue
            shown = [
                cell.removesuffix(" ▲").removesuffix(" ▼") for cell in cells if re.match(r"-?[01]?\.\d{3}\b", cell)
            ]
            for text, metric in zip(shown, columns, strict=True):
                assert float(text) == pytest.approx(scores[cells[0].strip("`")][metric][0], abs=5.1e-4), (line, metric)
            compared += 1
        assert compared >= least, (file, heading)
