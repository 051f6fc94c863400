"""What is relevance worth? How near a fit comes to sampled Shapley values, and how good the maps are beside the bits.

    python benchmarks/relevance.py --host cnn [--images 200] [--shapley 8] [--orders 32]
    python benchmarks/relevance.py --host reference --weights FILE --data FOLDER [...]
    python benchmarks/relevance.py --host vit --hosts FOLDER [...]

Hosts and images are those of `quality.py --split val`. One bottleneck is fitted with default settings and relevance.

- Shapley values of some images are sampled by definition: positions come in random order, 1/64 of the grid at a time;
  each brings what the host then knows more of the class. Half of the orders against the other half tells how
  reliable the samples are (Spearman and Brown 1910); `correlation` is that of the learned values with the mean over all
  orders, `ceiling` what the true values would have.
- The seven measures of `quality.py` for the relevance and for the bits, and their paired difference to Grad-CAM at its
  default layer.
- Label bits for the predicted class, the second one and one drawn at random.

Writes results/quality/relevance.json (one entry a host) and HOST/relevance.jpg, eight images asked for two classes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality
import quality_methods as q
import torch
from sanity import asked, told
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.files import replace_file
from ib_explain.io import versions
from ib_explain.lending import frozen
from ib_explain.metrics import METRICS, Case
from ib_explain.observation import observe
from ib_explain.relevance import label_information
from ib_explain.sources import Source

OUT = quality.RESULTS / "relevance.json"
GROUPS = 64  # of positions, in one order
DRAWN = 8  # images of the figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, choices=quality.HOSTS)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shapley", type=int, default=8, help="images whose Shapley values are sampled")
    parser.add_argument("--orders", type=int, default=32)
    quality.add_host_arguments(parser)
    options = parser.parse_args()
    quality.check_host_arguments(parser, options)
    options.split = "val"
    host, data = quality.open_host(options)
    host = host.to(memory_format=torch.channels_last)
    if options.host == "reference":
        quality.in_bf16(host)
    loader = DataLoader(data.fit, quality.FIT_BATCH, shuffle=True, drop_last=True)
    ib = ibx.IBAttention(host, relevance=True).fit(loader)
    x = torch.cat([batch.x for batch in Source(data.measured, images=options.images).batches()])

    found: dict[str, Any] = {"layer": ib.site.name, "images": options.images, "fit": figures(ib)}
    found["shapley"] = shapley(host, ib, x[: options.shapley], options.orders)
    found["label bits"] = classes(host, ib, x)
    found["measures"] = measures(host, ib, data, options.images)
    found["device"] = f"CPU, {torch.get_num_threads()} threads" + (", host in bfloat16" * (options.host == "reference"))
    found["command"] = " ".join(["python benchmarks/relevance.py", *(os.path.basename(word) for word in sys.argv[1:])])
    found["versions"] = versions()
    everything = json.loads(OUT.read_text()) if OUT.is_file() else {}
    with replace_file(OUT) as file:
        file.write_text(json.dumps(everything | {options.host: found}, indent=1) + "\n")
    draw(host, ib, x[:DRAWN], quality.RESULTS / options.host / "relevance.jpg")
    print(json.dumps(found, indent=1))


def figures(ib: ibx.IBAttention) -> dict[str, float]:
    record = ib.record or {}
    return {name: round(record[name], 4) for name in ("final_bits", "final_agreement", "final_relevance_error")}


@torch.no_grad()
def shapley(host: nn.Module, ib: ibx.IBAttention, x: Tensor, orders: int) -> dict[str, Any]:
    """Correlation over positions of the learned values with sampled ones, and its ceiling, means over images."""
    assert ib._place is not None
    generator = torch.Generator().manual_seed(0)
    with frozen(host) as inner:
        seen = observe(inner, ib.site, x, deeper=ib._place.deeper, gradient=ib.reads == "gradient")
        learned = ib.bottleneck.label_bits(seen).flatten(1)
        halves = torch.zeros(2, *learned.shape)
        count = learned.shape[1]
        group = math.ceil(count / GROUPS)
        for number in range(orders):
            order = torch.randperm(count, generator=generator)
            noise = torch.randn((1, *seen.features.shape[1:]), generator=generator)
            passing = torch.zeros(count)
            before = None
            for start in range(0, count + group, group):
                passing[order[: min(start, count)]] = 1
                output = ib.bottleneck.restriction.apply_to(
                    seen, ib.site.layout, passing.view(1, 1, *ib.site.grid), noise
                )
                known = label_information(seen.tail(output), ib.bottleneck.get_buffer("closed"), seen.target)
                if before is not None:
                    new = order[start - group : min(start, count)]
                    halves[number % 2][:, new] += ((known - before) / len(new))[:, None] / (orders / 2)
                before = known
    reliability = correlation(halves[0], halves[1])
    # Of the mean over both halves (Spearman and Brown); its root is what the true values would correlate with it.
    whole = (2 * reliability / (1 + reliability)).clamp_min(0)
    return {
        "images": len(x),
        "orders": orders,
        "correlation": told(correlation(learned, halves.mean(dim=0))),
        "ceiling": told(whole.sqrt()),
        "sum of the sampled values less the label information": told(
            halves.mean(dim=0).sum(dim=1) - learned.sum(dim=1)
        ),
    }


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of each row, (B,)."""
    first, second = (values - values.mean(dim=1, keepdim=True) for values in (first, second))
    return (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1))


@torch.no_grad()
def classes(host: nn.Module, ib: ibx.IBAttention, x: Tensor) -> dict[str, Any]:
    """Label bits by the class that is asked for."""
    found = {}
    for name, target in asked(host, x).items():
        parts = zip(x.split(32), target.split(32), strict=True)
        heat = torch.cat([relevance(ib)(part, classes) for part, classes in parts])
        found[name] = told(heat.sum(dim=(1, 2, 3)))
    return found


def relevance(ib: ibx.IBAttention) -> Callable[[Tensor, Tensor], Tensor]:
    def explain(x: Tensor, target: Tensor) -> Tensor:
        maps = ib.attribute(x, target, output="relevance")
        assert isinstance(maps, Tensor)
        return maps

    return explain


def measures(host: nn.Module, ib: ibx.IBAttention, data: quality.Data, images: int) -> dict[str, Any]:
    """Mean of each measure, and the paired difference to Grad-CAM."""
    explains: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "grad_cam": lambda x, t: ibx.attribute(host, x, target=t, method="grad_cam"),
        "bits": ib.attribute,
        "relevance": relevance(ib),
    }
    rows: dict[str, dict[str, list[float]]] = {name: {m: [] for m in q.SEVEN} for name in explains}
    for batch in Source(data.measured, images=images).batches():
        with torch.no_grad():
            target = host(batch.x).argmax(1)
        for name, explain in explains.items():
            case = Case(host, batch.x, explain(batch.x, target), target=target, masks=batch.masks)
            for measure, scores in rows[name].items():
                scores += METRICS.get(measure)(case).tolist()
    table = {name: {m: torch.tensor(scores) for m, scores in row.items()} for name, row in rows.items()}
    return {
        name: {
            m: {"mean": round(values.nanmean().item(), 4), "less grad_cam": told(values - table["grad_cam"][m])}
            for m, values in row.items()
        }
        for name, row in table.items()
    }


def draw(host: nn.Module, ib: ibx.IBAttention, x: Tensor, path: Path) -> None:
    """Bits and relevance for the first and the second class of each image."""
    with torch.no_grad():
        first, second = host(x).topk(2, dim=1).indices.unbind(1)
    maps = {}
    for name, target in (("first class", first), ("second", second)):
        maps[f"bits, {name}"] = ib.attribute(x, target)
        maps[f"relevance, {name}"] = relevance(ib)(x, target)
    units = {name: "bits" if name.startswith("bits") else "label bits" for name in maps}
    ibx.visualize(x, maps, model=host, unit=units).savefig(path, dpi=100, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main()
