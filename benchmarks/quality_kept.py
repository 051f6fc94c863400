"""Finished runs and fits of `quality.py`, kept without their figures and curves, from where a later run goes on.

A folder holds `fitted/NAME/`, as `IBAttention.save` writes it, and for each run `NAME/run.json` and `NAME/rows.csv.gz`.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

from ib_explain.files import write_file

RUN, ROWS = "run.json", "rows.csv"


def bring_run(kept: Path, folder: Path) -> None:
    """Lay a kept run where `ib_explain.benchmark` looks for it, unless there is one."""
    if folder.exists() or not (kept / f"{ROWS}.gz").exists():
        return
    folder.mkdir(parents=True)
    write_file(folder / RUN, (kept / RUN).read_bytes())
    write_file(folder / ROWS, gzip.decompress((kept / f"{ROWS}.gz").read_bytes()))


def keep_run(folder: Path, kept: Path) -> None:
    """Keep a run: what was measured, without what is drawn from it."""
    kept.mkdir(parents=True, exist_ok=True)
    write_file(kept / f"{ROWS}.gz", gzip.compress((folder / ROWS).read_bytes(), mtime=0))
    write_file(kept / RUN, (folder / RUN).read_bytes())


def copy_fit(source: Path, folder: Path) -> None:
    """Copy a saved bottleneck, unless there is one."""
    if source.exists() and not folder.exists():
        shutil.copytree(source, folder)
