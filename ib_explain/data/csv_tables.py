"""Tables that come with pictures: CSV files of boxes or of fixations, from a script or from a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["columns", "lines"]


def columns(path: Path, what: str) -> list[str]:
    """The names in the first line of a table of `what`.

    Raises:
        ValueError: there is no such file, or it is no UTF-8 text.
    """
    return next(_rows(path, what), (1, []))[1]


def lines(path: Path, needed: Sequence[str], what: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each line of a table of `what`: where it stands, for an error, and its cells by their column.

    Raises:
        ValueError: there is no such file, it is no UTF-8 text, it lacks a needed column, or a line is too short for it.
    """
    rows = _rows(path, what)
    _, names = next(rows, (1, []))
    if missing := [column for column in needed if column not in names]:
        raise ValueError(f"{path} must have the columns {', '.join(needed)}; it lacks {', '.join(missing)}")
    for number, row in rows:
        cells = dict(zip(names, row, strict=False))
        if lacking := [column for column in needed if row and column not in cells]:
            raise ValueError(f"{path}, line {number}: nothing stands under {', '.join(lacking)}")
        if row:
            yield f"{path}, line {number}", cells


def _rows(path: Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line, with its number."""
    if not path.is_file():
        raise ValueError(f"no such table of {what}: {path}")
    with path.open(newline="", encoding="utf-8-sig") as stream:  # spreadsheets begin UTF-8 with a mark of it
        reader = csv.reader(stream)
        try:
            for row in reader:
                yield reader.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} must be a table in UTF-8 text: {error}") from None
