"""A run that is extended: only what is new is measured, the end is the file of one whole run, nothing old is lost."""

from __future__ import annotations

import copy
import gc
import sys

import numpy as np
import pytest

from ib_explain.leaderboard import Leaderboard
from ib_explain.pictures import Pictures
from ib_explain.results import RunStore
from ib_explain.rows import CurveBatch, Row
from tests.benchmarking import batches, half_masks, measure

METHODS, METRICS = ["center_gaussian", "grad_cam", "random"], ["insertion", "energy_inside"]
ASKED: list[int] = []  # batches that `mine` was called with
STOP_AT: set[int] = set()


def mine(model, x, target):
    ASKED.append(len(x))
    if len(ASKED) in STOP_AT:
        raise KeyboardInterrupt
    return x.abs().mean(1)


def other(model, x, target):
    return x.square().mean(1)


@pytest.fixture(autouse=True)
def fresh(undrawn, monkeypatch):
    monkeypatch.setattr(sys.modules["ib_explain.benchmark"], "draw_pictures", lambda *_: Pictures())
    ASKED.clear()
    STOP_AT.clear()


@pytest.fixture
def data(x):
    masks = half_masks(len(x)).split(2)
    return [{"image": part, "label": labels, "mask": m} for (part, labels), m in zip(batches(x), masks, strict=True)]


def rows_file(folder):
    return (folder / "rows.csv").read_bytes()


def test_methods_and_metrics_are_added_to_the_same_file_as_a_whole_run_gives(host, data, tmp_path):
    measure(host, data, [*METHODS, mine], METRICS, out=tmp_path / "run")
    assert len(ASKED) == 3
    all_methods, all_metrics = (
        [other, *METHODS, mine],
        ["deletion", *METRICS, "forward_passes", "sparsity_max_over_mean"],
    )
    whole = measure(host, data, all_methods, all_metrics, out=tmp_path / "whole")
    ASKED.clear()
    measure(host, data, [other, *METHODS, mine], METRICS, out=tmp_path / "run", extend=True)
    assert ASKED == []  # it lacks nothing
    board = measure(host, data, all_methods, all_metrics, out=tmp_path / "run", extend=True)
    assert rows_file(tmp_path / "run") == rows_file(tmp_path / "whole")
    assert board.to_csv() == whole.to_csv()
    for ours, theirs in zip(board.curves, whole.curves, strict=True):
        assert (ours.method, ours.metric) == (theirs.method, theirs.metric)
        np.testing.assert_array_equal(ours.scores, theirs.scores)
    assert board.run["settings"] == whole.run["settings"] and board.run["fingerprint"] == whole.run["fingerprint"]
    assert len(board.run["resumed"]) == 2
    ASKED.clear()
    again = measure(host, data, all_methods, all_metrics, out=tmp_path / "run")  # an extended run is a run
    assert ASKED == [] and again.to_csv() == whole.to_csv()


def test_what_differs_by_more_or_lacks_something_is_refused_and_left_alone(host, data, tmp_path):
    measure(host, data, METHODS, METRICS, out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    more = [*METHODS, "edges"]
    for methods, metrics, options, message in (
        (more, METRICS, {}, r"method edges is only here. Choose another folder, or extend the run \(extend=True"),
        (METHODS, [*METRICS, "deletion"], {}, r"metric deletion is only here.*extend the run"),
        (more[1:], METRICS, {"extend": True}, "method center_gaussian is only there.*or the same settings"),
        (more, METRICS[1:], {"extend": True}, "metric insertion is only there"),
        (more, METRICS, {"extend": True, "seed": 1}, "seed is 0 there and 1 here"),
        (
            {"grad_cam": ("grad_cam", {"relu": False}), **{name: name for name in more if name != "grad_cam"}},
            METRICS,
            {"extend": True},
            r"methods\.grad_cam",
        ),
        (more, METRICS, {"extend": True, "images": 4}, "data.images is 6 there and 4 here"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(host, data, methods, metrics, out=tmp_path / "run", **options)
    with pytest.raises(TypeError, match="extend must be True or False, got 1"):
        measure(host, data, more, METRICS, out=tmp_path / "run", extend=1)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_to_extend_a_run_that_is_not_there_is_to_begin_it(host, data, tmp_path):
    board = measure(host, data, METHODS, METRICS, out=tmp_path / "run", extend=True)
    assert board.summary.images == 6 and board.run["resumed"] == []


def test_an_extension_that_is_stopped_keeps_the_old_and_goes_on(host, data, tmp_path):
    former = measure(host, data, METHODS, METRICS, out=tmp_path / "run")
    extended = {"methods": [*METHODS, mine], "out": tmp_path / "run", "reference": "mine", "metrics": METRICS}
    STOP_AT.add(2)
    with pytest.raises(KeyboardInterrupt):
        measure(host, data, extend=True, **extended)
    STOP_AT.clear()
    with pytest.warns(UserWarning) as warned:
        half = Leaderboard.read(tmp_path / "run")
    told = "holds insertion of mine (and 1 more) for 2 of 6 images; the same command goes on"
    assert told in str(warned[0].message)
    for method in METHODS:
        for metric in METRICS:
            assert half.summary.cells[method, metric] == former.summary.cells[method, metric]
    assert "mine" in half.summary.methods and half.summary.reference == "mine"
    ASKED.clear()
    board = measure(host, data, **extended)  # it is that run by now
    assert len(ASKED) == 2  # of three batches
    measure(host, data, [*METHODS, mine], METRICS, out=tmp_path / "whole")
    assert rows_file(tmp_path / "run") == rows_file(tmp_path / "whole")
    assert board.summary.reference == "mine"


def test_a_fuller_run_is_not_saved_over_by_one_that_was_stopped(host, data, tmp_path):
    extended = {"methods": [*METHODS, mine], "metrics": METRICS}
    measure(host, data, out=tmp_path / "full", **extended)
    measure(host, data, METHODS, METRICS, out=tmp_path / "run")
    ASKED.clear()
    STOP_AT.add(2)
    with pytest.raises(KeyboardInterrupt):
        measure(host, data, extend=True, out=tmp_path / "run", **extended)
    before = rows_file(tmp_path / "full")
    with pytest.warns(UserWarning, match="holds insertion of mine"):
        half = Leaderboard.read(tmp_path / "run")
    with pytest.raises(ValueError, match="holds more of this run than is to be saved"):
        half.save(tmp_path / "full")
    assert rows_file(tmp_path / "full") == before


def test_an_extension_that_measured_nothing_leaves_the_run_as_it_was(host, data, tmp_path):
    former = measure(host, data, METHODS, METRICS, out=tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    STOP_AT.add(1)
    with pytest.raises(KeyboardInterrupt):
        measure(host, data, [*METHODS, mine], METRICS, extend=True, out=tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert measure(host, data, METHODS, METRICS, out=tmp_path / "run").to_csv() == former.to_csv()


def test_a_copy_whose_folder_is_gone_says_so(host, data, tmp_path):
    board = measure(host, data, METHODS, METRICS)
    other = copy.deepcopy(board)
    del board
    gc.collect()
    with pytest.raises(ValueError, match="own folder .* is gone"):
        other.save(tmp_path / "out")


# What lies in the folder

SETTINGS = {"methods": {"a": {}}, "metrics": {"insertion": {}}}
MORE = {"methods": {"a": {}, "b": {}}, "metrics": {"insertion": {}}}


def part(method, batch, count=2):
    images = [batch * count + i for i in range(count)]
    rows = [Row(image, f"image {image}", method, "insertion", image + 0.25) for image in images]
    scores = np.full((count, 3), float(ord(method)), dtype=np.float32)
    return rows, [CurveBatch(method, "insertion", np.array(images), np.linspace(0, 1, 3), scores)]


def begun(folder, batches=3):
    store = RunStore.open(folder, SETTINGS)
    for batch in range(batches):
        store.append(batch, *part("a", batch))
    store.finish()


def test_every_cut_in_an_extended_batch_leaves_the_old_one(tmp_path):
    folder = tmp_path / "run"
    begun(folder)
    store = RunStore.open(folder, MORE, extend=True)
    before = rows_file(folder)
    store.append(1, *part("b", 1))
    after = rows_file(folder)
    assert after.startswith(before)
    for cut in range(len(before), len(after) + 1):
        (folder / "rows.csv").write_bytes(after[:cut])
        found = RunStore.read(folder)
        methods = {"a"} if cut < len(after) else {"a", "b"}
        assert {row.method for row in found.rows()} == methods and len(found.rows()) == 6 + 2 * (len(methods) - 1)
        assert {curve.method for curve in found.curves()} == methods  # b's curves were there before its rows
    store = RunStore.open(folder, MORE)
    assert store.cells(0) == {("a", "insertion")} and store.cells(1) == {("a", "insertion"), ("b", "insertion")}
    for batch in (0, 2):
        store.append(batch, *part("b", batch))
    with pytest.raises(ValueError, match="batch 2 is already stored"):
        store.append(2, *part("b", 2))
    store.finish()
    curves = {curve.method: curve for curve in store.curves()}
    assert curves["b"].images.tolist() == curves["a"].images.tolist() == [0, 1, 2, 3, 4, 5]
    assert (curves["a"].scores == ord("a")).all() and (curves["b"].scores == ord("b")).all()


def test_a_cell_that_is_there_is_not_stored_again(tmp_path):
    begun(tmp_path / "run")
    store = RunStore.open(tmp_path / "run", MORE, extend=True)
    with pytest.raises(ValueError, match="more than one row for the same image, method and metric"):
        store.append(0, *part("a", 0))


def test_several_processes_extend_what_one_has_measured(tmp_path):
    begun(tmp_path / "run", 4)
    stores = [RunStore.open(tmp_path / "run", MORE, rank=rank, extend=True) for rank in range(2)]
    for batch in range(4):
        stores[batch % 2].append(batch, *part("b", batch))
    assert len(RunStore.read(tmp_path / "run").rows()) == 16  # also before they are brought together
    stores[0].finish()
    store = RunStore.open(tmp_path / "whole", MORE)
    for batch in range(4):
        store.append(batch, part("a", batch)[0] + part("b", batch)[0], part("a", batch)[1] + part("b", batch)[1])
    store.finish()
    assert rows_file(tmp_path / "run") == rows_file(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "run").glob("rows*")) == ["rows.csv"]
