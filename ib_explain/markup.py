"""Pieces of an HTML page: tables, cells with little bars, pictures as data URIs. All text is escaped here."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

from ib_explain.tables import Shown

__all__ = ["Number", "Picture", "Scale", "cell", "flat", "grid", "heading", "image", "named", "scale", "scroll", "uri"]

Scale = Callable[[float], float]


class Number(Protocol):
    """A mean with an interval around it; bounds may be NaN."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Picture:
    """A picture to show, as the content of a PNG file."""

    png: bytes
    caption: str
    alt: str = ""
    """For those who do not see it; the caption if empty."""

    def __post_init__(self) -> None:
        if self.png[:8] != b"\x89PNG\r\n\x1a\n" or len(self.png) < 24:
            raise ValueError(f"a picture must be the content of a PNG file, got {self.png[:8]!r}...")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height


def grid(label: str, columns: Sequence[str], body: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A wide table with one row a method in a box that scrolls, the first column staying in sight."""
    head = '<th scope="col">method</th>' + "".join(columns)
    lines = "\n".join(
        f'<tr><th scope="row" data-value="{escape(method)}">{named(method)}</th>{"".join(cells)}</tr>'
        for method, cells in body
    )
    table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>"
    return scroll(label, f'<table class="grid sortable">{table}</table>')


def scroll(label: str, table: str) -> str:
    """A box that scrolls by itself when its content is too wide, also by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>\n'


def heading(name: str, arrow: str, better: str, unit: str, note: int | None) -> str:
    """The heading of a column: what it is called, where better is, its unit."""
    direction = f' <span aria-hidden="true">{arrow}</span><span class="hidden">({better})</span>' if arrow else ""
    return f'<th scope="col">{escape(name)}{direction}{_reference(note)}<span class="unit">{escape(unit)}</span></th>'


def cell(shown: Shown, number: Number, place: Scale | None = None, kind: str = "", *, zero: bool = False) -> str:
    """A table cell.

    Args:
        shown: what stands in it.
        number: what it is sorted by and, with `place`, what the little bar below it shows.
        place: from `scale` of its column.
        kind: "better", "worse" or nothing.
        zero: whether the bar marks where zero is.
    """
    known = math.isfinite(number.mean)
    best = "best" if shown.mark == "*" else ""
    classes = f"{kind} {best}".strip()
    named_class = f' class="{classes}"' if classes else ""
    sorted_by = f' data-value="{number.mean!r}"' if known else ""
    mark = f"{shown.mark} " if shown.mark in ("▲", "▼") else ""
    said = f'<span class="hidden"> {classes}</span>' if classes else ""
    value = f'<span class="{"value" if known else "value absent"}">{mark}{_minus(shown.value)}</span>{said}'
    interval = f'<span class="interval">{_minus(shown.interval)}</span>' if shown.interval else ""
    bar = _bar(number, place, zero) if known and place else ""
    return f"<td{named_class}{sorted_by}>{value}{_reference(shown.note)}{interval}{bar}</td>"


def _bar(number: Number, place: Scale, zero: bool) -> str:
    mean = place(number.mean)
    low, high = (mean if math.isnan(bound) else place(bound) for bound in (number.low, number.high))
    origin = f'<rect class="zero" x="{place(0.0):.1f}" y="0" width="1" height="7"/>' if zero else ""
    return (
        '<svg class="strip" viewBox="0 0 100 7" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" x="0" y="3" width="100" height="1"/>{origin}'
        f'<rect class="range" x="{low:.1f}" y="2" width="{max(high - low, 0):.1f}" height="3"/>'
        f'<rect x="{mean - 1:.1f}" y="0" width="2" height="7"/></svg>'
    )


def scale(numbers: Sequence[Number]) -> Scale | None:
    """From values to 2 ... 98 across a column; logarithmic if they are positive and span more than two decades.

    None if there is nothing to tell apart.
    """
    ends = [end for number in numbers for end in (number.mean, number.low, number.high) if math.isfinite(end)]
    if not ends or max(ends) <= min(ends):
        return None
    warp: Scale = math.log if min(ends) > 0 and max(ends) > 100 * min(ends) else float
    low, high = warp(min(ends)), warp(max(ends))
    return lambda value: 2 + 96 * (warp(value) - low) / (high - low)


def _reference(note: int | None) -> str:
    return f'<sup><a href="#note-{note}" aria-label="note {note}">{note}</a></sup>' if note else ""


def named(name: str) -> str:
    """A name, escaped, that may break after its underscores."""
    return escape(name).replace("_", "_<wbr>")


def image(picture: Picture, alt: str = "", *, least: float = 0) -> str:
    """The picture itself, its size known before it is decoded; never narrower than a share of its pixels."""
    width, height = picture.size
    words = escape(alt or picture.alt or picture.caption)
    style = f' style="min-width:{round(least * width)}px"' if least else ""
    return f'<img src="{uri(picture)}" alt="{words}" width="{width}" height="{height}"{style}>'


def uri(picture: Picture) -> str:
    """The picture as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(picture.png).decode()


def _minus(text: str) -> str:
    """Escaped, with the sign that is as wide as a plus; "n/a" and the like keep their hyphens."""
    return escape(text).replace("-", "\N{MINUS SIGN}") if any(sign.isdigit() for sign in text) else escape(text)


def flat(value: Any) -> str:
    """A setting in one line: nested ones as "name value", a name alone without its label."""
    if isinstance(value, Mapping):
        return ", ".join(flat(v) if k == "name" else f"{k} {flat(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(flat, value))
    return str(value)
