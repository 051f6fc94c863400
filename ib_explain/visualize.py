"""Maps drawn over their pictures, with the unit on the colour bar: figures, contact sheets, single overlays.

Maps of one unit share one scale, from 0 to the 99.5th percentile of all their non-zero values (an arrow on the bar says
that some lie beyond), so that two maps can be compared by eye; nothing is stretched to its own minimum and maximum.
Non-negative maps run from 0, signed ones symmetrically about 0. Opacity grows with the value: at 0 the picture is seen.
Below a map the picture is grey, so that all colour there is the map's; the picture's own colours stand beside it.
Drawn without pyplot: no display is needed and no figure stays open.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ib_explain.checks import check_maps, check_positive_int
from ib_explain.colours import Scale, draw_bar, overlay, reduced
from ib_explain.data.preprocessing import Channels, denormalize
from ib_explain.files import replace_file
from ib_explain.maps import in_bits
from ib_explain.texts import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["contact_sheet", "denormalize", "is_contact_sheet", "overlay", "visualize"]

Maps = Tensor | Mapping[str, Tensor] | Sequence[Tensor]

_CELL = 1.75  # inches, the longer side of a picture
_GAP, _MARGIN, _TITLE, _NOTE, _ROW_TITLE = 0.06, 0.05, 0.21, 0.17, 0.2  # inches
SHEET_MARK = {"Source": "ib_explain contact_sheet"}  # a text in the PNG
MINUS = "\N{MINUS SIGN}"
_BAR, _BAR_BELOW, _BAR_WIDEST = 0.08, 0.36, 2 * _CELL  # inches: height, room for ticks and unit, greatest length


def visualize(
    x: Tensor,
    maps: Maps,
    *,
    model: nn.Module | None = None,
    mean: Channels = None,
    std: Channels = None,
    titles: Sequence[str] | None = None,
    unit: str | Mapping[str, str] | None = None,
    scale: str = "shared",
) -> Figure:
    """Draw a row per image: the picture, then each map over it, with a colour bar for each unit.

    Args:
        x: the images as the host sees them, (B, 3, H, W) or (B, 1, H, W) float.
        maps: (B, 1, H, W) or (B, H, W), a tensor or an array; or several, side by side: a mapping of names to maps, or
            a list of maps.
        model: the host; its data configuration in timm tells mean and std.
        mean, std: of the normalisation, one number or one a channel, where `model` does not tell them.
        titles: one a row, such as the class that is explained.
        unit: what the maps measure, written on the colour bar; a mapping of names to units where they differ. For
            "bits" and "label bits", amounts, the sum of each map is written below it. By default a map that is called
            as a registered method has that method's unit, any other is in bits.
        scale: "shared", one scale for all maps of a unit; "row", one for each image and unit, for patterns of images
            whose amounts differ widely: rows can then not be compared.

    Returns:
        A matplotlib Figure: `.savefig(path)`, or shown by a notebook after `%matplotlib inline`. A map that is all zero
        or constant is drawn as such and named below.

    Raises:
        TypeError, ValueError: other shapes than these, NaN, no way to tell mean and std, an unknown scale or unit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = denormalize(x, model=model, mean=mean, std=std).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    batch, height, width, _ = pictures.shape
    columns = _columns(maps, unit, batch, (height, width))
    row_titles = _checked_titles(titles, batch)
    if scale not in ("shared", "row"):
        raise ValueError(f"scale must be 'shared' or 'row', got {scale!r}")
    units = [column.unit for column in columns]
    named = any(column.name for column in columns)

    # The page is laid out in inches from its upper left corner.
    cell_h, cell_w = (_CELL * side / max(height, width) for side in (height, width))
    left = _MARGIN + (_ROW_TITLE if row_titles else 0)
    bar_room = _BAR + _BAR_BELOW
    step = cell_h + _NOTE + (bar_room if scale == "row" else 0)
    top = _MARGIN + (_TITLE if named else 0)
    page_w = left + (len(columns) + 1) * (cell_w + _GAP) - _GAP + _MARGIN
    page_h = top + batch * step + (bar_room if scale == "shared" else 0)
    figure = Figure(figsize=(page_w, page_h), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def box(x0: float, y0: float, w: float, h: float) -> Axes:
        return figure.add_axes((x0 / page_w, 1 - (y0 + h) / page_h, w / page_w, h / page_h))

    for row in range(batch):
        rows = slice(row, row + 1) if scale == "row" else slice(None)
        scales = {name: Scale.of([c.values[rows] for c in columns if c.unit == name], name) for name in units}
        y0 = top + row * step
        picture_axes = _show(box(left, y0, cell_w, cell_h), pictures[row])
        if row_titles:
            picture_axes.set_ylabel(_cut(row_titles[row], int(cell_h * 18)), fontsize=8, labelpad=3, parse_math=False)
        for number, column in enumerate(columns, start=1):
            x0 = left + number * (cell_w + _GAP)
            own = scales[column.unit]
            drawn = overlay(pictures[row], column.values[row], limit=own.limit, signed=own.signed)
            axes = _show(box(x0, y0, cell_w, cell_h), drawn)
            axes.set_xlabel(_note(column.values[row], column.unit), fontsize=7, labelpad=2, color="0.25")
            if row == 0 and named:
                title = shortened(column.name, int(cell_w * 14))
                axes.set_title(title, fontsize=9, pad=3, parse_math=False)
        if row == 0 and named:
            picture_axes.set_title("image", fontsize=9, pad=3)
        if scale == "row" or row == batch - 1:
            first = 1
            for name, run in itertools.groupby(units):  # one bar under each run of neighbours of one unit
                count = len(list(run))
                run_w = count * (cell_w + _GAP) - _GAP
                bar_w = min(run_w * 0.94, _BAR_WIDEST)
                x0 = left + first * (cell_w + _GAP) + (run_w - bar_w) / 2
                draw_bar(box(x0, y0 + cell_h + _NOTE, bar_w, _BAR), scales[name])
                first += count
    return figure


def contact_sheet(
    x: Tensor,
    maps: Tensor,
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    mean: Channels = None,
    std: Channels = None,
    titles: Sequence[str] | None = None,
    unit: str = "bits",
    columns: int = 6,
    thumbnail: int = 112,
) -> Path:
    """Save many images as one PNG: a grid of pairs, picture and overlay, on one scale with one colour bar.

    Args:
        x, maps, model, mean, std, unit: as for `visualize`, with one map an image.
        path: file name that ends in .png; written beside it and renamed, so that it is never half a file.
        titles: one an image, written above its pair.
        columns: pairs a row.
        thumbnail: longer side of a picture on the sheet, in pixels; larger images are reduced. 100 images make about
            2 MB at the default.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: as for `visualize`; a path that does not end in .png.
        OSError: the folder cannot be written; one that does not exist is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    columns, thumbnail = check_positive_int(columns, "columns"), check_positive_int(thumbnail, "thumbnail")
    pictures = denormalize(x, model=model, mean=mean, std=std)
    batch, _, height, width = pictures.shape
    heat = check_maps(maps, size=(height, width), batch=batch).cpu()
    captions = _checked_titles(titles, batch)
    pictures, heat = reduced(pictures, heat, thumbnail)
    size, values = tuple(pictures.shape[2:]), heat.numpy()
    common = Scale.of([values], unit)

    columns = min(columns, batch)
    gap, head, bar_room, dpi = 8, 14 if captions else 0, 52, 100
    pair_w, pair_h = 2 * size[1] + 1, size[0] + head
    rows = math.ceil(batch / columns)
    page_w = gap + columns * (pair_w + gap)
    page_h = gap + rows * (pair_h + gap) + bar_room
    sheet = np.full((page_h, page_w, 3), 255, np.uint8)
    figure = Figure(figsize=(page_w / dpi, page_h / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    for i in range(batch):
        y0, x0 = gap + (i // columns) * (pair_h + gap) + head, gap + (i % columns) * (pair_w + gap)
        picture = pictures[i].permute(1, 2, 0).numpy()
        sheet[y0 : y0 + size[0], x0 : x0 + size[1]] = (picture * 255).round()
        drawn = overlay(picture, values[i], limit=common.limit, signed=common.signed)
        sheet[y0 : y0 + size[0], x0 + size[1] + 1 : x0 + pair_w] = drawn
        if captions:
            caption = _cut(captions[i], pair_w // 6)
            figure.text(x0 / page_w, 1 - (y0 - 3) / page_h, caption, fontsize=7, va="baseline", parse_math=False)
    figure.figimage(sheet, origin="upper", zorder=-1)  # pixel by pixel, not resampled
    bar_w = min(page_w - 6 * gap, 360)
    bar_y = page_h - bar_room + 6
    box = ((page_w - bar_w) / 2 / page_w, 1 - (bar_y + 9) / page_h, bar_w / page_w, 9 / page_h)
    draw_bar(figure.add_axes(box), common)

    with replace_file(target) as file:
        figure.savefig(file, format="png", metadata=SHEET_MARK, pil_kwargs={"optimize": True})
    return target


def is_contact_sheet(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PNG that `contact_sheet` wrote."""
    try:
        with Image.open(path) as picture:
            return SHEET_MARK.items() <= picture.info.items()
    except (OSError, ValueError, SyntaxError):  # none, or no picture
        return False


@dataclass(frozen=True)
class _Column:
    name: str
    unit: str
    values: np.ndarray  # (B, H, W)


def _columns(maps: Any, unit: Any, batch: int, size: tuple[int, int]) -> list[_Column]:
    if isinstance(maps, Tensor | np.ndarray):
        listed = [("", maps)]
    elif isinstance(maps, Mapping):
        listed = [(str(name), m) for name, m in maps.items()]
    elif isinstance(maps, Sequence) and not isinstance(maps, str):
        listed = [(f"map {i}", m) for i, m in enumerate(maps, start=1)]
    else:
        raise TypeError(f"maps must be a tensor, a mapping of names to tensors or a list, got {type(maps).__name__}")
    if not listed:
        raise ValueError("maps must hold at least one map, got none")
    listed = [(name, torch.from_numpy(m) if isinstance(m, np.ndarray) else m) for name, m in listed]
    if isinstance(unit, Mapping):
        lacking = [name for name, _ in listed if name not in unit]
        if lacking:
            raise ValueError(
                f"unit must name a unit for each map, got none for {lacking[0]!r}; maps: {[n for n, _ in listed]}"
            )
    elif unit is None:
        unit = {name: _unit_of(name) if name else "bits" for name, _ in listed}
    elif not isinstance(unit, str):
        raise TypeError(f"unit must be a string or a mapping of map names to strings, got {type(unit).__name__}")
    return [
        _Column(
            name, unit if isinstance(unit, str) else unit[name], check_maps(m, size=size, batch=batch).cpu().numpy()
        )
        for name, m in listed
    ]


def _unit_of(name: str) -> str:
    """What maps of the method of this name measure; bits where there is no such method."""
    from ib_explain.methods import METHODS

    return str(getattr(METHODS.get(name), "unit", "bits")) if name in METHODS else "bits"


def _checked_titles(titles: Any, batch: int) -> list[str]:
    if titles is None:
        return []
    if isinstance(titles, str) or not isinstance(titles, Sequence):
        raise TypeError(f"titles must be a list of one title for each image, got {titles!r}")
    if len(titles) != batch:
        raise ValueError(f"titles must hold one title for each of the {batch} images, got {len(titles)}")
    return [str(title) for title in titles]


def _cut(text: str, width: int) -> str:
    """Return `text`, or its beginning and an ellipsis where it has more than `width` characters."""
    return text if len(text) <= width else text[: max(1, width - 1)].rstrip() + "…"


def _show(axes: Axes, picture: np.ndarray) -> Axes:
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _note(values: np.ndarray, unit: str) -> str:
    low, high = float(values.min()), float(values.max())
    if low == high == 0:
        return "all zero"
    constant = f"constant {low:.3g}" if low == high else ""
    if not in_bits(unit):
        return constant
    total = float(values.sum(dtype=np.float64))
    told = f"{total:,.0f}" if abs(total) >= 1000 else f"{total:.3g}"
    sum_told = f"{told.replace('-', MINUS)} {unit} in total"
    return f"{constant}, {sum_told}" if constant else sum_told


# The package's attribute of this name is the function: it carries the module's other names, so that
# `ib_explain.visualize.overlay` and `import ib_explain.visualize as v` find them as well.
for _function in (contact_sheet, denormalize, overlay):
    setattr(visualize, _function.__name__, _function)
