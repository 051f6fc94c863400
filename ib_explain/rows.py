"""One row per image, method and metric, and whole curves: what they are and how they lie in a file.

Averages are `summary`'s work, keeping them safe while they come in is `results`'.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ib_explain.texts import one_line

__all__ = ["COLUMNS", "STATUSES", "WITH_CURVES", "CurveBatch", "Row", "curves_to_npz", "join_curves"]
__all__ += ["read_curves", "read_rows", "rows_to_csv"]

STATUSES = ("ok", "not_applicable", "failed")
COLUMNS = ("image", "name", "method", "metric", "value", "status", "reason", "batch", "batch_rows")
LONGEST_REASON = 500
WITH_CURVES = ("insertion", "deletion")  # metrics whose whole curves are kept beside their rows


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of one image: what `metric` says of `method`'s map, or why it says nothing.

    Raises:
        ValueError: a negative image index, a method or metric name that is empty or has a line break, an unknown
            status, or a status other than "ok" without a reason or with a value.
    """

    image: int
    """Index of the image in the data, 0 and up: the same however many processes share the work."""
    name: str
    """What people call the image, a file name for instance. Line breaks become spaces."""
    method: str
    metric: str
    value: float = math.nan
    """In the metric's unit; NaN with status "ok" is a metric that is undefined for this image."""
    status: str = "ok"
    """"ok", "not_applicable" (the method cannot run on this model) or "failed" (it broke down on this batch)."""
    reason: str = ""
    """On one line, cut at 500 characters."""

    def __post_init__(self) -> None:
        if self.image < 0:
            raise ValueError(f"a row's image must be an index >= 0, got {self.image}")
        for kind, text in (("method", self.method), ("metric", self.metric)):
            if not text or text != one_line(text):
                raise ValueError(f"a row's {kind} must be a name on one line, got {text!r}")
        if self.status not in STATUSES:
            raise ValueError(f"a row's status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if self.status != "ok" and not (self.reason.strip() and math.isnan(self.value)):
            raise ValueError(f"a row with status {self.status!r} must have a reason and no value")
        set_field = object.__setattr__  # the class is frozen for everybody else
        set_field(self, "image", int(self.image))
        set_field(self, "value", float(self.value))
        set_field(self, "name", sys.intern(one_line(self.name)))
        set_field(self, "reason", sys.intern(one_line(self.reason)[:LONGEST_REASON]))
        set_field(self, "method", sys.intern(str(self.method)))
        set_field(self, "metric", sys.intern(str(self.metric)))

    @property
    def key(self) -> tuple[int, str, str]:
        """Image, method, metric: what the cell is called and how rows are sorted."""
        return self.image, self.method, self.metric


@dataclass(frozen=True)
class CurveBatch:
    """Whole curves of some images: the metric's score at each fraction."""

    method: str
    metric: str
    images: np.ndarray
    """(B,) int64, image indices."""
    fractions: np.ndarray
    """(S+1,) float32 in [0, 1], the same for all images."""
    scores: np.ndarray
    """(B, S+1) float32."""

    def __post_init__(self) -> None:
        for name, kind in (("images", np.int64), ("fractions", np.float32), ("scores", np.float32)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        expected = (self.images.size, self.fractions.size)
        if self.images.ndim != 1 or self.fractions.ndim != 1 or self.scores.shape != expected:
            whose = f"curves of {self.method!r}, {self.metric!r}"
            raise ValueError(f"{whose} must have scores (images, fractions) = {expected}, got {self.scores.shape}")


def rows_to_csv(batches: Mapping[int, Sequence[Row]], *, head: bool = True) -> str:
    """The rows of these batches as CSV with `COLUMNS`, sorted by image, method, metric; `head` names the columns.

    Each line also says which batch it belongs to and how many rows that batch has.
    """
    counted = [(row, number, len(rows)) for number, rows in batches.items() for row in rows]
    counted.sort(key=lambda item: item[0].key)
    buffer = io.StringIO()
    write = csv.writer(buffer, lineterminator="\n").writerow
    if head:
        write(COLUMNS)
    for row, number, count in counted:
        # repr gives the shortest text that reads back as the same float, so resumed numbers are identical.
        value = repr(row.value) if row.status == "ok" else ""
        write((row.image, row.name, row.method, row.metric, value, row.status, row.reason, number, count))
    return buffer.getvalue()


def read_rows(path: Path) -> tuple[dict[int, list[Row]], int]:
    """The complete batches of one file by their number, and how many lines are not theirs.

    Each row says how many rows its batch has, so a batch cut off anywhere, even between two lines, is found out. Of a
    batch that was written again with more rows (see `RunStore.append`) the longer writing is read.

    Raises:
        ValueError: the file has other columns.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    head, *lines = text.split("\n")[:-1] or [""]  # what follows the last line break is half a line or nothing
    half = not text.endswith("\n")
    if head and tuple(head.split(",")) != COLUMNS:
        raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}, got {head[:120]!r}")
    found: dict[tuple[int, int], dict[tuple[int, str, str], Row]] = defaultdict(dict)
    for line in lines:
        try:
            # Line by line: an open quote in a damaged line must not swallow the next ones.
            image, name, method, metric, value, status, reason, batch, batch_rows = next(csv.reader([line]))
            row = Row(int(image), name, method, metric, float(value or "nan"), status, reason)
            found[int(batch), int(batch_rows)].setdefault(row.key, row)
        except (ValueError, csv.Error, StopIteration):  # damaged: its batch is one short and drops as a whole
            continue
    whole = {batch: list(rows.values()) for (batch, count), rows in sorted(found.items()) if len(rows) == count}
    return whole, len(lines) - sum(map(len, whole.values())) + half


def curves_to_npz(curves: Sequence[CurveBatch]) -> bytes:
    """The curves of one batch as the content of an .npz file, without pickle."""
    arrays: dict[str, np.ndarray] = {"labels": np.array([(c.method, c.metric) for c in curves], dtype=np.str_)}
    for i, curve in enumerate(curves):
        arrays |= {f"images_{i}": curve.images, f"fractions_{i}": curve.fractions, f"scores_{i}": curve.scores}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_curves(path: Path) -> list[CurveBatch]:
    """What `curves_to_npz` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return [
            CurveBatch(str(method), str(metric), arrays[f"images_{i}"], arrays[f"fractions_{i}"], arrays[f"scores_{i}"])
            for i, (method, metric) in enumerate(arrays["labels"])
        ]


def join_curves(parts: Sequence[CurveBatch]) -> CurveBatch:
    """The curves of one method and metric from several batches, images in rising order.

    Raises:
        ValueError: their fractions differ.
    """
    first = parts[0]
    for part in parts:
        if not np.array_equal(part.fractions, first.fractions):
            whose = f"the curves of {first.method!r}, {first.metric!r}"
            raise ValueError(f"{whose} must have the same fractions in all batches; they differ")
    images = np.concatenate([part.images for part in parts])
    order = np.argsort(images, kind="stable")
    scores = np.concatenate([part.scores for part in parts])
    return CurveBatch(first.method, first.metric, images[order], first.fractions, scores[order])
