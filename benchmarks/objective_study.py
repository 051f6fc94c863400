"""What the parts of the objective bring: fits with a part left out or another setting, measured on held-out images.

    python benchmarks/objective_study.py --weights FILE --data FOLDER [--images 150] [--steps 200] [--variants NAME,...]

The host and the images are those of `quality.py --host reference --split train`: fitted on four fifths of the training
images, measured on the last fifth, with the host in bfloat16. Validation images are not touched. Writes
results/quality/objective_study.json after each variant; variants that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import quality
import quality_methods as q
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain import objective, training
from ib_explain.files import replace_file
from ib_explain.io import versions
from ib_explain.metrics import METRICS, Case
from ib_explain.observation import Observation
from ib_explain.sources import Source

OUT = quality.RESULTS / "objective_study.json"


def linear(bits: Tensor, price: Tensor, channels: int) -> Tensor:
    """The plain rate: mean priced nats a feature element, (B,)."""
    return (bits * price).mean(dim=(1, 2, 3)) * (math.log(2) / channels)


def unscaled(seen: Observation) -> Tensor:
    """The places' prices with a geometric mean of 1 in place of the arithmetic one: cheap places are not quite free."""
    price = objective.location_price(seen)
    return price / price.log().mean(dim=(2, 3), keepdim=True).exp()


@dataclass(frozen=True)
class Variant:
    """What differs from the package's own objective."""

    price: float = objective.BETA_PER_STAKE
    contrast: float = objective.CONTRAST
    rate: Callable[[Tensor, Tensor, int], Tensor] = objective.rate
    prices: Callable[[Observation], Tensor] = objective.location_price
    reads: str = "gradient"
    layer: str | None = None
    images: int | None = None
    """Fitting images, all of them if None."""
    seed: int = 0


VARIANTS = {
    "as released": Variant(),
    "seed 1": Variant(seed=1),
    "one price for all places": Variant(contrast=0.0),
    "linear rate": Variant(rate=linear),
    "linear rate and one price": Variant(contrast=0.0, rate=linear),
    "linear rate and one price of 0.25": Variant(contrast=0.0, rate=linear, price=0.25),
    "contrast 1": Variant(contrast=1.0),
    "contrast 2": Variant(contrast=2.0),
    "contrast 4": Variant(contrast=4.0),
    "price 0.5": Variant(price=0.5),
    "price 1": Variant(price=1.0),
    "price 4": Variant(price=4.0),
    "contrast 2 and price 1": Variant(contrast=2.0, price=1.0),
    "geometric mean of prices": Variant(prices=unscaled),
    "geometric mean of prices and contrast 1.5": Variant(prices=unscaled, contrast=1.5),
    "features": Variant(reads="features"),
    "1000 images": Variant(images=1000),
    "one stage earlier": Variant(layer="layer1"),
    "one stage later": Variant(layer="layer3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    options = parser.parse_args()
    options.split = "train"
    host, data = quality.reference(options)
    host = host.to(memory_format=torch.channels_last)
    quality.in_bf16(host)
    table: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": {}}
    table |= {"images": options.images, "steps": options.steps, "versions": versions(), "split": data.name}
    table["device"] = f"CPU, {torch.get_num_threads()} threads, host in bfloat16"
    table["command"] = "python benchmarks/objective_study.py " + " ".join(Path(word).name for word in sys.argv[1:])
    methods: dict[str, Any] = {
        "grad_cam layer3": ("grad_cam", "layer3"),
        **{name: VARIANTS[name] for name in options.variants},
    }
    for name, method in methods.items():
        if name in table["rows"]:
            continue
        if isinstance(method, Variant):
            ib = fit(host, data, method, options.steps)
            explain: Callable[[Tensor, Tensor], Any] = ib.attribute
        else:
            explain = lambda x, t, m=method: ibx.attribute(host, x, target=t, method=m[0], layer=m[1])  # noqa: E731
        table["rows"][name] = measure(host, data, explain, options.images)
        with replace_file(OUT) as file:
            file.write_text(json.dumps(table, indent=1) + "\n")
        print(name, summary(table["rows"], name), flush=True)


def fit(host: nn.Module, data: quality.Data, variant: Variant, steps: int) -> ibx.IBAttention:
    fitted_on = (
        data.fit
        if variant.images is None
        else torch.utils.data.Subset(data.fit, range(0, len(data.fit), len(data.fit) // variant.images))
    )
    loader = DataLoader(fitted_on, quality.FIT_BATCH, shuffle=True, drop_last=True)
    with changed(variant):
        return ibx.IBAttention(host, variant.layer, reads=variant.reads, seed=variant.seed).fit(loader, steps=steps)


@contextmanager
def changed(variant: Variant) -> Iterator[None]:
    with (
        mock.patch.object(training, "BETA_PER_STAKE", variant.price),
        mock.patch.object(training, "rate", variant.rate),
        mock.patch.object(training, "location_price", variant.prices),
        mock.patch.object(objective, "CONTRAST", variant.contrast),
    ):
        yield


def measure(
    host: nn.Module, data: quality.Data, explain: Callable[[Tensor, Tensor], Any], images: int
) -> dict[str, list[float]]:
    """Scores of every image under the seven measures and the lattice."""
    found: dict[str, list[float]] = {name: [] for name in (*q.SEVEN, "lattice")}
    for batch in Source(data.measured, images=images).batches():
        with torch.no_grad():
            target = host(batch.x).argmax(1)
        case = Case(host, batch.x, explain(batch.x, target), target=target, masks=batch.masks)
        for name, scores in found.items():
            scores += [round(value, 5) for value in METRICS.get(name)(case).tolist()]
    return found


def summary(rows: dict[str, dict[str, list[float]]], name: str) -> str:
    """Means, and differences to Grad-CAM with half the width of their 95 % interval."""
    cells = []
    for measure_name, scores in rows[name].items():
        values, reference = torch.tensor(scores), torch.tensor(rows["grad_cam layer3"][measure_name])
        difference = (values - reference)[torch.isfinite(values - reference)]
        half = 1.96 * difference.std() / math.sqrt(len(difference))
        cells.append(f"{measure_name} {values.nanmean():.3f} ({difference.mean():+.3f} ± {half:.3f})")
    return "  ".join(cells)


if __name__ == "__main__":
    main()
