"""What colours mean: the scale that maps share, a map laid over its picture, the colour bar.

Drawn without pyplot, as in `ib_explain.visualize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ib_explain.maps import in_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Scale", "colour_range", "draw_bar", "overlay", "reduced"]

_PERCENTILE = 99.5  # of the non-zero values: one hot pixel does not darken all others
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class Scale:
    """What a colour means: values from 0, or from -limit, to limit."""

    unit: str
    limit: float
    signed: bool
    above: bool  # some values lie above the limit
    below: bool  # some lie below -limit
    empty: bool  # all are zero: there is no scale

    @classmethod
    def of(cls, values: Sequence[np.ndarray], unit: str) -> Scale:
        limit, signed = colour_range(values)
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        return cls(unit, limit, signed, above=high > limit, below=low < -limit, empty=low == high == 0)


def colour_range(values: Sequence[np.ndarray]) -> tuple[float, bool]:
    """Where colours end for maps that share a scale, 1 if all are zero; and whether they have two signs."""
    pooled = np.concatenate([v.ravel() for v in values])
    magnitude = np.abs(pooled[pooled != 0])
    return float(np.percentile(magnitude, _PERCENTILE)) if magnitude.size else 1.0, bool(pooled.min() < 0)


def overlay(
    image: Tensor | np.ndarray, heat: Tensor | np.ndarray, *, limit: float | None = None, signed: bool | None = None
) -> np.ndarray:
    """Colour one map and lay it over its picture.

    Args:
        image: (3, H, W) or (1, H, W) tensor, or (H, W, 3) array, in [0, 1], as `denormalize` gives them.
        heat: (H, W) or (1, H, W), any unit.
        limit: value at which colour and opacity end; `None` for the largest magnitude in `heat`.
        signed: `True` for colours symmetric about 0 (red for, blue against); `None` lets the data decide.

    Returns:
        (H, W, 3) uint8. Where `heat` is 0, the picture's luminance: what is coloured is the map.

    Raises:
        ValueError: shapes that do not fit, values outside [0, 1] in the picture, NaN in the map, a limit <= 0.
    """
    picture = image.detach().cpu().float().numpy().transpose(1, 2, 0) if isinstance(image, Tensor) else image
    values = np.asarray(heat.detach().cpu().float() if isinstance(heat, Tensor) else heat, np.float32)
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if picture.ndim != 3 or picture.shape[2] not in (1, 3) or picture.shape[:2] != values.shape:
        raise ValueError(
            f"image and heat must be (3, H, W) and (H, W) of one size, got {tuple(image.shape)} and {tuple(heat.shape)}"
        )
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(f"image must lie in [0, 1], got [{picture.min():.3g}, {picture.max():.3g}]; see denormalize")
    if not np.isfinite(values).all():
        raise ValueError("heat must be finite, got NaN or infinite values")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    signed = bool((values < 0).any()) if signed is None else signed
    limit = limit or float(np.abs(values).max()) or 1.0
    coloured = _rgba(np.clip(values / limit, -1, 1), signed)
    grey = (picture @ _LUMINANCE if picture.shape[2] == 3 else picture[..., 0])[..., None]
    mixed = grey + (coloured[..., :3] - grey) * coloured[..., 3:]
    return (mixed * 255).round().astype(np.uint8)


def reduced(pictures: Tensor, heat: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in [0, 1] and maps (B, H, W), made smaller where their longer side has more pixels."""
    height, width = pictures.shape[2:]
    ratio = side / max(height, width)
    if ratio >= 1:
        return pictures, heat
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    pictures = F.interpolate(pictures, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return pictures, F.interpolate(heat[:, None], size=size, mode="area")[:, 0]  # means: the scale stays per pixel


def draw_bar(axes: Axes, scale: Scale) -> None:
    """A horizontal colour bar on white, as opaque as the maps, with an arrow where values lie beyond."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    low = -1.0 if scale.signed else 0.0
    ramp = _rgba(np.linspace(low, 1, 256), scale.signed)
    coloured = 1 + (ramp[None, :, :3] - 1) * ramp[None, :, 3:]
    unit = f"{scale.unit} per pixel" if in_bits(scale.unit) else scale.unit
    axes.tick_params(labelsize=7, length=2, width=0.5, pad=1.5)
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    axes.set_yticks([])
    if scale.empty:
        axes.set_xlim(0, 1)
        axes.set_xticks([0])
        axes.set_xlabel(f"{unit} (all zero)", fontsize=7.5, labelpad=1)
        return
    axes.imshow(coloured, aspect="auto", extent=(low * scale.limit, scale.limit, 0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10], symmetric=scale.signed))
    axes.set_xlim(low * scale.limit, scale.limit)
    # Maps in bits per pixel are small numbers: a power of ten in the label reads better than 0.0025.
    power = math.floor(math.log10(scale.limit))
    power = 0 if -2 <= power <= 3 else power
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    axes.xaxis.set_major_formatter(formatter if power == 0 else lambda value, _: f"{value / 10.0**power:g}")
    factor = "" if power == 0 else rf"$10^{{{power}}}$ "
    label = f"{factor}{unit}, {'signed' if scale.signed else 'non-negative'}"
    # A label may be as long as its bar: bars stand side by side. A letter is about .55 of the font size wide.
    room = 72 * float(axes.figure.get_window_extent().width) / axes.figure.dpi * axes.get_position().width
    axes.set_xlabel(label, fontsize=min(7.5, room / (0.55 * len(label))), labelpad=1)
    for beyond, x, direction, colour in (
        (scale.above, 1.0, 1, coloured[0, -1]),
        (scale.below, 0.0, -1, coloured[0, 0]),
    ):
        if beyond:
            tip = [(x, 0), (x + direction * 0.03, 0.5), (x, 1)]
            axes.fill(*zip(*tip, strict=True), transform=axes.transAxes, color=colour, clip_on=False, lw=0)


def _rgba(values: np.ndarray, signed: bool) -> np.ndarray:
    """Colours (..., 4) of values in [-1, 1]: inferno without its black end, or blue to red; opaque towards the ends."""
    from matplotlib import colormaps

    strength = np.abs(values)
    if signed:
        coloured = colormaps["RdBu_r"](0.5 + 0.5 * np.sign(values) * (0.35 + 0.55 * strength))
    else:
        coloured = colormaps["inferno"](0.25 + 0.7 * np.clip(values, 0, 1))
    # Faster than linear at first: weak evidence is still seen, and 0 is still the picture.
    coloured[..., 3] = 0.85 * strength**0.6
    return coloured
