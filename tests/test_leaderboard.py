"""Saving, reading and resuming a leaderboard."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ib_explain.leaderboard import Leaderboard
from ib_explain.pictures import Picture, Pictures
from ib_explain.results import RunStore
from ib_explain.rows import Row
from ib_explain.summary import summarise_curves
from tests.reporting import INFO, SETTINGS, make_rows, make_store, png


def test_saved_where_it_ran(tmp_path, undrawn):
    folder = tmp_path / "run"
    store = make_store(folder)
    store.finish()
    before = (folder / "rows.csv").read_bytes()
    page = Leaderboard.read(folder).save(folder)
    assert page == folder / "report.html"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"run.json", "rows.csv", "summary.csv", "summary.json", "summary.md", "figures/ranks.png"} <= names
    assert not [name for name in names if "/." in f"/{name}"]
    assert (folder / "rows.csv").read_bytes() == before


def test_a_notebook_shows_the_tables(board):
    assert board._repr_markdown_() == board.to_markdown()
    assert repr(board).startswith("<Leaderboard of ") and "\n" not in repr(board)


def test_saved_elsewhere_can_be_read_and_resumed(board, tmp_path, undrawn):
    board.save(tmp_path / "copy")
    again = Leaderboard.read(tmp_path / "copy")
    assert again.to_csv() == board.to_csv()
    assert [np.array_equal(a.scores, b.scores) for a, b in zip(again.curves, board.curves, strict=True)] == [True] * 3
    store = RunStore.open(tmp_path / "copy", SETTINGS)
    assert [store.done(batch) for batch in range(4)] == [True, True, True, False]
    board.save(tmp_path / "copy")  # again: the same run may be written over itself
    store.append(3, [Row(99, "new", "ib", "energy_inside", 0.5)])
    with pytest.raises(ValueError, match="holds more of this run than is to be saved"):
        board.save(tmp_path / "copy")


def test_other_results_are_not_overwritten(board, tmp_path, undrawn):
    RunStore.open(tmp_path / "other", {"model": "another"})
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "report.html").write_text("mine")
    for name, message in (("other", "holds another run"), ("stray", "holds report.html but no run.json")):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ValueError, match=message):
            board.save(tmp_path / name)
        assert before == {path: path.read_bytes() for path in (tmp_path / name).iterdir()}


def test_unfinished_and_missing_runs(tmp_path):
    store = RunStore.open(tmp_path / "run", SETTINGS, INFO)
    with pytest.raises(ValueError, match="has no finished batch yet"):
        Leaderboard.read(tmp_path / "run")
    store.append(0, [row for row in make_rows() if row.image < 4])
    assert Leaderboard.read(tmp_path / "run").summary.images == 4
    store.run["settings"]["data"] = {"images": 6}
    (tmp_path / "run" / "run.json").write_text(json.dumps(store.run))
    with pytest.warns(UserWarning, match=r"holds 4 of the run's 6 images; the same command goes on"):
        Leaderboard.read(tmp_path / "run")
    with pytest.raises(ValueError, match="no rows of reference method 'grad-cam'; did you mean 'grad_cam'"):
        Leaderboard.read(tmp_path / "run", reference="grad-cam")
    with pytest.raises(ValueError, match="holds no run"):
        Leaderboard.read(tmp_path / "nothing")


def test_a_board_that_was_read_keeps_its_pictures(tmp_path, undrawn):
    folder = tmp_path / "run"
    store = make_store(folder)
    store.finish()
    sheet, case = Picture(png(), "a sheet", "maps"), Picture(png(), "a case")
    Leaderboard.of(store, pictures=Pictures([sheet], {("ib", 1): case})).save(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    board = Leaderboard.read(folder)
    assert board.pictures == Pictures([sheet], {("ib", 1): case})
    board.save(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    (folder / "figures" / "cases-0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pictures.json is damaged .*; delete it to go on without"):
        Leaderboard.read(folder)


def test_a_board_draws_by_the_runs_seed(board):
    assert board.summary.seed == SETTINGS["seed"] != 0
    for seed, same in ((SETTINGS["seed"], True), (0, False)):
        expected, *_ = summarise_curves(board.curves, seed=seed)
        assert np.array_equal(board.mean_curves()[0].low, expected.low) == same
