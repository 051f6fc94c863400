"""The run folder: what is stored reads back identical, half-written batches are found, other runs are refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ib_explain.results import RunStore, check_folder
from ib_explain.rows import CurveBatch, Row, join_curves, read_rows

SETTINGS = {"model": {"name": "resnet18"}, "seed": 0, "methods": {"rise": {"masks": 8}}}
METHODS, METRICS, SIZE = ("ib", "rise"), ("deletion", "insertion"), 3


def batch_of(batch: int) -> list[Row]:
    """Values with all 53 bits, reproducible from the batch's number alone."""
    rng = np.random.default_rng(batch)
    return [
        Row(batch * SIZE + i, f'dir/{i}, "quoted".jpg', method, metric, rng.standard_normal() / 3)
        for i in range(SIZE)
        for method in METHODS
        for metric in METRICS
    ]


def curves_of(batch: int) -> list[CurveBatch]:
    scores = np.random.default_rng(batch).random((SIZE, 5), dtype=np.float32)
    return [CurveBatch("ib", "insertion", np.arange(SIZE) + batch * SIZE, np.linspace(0, 1, 5), scores)]


def fill(store: RunStore, batches: range) -> None:
    for batch in batches:
        if not store.done(batch):
            store.append(batch, batch_of(batch), curves_of(batch))


def complete(folder: Path, batches: int = 4) -> bytes:
    """rows.csv of an uninterrupted run."""
    store = RunStore.open(folder, SETTINGS)
    fill(store, range(batches))
    store.finish()
    return (folder / "rows.csv").read_bytes()


def test_rows_read_back_identical(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    rows = [
        Row(0, "naïve\nname", "ib", "insertion", 0.1 + 0.2),
        Row(0, "naïve\nname", "ib", "deletion", math.inf),
        Row(0, "naïve\nname", "rise", "insertion", math.nan),
        Row(0, "naïve\nname", "lrp", "insertion", status="not_applicable", reason='no rule for "GELU",\nsorry'),
        Row(0, "naïve\nname", "iba", "insertion", status="failed", reason="x" * 200_000),
    ]
    store.append(7, rows)
    back = {row.key: row for row in RunStore.read(tmp_path / "run").rows()}
    assert len(back) == 5
    assert back[0, "ib", "insertion"].value == 0.1 + 0.2
    assert back[0, "ib", "insertion"].name == "naïve name"
    assert back[0, "ib", "deletion"].value == math.inf
    assert math.isnan(back[0, "rise", "insertion"].value) and back[0, "rise", "insertion"].status == "ok"
    assert back[0, "lrp", "insertion"].reason == 'no rule for "GELU", sorry'
    assert back[0, "iba", "insertion"].status == "failed" and len(back[0, "iba", "insertion"].reason) == 500
    assert [row.key for row in store.rows()] == sorted(back)


def test_name_that_is_no_utf8(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    store.append(0, [Row(0, os.fsdecode(b"caf\xe9.jpg"), "ib", "insertion", 1.0)])
    assert store.rows()[0].name == "caf\\udce9.jpg"


def test_every_cut_leaves_whole_batches(tmp_path):
    """Cut at each byte of the second batch's first and last lines: no half batch survives, the file ends the same."""
    whole = complete(tmp_path / "whole", 2)
    folder = tmp_path / "run"
    path = folder / "rows.csv"
    second = whole.index(b"\n3,")
    for cut in [0, 5, *range(second, second + 70), *range(len(whole) - 70, len(whole))]:
        RunStore.open(folder, SETTINGS)
        path.write_bytes(whole[:cut])
        store = RunStore.open(folder, SETTINGS)
        assert store.done(0) == (cut > second) and not store.done(1)
        assert path.read_bytes().endswith(b"\n")
        fill(store, range(2))
        assert path.read_bytes() == whole
    assert RunStore.open(folder, SETTINGS).dropped == 0


def test_cut_between_lines_is_counted(tmp_path):
    whole = complete(tmp_path / "run", 2)
    (tmp_path / "run" / "rows.csv").write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    assert RunStore.open(tmp_path / "run", SETTINGS).dropped == SIZE * 4 - 2


@pytest.mark.parametrize("damage", [b"\0\0\0\0", b'3,"open quote,ib', b"x,y\n\n"])
def test_damaged_line_costs_its_batch_only(tmp_path, damage):
    whole = complete(tmp_path / "run", 3)
    lines = whole.splitlines(keepends=True)
    lines[1 + SIZE * 4] = damage.rstrip(b"\n") + b"\n"
    (tmp_path / "run" / "rows.csv").write_bytes(b"".join(lines))
    store = RunStore.open(tmp_path / "run", SETTINGS)
    assert [store.done(batch) for batch in range(3)] == [True, False, True]
    fill(store, range(3))
    store.finish()
    assert (tmp_path / "run" / "rows.csv").read_bytes() == whole


def test_killed_process_resumes_to_the_same_bytes(tmp_path):
    """A process that is killed (SIGKILL) while it appends, again and again, ends with the uninterrupted run's file."""
    whole = complete(tmp_path / "whole", 30)
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_results import *
store = RunStore.open({str(tmp_path / "run")!r}, SETTINGS)
for batch in range(30):
    if not store.done(batch):
        print(batch, flush=True)
        store.append(batch, batch_of(batch), curves_of(batch))
"""
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            for _ in range(4):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    store = RunStore.open(tmp_path / "run", SETTINGS)
    assert store.done(2) and not store.done(29)
    fill(store, range(30))
    store.finish()
    assert (tmp_path / "run" / "rows.csv").read_bytes() == whole


def test_processes_share_and_change_in_number(tmp_path):
    whole = complete(tmp_path / "whole", 5)
    folder = tmp_path / "run"
    for rank in range(2):  # two processes, the second one dies in batch 3
        store = RunStore.open(folder, SETTINGS, rank=rank)
        fill(store, range(rank, 4, 2))
    path = folder / "rows-1.csv"
    path.write_bytes(path.read_bytes()[:-9])
    store = RunStore.open(folder, SETTINGS)  # one process goes on
    assert [store.done(batch) for batch in range(5)] == [True, True, True, False, False]
    fill(store, range(5))
    store.finish()
    assert (folder / "rows.csv").read_bytes() == whole
    assert not path.exists()


def test_interrupted_finish_counts_no_batch_twice(tmp_path):
    folder = tmp_path / "run"
    for rank in range(2):
        fill(RunStore.open(folder, SETTINGS, rank=rank), range(rank, 4, 2))
    other = (folder / "rows-1.csv").read_bytes()
    RunStore.read(folder).finish()
    merged = (folder / "rows.csv").read_bytes()
    (folder / "rows-1.csv").write_bytes(other)  # as if killed before it was removed
    store = RunStore.open(folder, SETTINGS)
    assert len(store.rows()) == 4 * SIZE * 4
    store.finish()
    assert (folder / "rows.csv").read_bytes() == merged


def test_curves_join_in_image_order(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    fill(store, range(1, 3))
    fill(store, range(1))
    (curve,) = RunStore.read(tmp_path / "run").curves()
    assert curve.images.tolist() == list(range(3 * SIZE))
    expected = np.concatenate([curves_of(batch)[0].scores for batch in range(3)])
    np.testing.assert_array_equal(curve.scores, expected)


def test_curves_without_rows_do_not_count(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    fill(store, range(2))
    (tmp_path / "run" / "rows.csv").unlink()
    assert RunStore.open(tmp_path / "run", SETTINGS).curves() == []


def test_a_batch_whose_curves_cannot_be_read_is_not_finished(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    fill(store, range(2))
    (expected,) = store.curves()
    path = tmp_path / "run" / "curves" / "batch-000001.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert len(RunStore.read(tmp_path / "run").curves()[0].images) == SIZE
    store = RunStore.open(tmp_path / "run", SETTINGS)
    assert store.done(0) and not store.done(1)
    fill(store, range(1, 2))
    (curve,) = RunStore.read(tmp_path / "run").curves()
    np.testing.assert_array_equal(curve.scores, expected.scores)
    (tmp_path / "run" / "run.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="run.json is not a run of ib_explain; choose another folder"):
        RunStore.read(tmp_path / "run")


def test_curves_must_share_fractions(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    fill(store, range(1))
    store.append(1, batch_of(1), [CurveBatch("ib", "insertion", [9], [0.0, 1.0], [[0.0, 1.0]])])
    with pytest.raises(ValueError, match="the curves of 'ib', 'insertion' must have the same fractions"):
        store.curves()


def test_another_run_is_refused_and_nothing_written(tmp_path):
    complete(tmp_path / "run", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = {"model": {"name": "resnet50"}, "seed": 0, "methods": {"rise": {}}, "batch_size": 8}
    message = (
        "holds another run: model.name is 'resnet18' there and 'resnet50' here; "
        "methods.rise.masks is 8 there and absent here; batch_size is absent there and 8 here. Choose another folder"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        RunStore.open(tmp_path / "run", other)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_order_of_settings_does_not_matter_and_info_may_differ(tmp_path):
    complete(tmp_path / "run", 1)
    turned = dict(reversed(SETTINGS.items()))
    store = RunStore.open(tmp_path / "run", turned, {"command": "again"})
    assert store.done(0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"][-1] == {"command": "again"}


def test_strange_folders_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="must be a folder, it is a file"):
        RunStore.open(file, SETTINGS)
    stray = tmp_path / "stray"
    (stray / "figures").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds figures but no run.json"):
        RunStore.open(stray, SETTINGS)
    with pytest.raises(ValueError, match="holds no run"):
        RunStore.read(stray)
    with pytest.raises(ValueError, match="process 0 must open"):
        RunStore.open(tmp_path / "new", SETTINGS, rank=1)
    with pytest.raises(ValueError, match="several processes need a common folder"):
        RunStore.open(None, SETTINGS, rank=1)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    for key, value in (("settings", []), ("info", 5), ("resumed", {})):
        whole = {"format": 1, "settings": {}, "info": {}, "resumed": []}
        (tmp_path / "old" / "run.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(ValueError, match="run.json is not a run of ib_explain; choose another folder"):
            check_folder(tmp_path / "old", SETTINGS)
    (tmp_path / "old" / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"it cannot be read \(RecursionError\); delete it to begin again"):
        check_folder(tmp_path / "old", SETTINGS)
    (tmp_path / "old" / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="must have format 1, got 99"):
        check_folder(tmp_path / "old", SETTINGS)
    (tmp_path / "old" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="not a run of ib_explain"):
        check_folder(tmp_path / "old", SETTINGS)


def test_a_run_that_another_start_has_joined_is_not_undone(tmp_path):
    first = RunStore.open(tmp_path / "run", SETTINGS)
    second = RunStore.open(tmp_path / "run", SETTINGS, {"command": "the same"})
    first.undo_if_empty()
    assert (tmp_path / "run" / "run.json").is_file()
    second.append(0, batch_of(0))
    assert len(RunStore.read(tmp_path / "run").rows()) == len(batch_of(0))
    alone = RunStore.open(tmp_path / "alone", SETTINGS)
    alone.undo_if_empty()
    assert not (tmp_path / "alone").exists()


def test_foreign_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns image,name"):
        read_rows(path)


@pytest.mark.parametrize("value", [math.nan, object(), {1, 2}])
def test_settings_must_be_json(tmp_path, value):
    with pytest.raises(TypeError, match="settings must hold only what JSON can"):
        RunStore.open(tmp_path / "run", {"x": value})
    assert not (tmp_path / "run").exists()


def test_append_refuses_what_would_not_read_back(tmp_path):
    store = RunStore.open(None, SETTINGS)
    row = Row(0, "a", "ib", "insertion", 1.0)
    with pytest.raises(ValueError, match="batch 0 has no rows"):
        store.append(0, [])
    with pytest.raises(ValueError, match="more than one row for the same image"):
        store.append(0, [row, row])
    store.append(0, [row])
    with pytest.raises(ValueError, match="batch 0 is already stored"):
        store.append(0, [row])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": -1}, "index >= 0, got -1"),
        ({"method": ""}, "method must be a name on one line"),
        ({"metric": "a\nb"}, "metric must be a name on one line"),
        ({"status": "fine"}, "one of ok, not_applicable, failed, got 'fine'"),
        ({"status": "failed"}, "must have a reason and no value"),
        ({"status": "failed", "value": 1.0, "reason": "broke"}, "must have a reason and no value"),
    ],
)
def test_bad_rows(changed, message):
    with pytest.raises(ValueError, match=message):
        Row(**{"image": 0, "name": "a", "method": "ib", "metric": "insertion"} | changed)


def test_bad_curves():
    with pytest.raises(ValueError, match=re.escape("must have scores (images, fractions) = (2, 3), got (3, 2)")):
        CurveBatch("ib", "insertion", [0, 1], [0, 0.5, 1], np.zeros((3, 2)))


def test_a_batch_whose_curves_are_gone_is_not_finished(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    fill(store, range(2))
    (tmp_path / "run" / "curves" / "batch-000001.npz").unlink()
    store = RunStore.open(tmp_path / "run", SETTINGS)
    assert store.done(0) and not store.done(1)


def test_a_batch_that_another_process_measured_again_counts(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS)
    fill(store, range(3))
    store.finish()
    (tmp_path / "run" / "curves" / "batch-000001.npz").unlink()
    first, second = (RunStore.open(tmp_path / "run", SETTINGS, rank=rank) for rank in (0, 1))
    assert not first.done(1)
    fill(second, range(1, 2))
    first.finish()
    assert all(RunStore.read(tmp_path / "run").done(batch) for batch in range(3))


def test_joined_curves_stay_with_their_images():
    scores = np.arange(8.0).reshape(4, 2)
    parts = [CurveBatch("a", "insertion", images, [0, 1], scores[images]) for images in ([2, 3], [1, 0])]
    joined = join_curves(parts)
    assert joined.images.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(joined.scores, scores)
