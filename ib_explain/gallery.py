"""Pictures of a benchmark: the same images under all methods, and each method's best and worst cases."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ib_explain.colours import colour_range, overlay, reduced
from ib_explain.contenders import Contender
from ib_explain.data.preprocessing import denormalize
from ib_explain.hosts import class_names, timm_config
from ib_explain.leaderboard import Leaderboard
from ib_explain.pictures import Picture, Pictures
from ib_explain.samples import ImageBatch
from ib_explain.sources import Source
from ib_explain.visualize import visualize

__all__ = ["draw_pictures"]

SHEET_IMAGES = 6
SIDE = 128  # pixels of a case, the longer side; a report goes by e-mail

MapsOf = Callable[[Contender, ImageBatch], tuple[Tensor, Tensor] | None]


def draw_pictures(
    board: Leaderboard, source: Source, contenders: Sequence[Contender], maps_of: MapsOf, model: nn.Module
) -> Pictures:
    """Recompute the maps of a few images, those of the sheet and the extreme cases, and draw them.

    Of a one-time iterator only the first batch is there still; what is gone is not drawn.

    Args:
        board: the standings, which tell the extreme cases.
        source: the data.
        contenders: the methods.
        maps_of: maps (B, 1, H, W) of a method for a batch, with the classes (B,), or None where it has none.
        model: the host, for the normalisation and the names of classes.
    """
    sheet = _spread(source)
    extremes = {method: [*best, *worst] for method, (best, worst) in board.extremes().items()}
    batch = source.pick({*sheet, *(case.image for cases in extremes.values() for case in cases)})
    if batch is None:
        return Pictures()
    row_of = {image: row for row, image in enumerate(batch.images)}
    pictures, note = _colours(batch.x, model)
    on_sheet = [row_of[image] for image in sheet if image in row_of]
    columns: dict[str, Tensor] = {}
    cases: dict[str, tuple[list[int], Tensor]] = {}
    classes: list[int] = []
    for contender in contenders:
        wanted = [row_of[case.image] for case in extremes.get(contender.name, []) if case.image in row_of]
        rows = list(dict.fromkeys([*on_sheet, *wanted]))
        found = maps_of(contender, batch.take(rows)) if rows else None
        if found is None:
            continue
        maps, target = found[0].cpu(), found[1].tolist()
        columns[contender.name] = maps[: len(on_sheet)]
        classes = target[: len(on_sheet)]
        cases[contender.name] = [batch.images[row] for row in wanted], maps[[rows.index(row) for row in wanted]]
    if not columns:
        return Pictures()
    units = {contender.name: contender.unit for contender in contenders}
    titles = _titles(class_names(model, folders=source.class_folders), batch, on_sheet, classes)
    sheets = [_sheet(pictures[on_sheet], columns, units, titles, note)]
    drawn: dict[tuple[str, int], Picture] = {}
    for unit in dict.fromkeys(units.values()):
        of_unit = {name: value for name, value in cases.items() if units[name] == unit and value[0]}
        if of_unit:
            limit, signed = colour_range([maps.numpy() for _, maps in of_unit.values()])
            for name, (images, maps) in of_unit.items():
                for image, heat in zip(images, maps, strict=True):
                    told = f"map of {name} in {unit}, beside the image; colours end at {limit:.3g}"
                    picture = _pair(pictures[row_of[image]], heat, limit, signed)
                    drawn[name, image] = Picture(picture, told)
    return Pictures(sheets, drawn)


def _spread(source: Source) -> list[int]:
    """The images of the sheet: evenly over the data where each can be read alone, else the first."""
    if source.sizes is None or not source.readable_again:
        return list(source.first.images[:SHEET_IMAGES])
    total = sum(source.sizes)
    count = min(SHEET_IMAGES, total)
    return [i * total // count for i in range(count)]


def _colours(x: Tensor, model: nn.Module) -> tuple[Tensor, str]:
    """Pictures in [0, 1], and what has to be said about their colours."""
    try:
        return denormalize(x, model=model if timm_config(model) else None), ""
    except (TypeError, ValueError):  # nobody tells the normalisation: the pictures are for orientation only
        low, high = x.float().aminmax()
        grey = ((x.float().cpu() - low.cpu()) / (high - low).clamp_min(1e-12).cpu()).mean(dim=1, keepdim=True)
        told = "Images in grey, from their least to their largest value: the model does not tell its normalisation."
        return grey.expand(-1, 3, -1, -1), f" {told}"


def _titles(names: list[str] | None, batch: ImageBatch, rows: Sequence[int], classes: Sequence[int]) -> list[str]:
    return [
        f"{names[index] if names else f'class {index}'} · {batch.names[row]}"
        for row, index in zip(rows, classes, strict=True)
    ]


def _sheet(
    pictures: Tensor, columns: dict[str, Tensor], units: dict[str, str], titles: list[str], note: str
) -> Picture:
    by_unit = sorted(columns, key=lambda name: [*dict.fromkeys(units.values())].index(units[name]))
    maps = {name: columns[name] for name in by_unit}
    figure = visualize(pictures, maps, titles=titles, unit={name: units[name] for name in maps})
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, pil_kwargs={"optimize": True})
    told = (
        "Each row is one image and the class that is explained. Maps of one unit share one scale, given by the bar "
        "below them; colours of different units cannot be compared." + note
    )
    alt = f"Maps of {len(titles)} images by {', '.join(maps)}."
    return Picture(buffer.getvalue(), told, alt)


def _pair(picture: Tensor, heat: Tensor, limit: float, signed: bool) -> bytes:
    """Image and overlay side by side, as a small PNG."""
    ratio = SIDE / max(picture.shape[1:])
    (picture,), (heat,) = reduced(picture[None], heat, SIDE)
    both = np.concatenate(
        [
            (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8),
            overlay(picture, heat, limit=limit, signed=signed),
        ],
        axis=1,
    )
    image = Image.fromarray(both)
    if ratio > 1:
        height, width = (max(1, round(side * ratio)) for side in picture.shape[1:])
        image = image.resize((2 * width, height), Image.Resampling.NEAREST)
    return _small(image)


def _small(image: Image.Image) -> bytes:
    """A PNG of 256 colours, a third of the size."""
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
