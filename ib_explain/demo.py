"""The demo: the whole path on pictures whose evidence is known, and whether the maps find it.

A shipped classifier of eight synthetic shapes is the host. A bottleneck is fitted to it on fresh pictures; on further
ones its maps are compared with the exact masks of the evidence, beside Grad-CAM and a centred Gaussian.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ib_explain import __version__
from ib_explain.attribution import attribute
from ib_explain.data.synthetic import CLASS_NAMES, Synthetic, SyntheticSample, demo_host
from ib_explain.files import replace_file
from ib_explain.ib import IBAttention
from ib_explain.metrics.ground_truth import centred_gaussian
from ib_explain.metrics.localisation import energy_inside, pointing_game, top_share
from ib_explain.progress import Progress
from ib_explain.visualize import visualize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DemoSettings", "run_demo"]

REFERENCE = 64  # pictures whose features' statistics the per-image maps use
FIT_SEED, TEST_SEED = 11, 12  # of the pictures; the host was trained on others
NUMBERS, FIGURE, BOTTLENECK = "demo.json", "demo.png", "bottleneck"
WHAT = "ib-explain demo"
OURS, PER_IMAGE, GRAD_CAM, CENTRE = "IB, fitted", "IB, per image", "Grad-CAM", "centred Gaussian"


MapOf = Callable[[Tensor, Tensor], Tensor]
"""Images (B, 3, H, W) and classes (B,) to maps (B, 1, H, W)."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take one to two minutes on two cores.

    Attributes:
        fit_images: pictures to fit on.
        steps: of the fit, 64 pictures each.
        test_images: pictures with one object, and as many with two, for the numbers.
        rows: pictures with one object in the figure.
    """

    fit_images: int = 2048
    steps: int = 80
    test_images: int = 128
    rows: int = 2


def run_demo(
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    settings: DemoSettings | None = None,
) -> str:
    """Run the demo and write `demo.png`, `demo.json` and the bottleneck.

    Args:
        out: folder of the results. One that this demo made is written again; any other must be empty.
        device: where the host runs.
        seed: of the fit.
        overwrite: write into a folder with other files.
        settings: sizes.

    Returns:
        What was done and found, as text.

    Raises:
        ValueError: `out` is a file, or holds other files and `overwrite` is off.
    """
    settings = settings or DemoSettings()
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_demo(out) and not overwrite):
        raise ValueError(f"{out} holds no demo but other files; name another folder or --overwrite")
    started = time.monotonic()
    host = demo_host().to(device)

    # Half of the pictures hold two objects, as pictures do: on single ones the host is so sure of its class that the
    # attention would hardly ever be asked for another.
    half = range(settings.fit_images // 2)
    drawn = torch.cat([Synthetic(len(half), seed=FIT_SEED, pairs=pairs).batch(half).image for pairs in (False, True)])
    loader = DataLoader(TensorDataset(drawn), 64, shuffle=True, drop_last=True)
    ib = IBAttention(host, seed=seed).fit(loader, steps=settings.steps)
    ib.save(out / BOTTLENECK)

    singles = _to(Synthetic(settings.test_images, seed=TEST_SEED).batch(range(settings.test_images)), device)
    pairs = _to(Synthetic(settings.test_images, seed=TEST_SEED, pairs=True).batch(range(settings.test_images)), device)
    with torch.no_grad():
        logits = host(singles.image)
        with ib.restrict() as restricted:
            agree = restricted(singles.image).argmax(dim=1) == logits.argmax(dim=1)
    methods = _methods(host, ib, drawn[:: max(1, len(drawn) // REFERENCE)][:REFERENCE].to(device), seed)
    found = {}
    with Progress(len(methods), "measure") as progress:
        for name, method in methods.items():
            found[name] = _measure(method, singles, pairs)
            progress.step()
    numbers = {
        "what": WHAT,
        "version": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "settings": {**asdict(settings), "seed": seed},
        "host": {
            "record": getattr(host, "pretrained_cfg", {}).get("record"),
            "accuracy": _mean(logits.argmax(dim=1) == singles.label),
        },
        "bottleneck": {
            "layer": ib.site.name,
            "grid": list(ib.site.grid),
            "channels": ib.site.channels,
            "bits_an_image": _mean(ib.information(singles.image)),
            "agreement": _mean(agree),
            "fit_seconds": (ib.record or {})["seconds"],
        },
        "evidence_covers": _mean(singles.mask.float().mean(dim=(1, 2, 3))),
        "methods": found,
    }
    _draw(host, methods, singles, pairs, settings.rows, out / FIGURE)
    numbers["seconds"] = round(time.monotonic() - started, 1)
    with replace_file(out / NUMBERS) as file:
        file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return _text(numbers, out)


def _to(drawn: SyntheticSample, device: str | torch.device) -> SyntheticSample:
    return SyntheticSample(drawn.image.to(device), drawn.label.to(device), drawn.mask.to(device))


def _is_demo(folder: Path) -> bool:
    """Whether the numbers in `folder` are those of a demo."""
    try:
        return json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["what"] == WHAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _methods(host: nn.Module, ib: IBAttention, reference: Tensor, seed: int) -> dict[str, MapOf]:
    """What is compared. The statistics of the per-image maps are from pictures of the kind, as those of the fit."""
    layer = ib.site.name

    def centre(x: Tensor, _target: Tensor) -> Tensor:
        return centred_gaussian((int(x.shape[2]), int(x.shape[3])), device=x.device).expand(len(x), -1, -1, -1)

    return {
        OURS: lambda x, target: attribute(host, x, target=target, method=ib),
        PER_IMAGE: lambda x, target: attribute(host, x, target=target, seed=seed, reference=reference),
        GRAD_CAM: lambda x, target: attribute(host, x, target=target, method="grad_cam"),
        f"{GRAD_CAM} at {layer}": lambda x, target: attribute(host, x, target=target, method="grad_cam", layer=layer),
        CENTRE: centre,
    }


def _measure(method: MapOf, singles: SyntheticSample, pairs: SyntheticSample) -> dict[str, float]:
    """Means over pictures; NaN (a map without heat) counts as a miss, so that no method gains by silence.

    Explained is the true class: where the host is wrong, what speaks for the truth is still on the object.

    Returns:
        inside: share of the map on the object. pointing: its maximum is there. top: share of the n highest pixels that
        is there, n the object's size. asked: with two objects, of the heat on either the share on the one whose class
        was asked for; chance is one half. milliseconds: an image.
    """
    method(singles.image[:2], singles.label[:2])  # probes of the host are not what is timed
    started = time.perf_counter()
    maps = method(singles.image, singles.label)
    seconds = time.perf_counter() - started
    asked = []
    for k in (0, 1):
        on_objects = (method(pairs.image, pairs.label[:, k]) * pairs.mask).sum(dim=(2, 3))  # (B, 2)
        asked.append(on_objects[:, k] / on_objects.sum(dim=1))
    return {
        "inside": _mean(energy_inside(maps, singles.mask).nan_to_num(0.0)),
        "pointing": _mean(pointing_game(maps, singles.mask).nan_to_num(0.0)),
        "top": _mean(top_share(maps, singles.mask).nan_to_num(0.0)),
        "asked": _mean(torch.cat(asked).nan_to_num(0.0)),
        "milliseconds": round(1000 * seconds / len(maps), 2),
    }


def _mean(values: Tensor) -> float:
    return round(values.float().mean().item(), 4)


def _draw(
    host: nn.Module,
    methods: dict[str, MapOf],
    singles: SyntheticSample,
    pairs: SyntheticSample,
    rows: int,
    path: Path,
) -> None:
    """One row for each of the first pictures, two for the first pair; the evidence's outline drawn on every panel."""
    x = torch.cat([singles.image[:rows], pairs.image[:1].expand(2, -1, -1, -1)])
    target = torch.cat([singles.label[:rows], pairs.label[0]])
    masks = torch.cat([singles.mask[:rows], pairs.mask[0][:, None]])
    shown = {name: methods[name](x, target) for name in (OURS, PER_IMAGE, GRAD_CAM)}
    units = {OURS: "bits", PER_IMAGE: "bits", GRAD_CAM: "gradient x feature"}
    figure = visualize(x, shown, model=host, titles=[CLASS_NAMES[int(t)] for t in target], unit=units)
    _outline(figure, masks, panels=1 + len(shown))
    with replace_file(path) as file:
        figure.savefig(file, dpi=96, pil_kwargs={"optimize": True})


def _outline(figure: Figure, masks: Tensor, panels: int) -> None:
    """Draw each row's mask (R, 1, H, W) as a line on its panels, which come first in the figure, row by row."""
    for number, axes in enumerate(figure.axes[: len(masks) * panels]):
        axes.contour(masks[number // panels, 0].cpu().float().numpy(), levels=[0.5], colors="white", linewidths=0.9)


def _text(numbers: dict[str, Any], out: Path) -> str:
    host, bottleneck, settings = numbers["host"], numbers["bottleneck"], numbers["settings"]
    lines = [
        f"host        classifier of 8 shapes, shipped trained; {host['accuracy']:.1%} right on "
        f"{settings['test_images']} new pictures",
        f"bottleneck  at {bottleneck['layer']!r}, {bottleneck['grid'][0]}x{bottleneck['grid'][1]} positions, fitted in "
        f"{bottleneck['fit_seconds']:.0f} s; {bottleneck['bits_an_image']:.0f} bits per image keep "
        f"{bottleneck['agreement']:.1%} of the host's answers",
        "",
        f"Do the maps find the evidence? It covers {numbers['evidence_covers']:.1%} of the picture.",
        "",
        f"{'':<22}{'map inside':>12}{'peak inside':>13}{'top pixels':>12}{'asked class':>13}{'ms/image':>10}",
    ]
    for name, found in numbers["methods"].items():
        shares = [found[key] for key in ("inside", "pointing", "top", "asked")]
        cells = [f"{share:.1%}".rjust(width) for share, width in zip(shares, (12, 13, 12, 13), strict=True)]
        lines.append(f"{name:<22}{''.join(cells)}{found['milliseconds']:>10.1f}")
    lines += [
        "",
        "map inside: share of the map on the object. peak inside: its maximum is on the object (pointing game).",
        "top pixels: share of the n highest pixels on the object, n its size. asked class: with two objects, share of",
        "the heat on objects that is on the one whose class was asked for (chance: 50 %).",
        "",
        f"{out / FIGURE}: maps with the evidence outlined; {out / NUMBERS}: all numbers; {out / BOTTLENECK}: the fit",
        f"done in {numbers['seconds']:.0f} s",
    ]
    return "\n".join(lines)
