"""How much data and how many steps a fit needs, what bits buy, and what refining buys: three curves on one host.

    python benchmarks/curves.py [--host cnn] [--images 200] [--part amount,rate,refine]
    python benchmarks/curves.py --host reference --weights FILE --data FOLDER [--bf16]

Hosts, data and measures are those of `quality.py --split train`: fits on one part of the training images, measured on
the rest. Writes results/quality/HOST/amount.json, rate.json and refine.json after each row (what is there is kept), and
a figure beside each:

- amount: the gain over Grad-CAM at its best layer, against the number of fitting images and of steps;
- rate: agreement and lost nats against bits an image, for several betas and both gates that measure bits;
- refine: the gain of `attribute(x, refine=k)` over the fitted maps against the passes it takes, beside IBA's.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import quality
import quality_methods as q
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import ib_explain as ibx
from ib_explain.files import replace_file
from ib_explain.hosts import pick_device
from ib_explain.io import versions
from ib_explain.metrics import METRICS, Case, count_passes
from ib_explain.sources import Source

STEPS = (25, 50, 100, 200)
FITTING_IMAGES = (100, 300, 1000)
REFINE = (0, 1, 2, 5, 10, 20, 40)
MULTIPLES = (0.1, 0.5, 2.0, 10.0)  # of the default's beta
RATE_STEPS = 75
SHOWN = ("insertion - deletion", "degradation_10_steps", "road_3_shares", "energy_inside")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=quality.HOSTS, default="cnn")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--part", type=lambda text: text.split(","), default=["amount", "rate", "refine"])
    parser.add_argument("--bf16", action="store_true")
    quality.add_host_arguments(parser)
    options = parser.parse_args()
    quality.check_host_arguments(parser, options)
    if unknown := set(options.part) - {"amount", "rate", "refine"}:
        parser.error(f"--part takes amount, rate and refine, got {', '.join(sorted(unknown))}")
    options.split = "train"
    host, data = quality.open_host(options)
    host = host.to(pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.bf16:
        quality.in_bf16(host)
    folder = quality.RESULTS / options.host
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"amount": (amount, draw_amount), "rate": (rate, draw_rate), "refine": (refine, draw_refine)}
    for part in options.part:
        measure, draw = parts[part]
        table = Table(folder / f"{part}.json", options)
        measure(host, data, table, options.images)
        draw(table.rows).savefig(folder / f"{part}.png", dpi=120)


class Table:
    """Rows by name in a file; a row that is there is not computed again."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.facts = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
        self.facts |= {
            "command": "python benchmarks/curves.py " + " ".join(Path(word).name for word in sys.argv[1:]),
            "images": options.images,
            "device": str(pick_device()),
            "precision": "the host in bfloat16" if options.bf16 else "float32",
            "versions": versions(),
        }

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.facts["rows"]

    def add(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.rows:
            self.rows[name] = make()
            with replace_file(self.path) as file:
                file.write_text(json.dumps(self.facts, indent=1) + "\n")
            print(name, self.rows[name], flush=True)
        return self.rows[name]


def amount(host: nn.Module, data: quality.Data, table: Table, images: int) -> None:
    """Scores of fits of the default length on fewer images, and of fewer batches on all images."""
    layers = q.stage_layers(host)
    for layer in layers:
        explain = lambda x, t, layer=layer: ibx.attribute(host, x, target=t, method="grad_cam", layer=layer)  # noqa: E731
        table.add(f"grad_cam {layer}", lambda explain=explain: scores(host, data, explain, images))
    total = len(data.fit)  # type: ignore[arg-type]
    plans = [(total, steps) for steps in STEPS] + [(count, STEPS[-1]) for count in FITTING_IMAGES if count < total]
    for count, steps in plans:

        def make(count: int = count, steps: int = steps) -> dict[str, Any]:
            ib = fit(host, data, steps, count=count)
            return {"images": count, "steps": steps, **scores(host, data, ib.attribute, images)}

        table.add(f"{count} images, {steps} steps", make)


def rate(host: nn.Module, data: quality.Data, table: Table, images: int) -> None:
    """Bits, agreement and lost nats on held-out images for fits with several betas."""
    for gate in ("gaussian", "noise"):
        default = table.add(f"{gate}, default beta", lambda gate=gate: kept(host, data, images, gate))
        for multiple in MULTIPLES:
            beta = multiple * default["mean_beta"]
            table.add(f"{gate}, beta x {multiple:g}", lambda gate=gate, beta=beta: kept(host, data, images, gate, beta))


def refine(host: nn.Module, data: quality.Data, table: Table, images: int) -> None:
    """Scores and passes of the default fit's maps after k refining steps, and of IBA as published."""
    fitted: list[ibx.IBAttention] = []  # fitted when the first missing row asks for it

    def refined(x: Tensor, target: Tensor, k: int) -> Any:
        if not fitted:
            fitted.append(fit(host, data, STEPS[-1]))
        return fitted[0].attribute(x, target, refine=k)

    examples = data.examples(quality.EXAMPLES)

    def iba(x: Tensor, target: Tensor) -> Any:
        return ibx.attribute(host, x, target=target, method="iba", reference=examples)

    for k in REFINE:
        explain = functools.partial(refined, k=k)
        table.add(f"refine={k}", lambda explain=explain: costed(host, data, explain, images))
    table.add("iba", lambda: costed(host, data, iba, images))


def costed(
    host: nn.Module, data: quality.Data, explain: Callable[[Tensor, Tensor], Any], images: int
) -> dict[str, Any]:
    """Scores, and the passes that a map takes."""
    x = data.examples(2).to(pick_device())
    explain(x, host(x).argmax(1))  # what is done once, such as a fit, is no cost of a map
    passes = sum(count_passes(host, x, lambda _host, x, target: explain(x, target)))
    return {"passes": round(passes, 3), **scores(host, data, explain, images)}


def fit(
    host: nn.Module, data: quality.Data, steps: int, *, count: int | None = None, **options: Any
) -> ibx.IBAttention:
    total = len(data.fit)  # type: ignore[arg-type]
    part = data.fit if count is None else Subset(data.fit, [i * total // count for i in range(count)])
    loader = DataLoader(part, quality.FIT_BATCH, shuffle=True, drop_last=True)
    beta = options.pop("beta", None)
    return ibx.IBAttention(host, **options).fit(loader, steps=steps, beta=beta, show_progress=False)


def scores(
    host: nn.Module, data: quality.Data, explain: Callable[[Tensor, Tensor], Any], images: int
) -> dict[str, float]:
    """Means of the seven measures, and insertion - deletion."""
    found: dict[str, list[float]] = {name: [] for name in q.SEVEN}
    for batch in Source(data.measured, images=images).batches():
        with torch.no_grad():
            target = host(batch.x).argmax(1)
        case = Case(host, batch.x, explain(batch.x, target), target=target, masks=batch.masks)
        for name, values in found.items():
            values += METRICS.get(name)(case).tolist()
    means = {name: round(torch.tensor(values).nanmean().item(), 5) for name, values in found.items()}
    return {"insertion - deletion": round(means["insertion"] - means["deletion"], 5), **means}


def kept(host: nn.Module, data: quality.Data, images: int, gate: str, beta: float | None = None) -> dict[str, Any]:
    """One fit, and on held-out images what passes and what is lost."""
    ib = fit(host, data, RATE_STEPS, gate=gate, beta=beta)
    record = ib.record or {}
    bits, agreed, lost = [], [], []
    for batch in Source(data.measured, images=images).batches():
        with torch.no_grad():
            own = host(batch.x).float().log_softmax(1)
            target = own.argmax(1)
            with ib.restrict(target=target) as restricted:
                through = restricted(batch.x).float().log_softmax(1)
        bits += ib.information(batch.x).tolist()
        agreed += (through.argmax(1) == target).tolist()
        lost += (F.nll_loss(through, target, reduction="none") - F.nll_loss(own, target, reduction="none")).tolist()
    return {
        "mean_beta": record["final_beta"],
        "bits": round(torch.tensor(bits).mean().item(), 1),
        "agreement": round(torch.tensor(agreed).float().mean().item(), 4),
        "lost_nats": round(torch.tensor(lost).mean().item(), 4),
    }


def draw_amount(rows: dict[str, dict[str, Any]]) -> plt.Figure:
    best = max((row for name, row in rows.items() if name.startswith("grad_cam")), key=lambda r: r[SHOWN[0]])
    fits = [row for row in rows.values() if "steps" in row]
    most_images, most_steps = max(r["images"] for r in fits), max(r["steps"] for r in fits)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for name in SHOWN:
        by_steps = sorted((r["steps"], r[name] - best[name]) for r in fits if r["images"] == most_images)
        by_images = sorted((r["images"], r[name] - best[name]) for r in fits if r["steps"] == most_steps)
        axes[0].plot(*zip(*by_steps, strict=True), marker="o", label=name.replace("_", " "))
        axes[1].plot(*zip(*by_images, strict=True), marker="o")
    for axis, label in zip(
        axes, (f"batches of 32 ({most_images} images)", f"images ({most_steps} batches)"), strict=True
    ):
        points = sorted({x for line in axis.lines for x in line.get_xdata()})
        axis.set(xscale="log", xlabel=label)
        axis.set_xticks(points, [str(x) for x in points])
        axis.minorticks_off()
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("gain over Grad-CAM at its best layer")
    axes[0].legend(fontsize=8)
    return figure


def draw_refine(rows: dict[str, dict[str, Any]]) -> plt.Figure:
    steps = sorted((row["passes"], name, row) for name, row in rows.items() if name.startswith("refine="))
    fitted, iba = rows["refine=0"], rows["iba"]
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(12, 3), layout="constrained")
    for axis, measure in zip(axes, SHOWN, strict=True):
        axis.plot([p for p, _, _ in steps], [row[measure] - fitted[measure] for _, _, row in steps], marker="o")
        for passes, name, row in steps:
            at = (passes, row[measure] - fitted[measure])
            axis.annotate(name.removeprefix("refine="), at, (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axis.plot(iba["passes"], iba[measure] - fitted[measure], marker="s", linestyle="none", label="IBA")
        axis.set(xscale="log", title=measure.replace("_", " "), xlabel="passes for a map (log scale)")
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.axhline(0, color="black", linewidth=0.8)
        axis.margins(y=0.15)
    axes[0].set_ylabel("gain over the fitted map, refine=0")
    axes[0].legend(fontsize=8)
    return figure


def draw_rate(rows: dict[str, dict[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for gate in ("gaussian", "noise"):
        points = sorted(
            (r["bits"], r["agreement"], r["lost_nats"]) for n, r in rows.items() if n.startswith(f"{gate}, ")
        )
        bits, agreement, lost = zip(*points, strict=True)
        axes[0].plot(bits, agreement, marker="o", label=f"{gate} gate")
        axes[1].plot(bits, lost, marker="o")
    axes[0].set(xlabel="bits an image", ylabel="agreement with the host")
    axes[1].set(xlabel="bits an image", ylabel="nats lost about the top-1")
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)  # five digits a tick
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
