"""What a pipe and a notebook get to see of long work; a terminal's bar is tqdm's."""

import io
import re
import sys

import pytest

from ib_explain import progress as module
from ib_explain.progress import Progress


@pytest.fixture
def every_line(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)


def test_a_pipe_gets_lines_with_figures_and_the_time_left(capsys, every_line):
    with Progress(3, "fit stages.1") as progress:
        for step in range(3):
            progress.step(loss=0.5 / (step + 1), bits=123.456)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"fit stages.1 {n}/3" for n in (1, 2, 3)]
    assert lines[1].split("  ")[1:3] == ["loss 0.25", "bits 123.5"]
    assert all(re.search(r"  \d+ s left$", line) for line in lines)


def test_a_note_stands_on_a_line_of_its_own_and_only_where_progress_is_shown(capsys, every_line):
    for show, said in ((True, ["edges failed"]), (False, [])):
        with Progress(3, "benchmark", show=show) as progress:
            progress.note("edges failed")
        assert capsys.readouterr().err.splitlines() == said


def test_a_last_batch_that_is_larger_than_what_is_left_ends_at_the_total(capsys, every_line):
    with Progress(100, "statistics") as progress:
        for _ in range(4):
            progress.step(32)
    assert capsys.readouterr().err.splitlines()[-1] == "statistics 100/100  0 s left"
    assert progress.done == 100


def test_a_resumed_run_starts_where_it_was_and_silence_is_silent(capsys, every_line):
    with Progress(10, "fit", done=8) as progress:
        progress.step()
    assert capsys.readouterr().err.startswith("fit 9/10")
    with Progress(10, "fit", show=False) as progress:
        progress.step(10)
    assert capsys.readouterr().err == ""


def test_few_lines_for_quick_work(capsys):
    with Progress(1000, "measure") as progress:
        for _ in range(1000):
            progress.step()
    assert len(capsys.readouterr().err.splitlines()) <= 2  # the first and the last


def test_a_notebook_gets_a_bar(monkeypatch):
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(2, "fit") as progress:
        progress.step(loss=0.5)
        progress.step(loss=0.25)
    assert "\r" in stream.getvalue() and "loss 0.25" in stream.getvalue() and "100%" in stream.getvalue()
