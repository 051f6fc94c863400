"""Every example runs as a script, on tiny settings, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = {
    "class_conditional.py": ["--steps", "2", "--images", "64"],
    "compare_methods.py": ["--images", "4"],
    "for_and_against.py": ["--steps", "2", "--images", "64"],
    "leaderboard.py": ["--steps", "2", "--images", "4"],
    "quickstart.py": ["--steps", "2", "--images", "64"],
    "your_own_model.py": ["--steps", "2"],
}
WRITES = {"leaderboard.py": "leaderboard/report.html"}  # the others a picture of their name


def test_every_example_is_here():
    assert sorted(TINY) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", TINY)
def test_an_example_runs_and_writes_what_it_says(name, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning:ib_explain", str(EXAMPLES / name), *TINY[name]]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    written = WRITES.get(name, name.replace(".py", ".png"))
    assert (tmp_path / written).stat().st_size > 5000 and written in done.stdout
