"""Pictures of `quality.py`: cost against faithfulness, and sheets of maps. Small files, to be committed."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ib_explain.bootstrap import pareto_front
from ib_explain.contenders import contenders_of
from ib_explain.figures import LIGHT, log_axis
from ib_explain.files import write_file
from ib_explain.summary import MetricFacts, Summary
from ib_explain.visualize import contact_sheet, visualize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 64  # of drawings: a quarter of the file's size
JPEG_QUALITY = 85  # sheets of photographs: as PNG they would take megabytes
OURS, CAMS, OTHERS = LIGHT.colours[0], LIGHT.colours[1], LIGHT.colours[7]
LEAST_PASSES = 0.1  # below, a method does not run the host


def cost_figure(summary: Summary, folder: Path) -> None:
    """Write cost_faithfulness.png: the summary's metrics, one panel each, against its cost; host-free maps left out."""
    from matplotlib.figure import Figure

    *qualities, cost = summary.metrics
    figure = Figure(figsize=(5.4 * len(qualities), 5.2), layout="constrained", dpi=110)
    for axes, quality in zip(figure.subplots(1, len(qualities)), qualities, strict=True):
        _panel(axes, summary, quality, cost)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    few = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    write_file(folder / "cost_faithfulness.png", small.getvalue())


def maps_sheet(host: nn.Module, x: Tensor, method: Any, folder: Path) -> None:
    """Write maps.jpg, the images with their maps by one method."""
    contender = contenders_of({"method": method}, host)[0]
    first = contender.explain(host, x, _predicted(host, x), batch_size=32)
    with tempfile.TemporaryDirectory() as scratch:
        sheet = contact_sheet(x, first, Path(scratch) / "maps.png", model=host, columns=8, thumbnail=64)
        save_jpeg(folder / "maps.jpg", Image.open(sheet))


def methods_sheet(host: nn.Module, x: Tensor, methods: dict[str, Any], folder: Path) -> None:
    """Write methods.jpg, eight of the images under all methods."""
    x = x[:: max(1, len(x) // 8)][:8]
    target = _predicted(host, x)
    contenders = contenders_of(methods, host)
    short = [contender.name.split(" seed")[0] for contender in contenders]
    maps = {name: c.explain(host, x, target) for name, c in zip(short, contenders, strict=True)}
    # Maps of one unit would share a scale; blanks before it, which nobody sees, give each method one of its own.
    units = {name: " " * place + c.unit for place, (name, c) in enumerate(zip(short, contenders, strict=True), 1)}
    buffer = io.BytesIO()
    visualize(x, maps, model=host, unit=units).savefig(buffer, format="png", dpi=72)
    save_jpeg(folder / "methods.jpg", Image.open(buffer))


def _predicted(host: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([host(part) for part in x.split(32)]).argmax(dim=1)


def save_jpeg(path: Path, image: Image.Image) -> None:
    """Write a sheet of photographs."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    write_file(path, buffer.getvalue())


def _panel(axes: Axes, summary: Summary, quality: MetricFacts, cost: MetricFacts) -> None:
    cells = summary.cells
    names = [m for m in summary.methods if cells[m, cost.name].mean >= LEAST_PASSES and cells[m, quality.name].n]
    names.sort(key=lambda m: cells[m, quality.name].mean)
    x, y = (np.array([cells[m, metric.name].mean for m in names]) for metric in (cost, quality))
    front = pareto_front(x, y, higher_is_better=quality.higher_is_better)
    axes.set_xlabel(f"{cost.unit} (log scale)")
    axes.set_ylabel(f"{quality.name.replace('_', ' ')}, {quality.unit}")
    axes.grid(color=LIGHT.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    ends = sorted(zip(x[front], y[front], strict=True))
    axes.step(*zip(*ends, strict=True), where="post", color=LIGHT.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    colours = [OURS if name.startswith(("ib ", "ib_")) else CAMS if "cam" in name else OTHERS for name in names]
    for name, at, colour, leads in zip(names, x, colours, front, strict=True):
        cell = cells[name, quality.name]
        axes.plot([at, at], [cell.low, cell.high], color=colour, linewidth=1.2, zorder=2)
        fill = colour if leads else LIGHT.paper
        axes.plot(at, cell.mean, "o", markersize=5, color=colour, markerfacecolor=fill, zorder=3)
    axes.margins(x=0.08)
    log_axis(axes, x)
    low, high = axes.get_ylim()
    for name, at, value, colour, place in zip(names, x, y, colours, _apart(y, low, high), strict=True):
        axes.annotate(
            name,
            (at, value),
            (1.06, (place - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "relpos": (0, 0.5)},
        )


def _apart(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Places for the labels of rising values: as near to them as even gaps within [low, high] allow."""
    gap = min(0.035 * (high - low), (high - low) / max(1, len(values) - 1))
    places = values.astype(float)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], high)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    return places
