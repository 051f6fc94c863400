"""Do the maps follow the host, the class, and no seed? Sanity checks of fitted bottlenecks on the reference host.

    python benchmarks/sanity.py --weights FILE --data FOLDER --fitted FOLDER [--images 96] [--cascade 24] [--steps 100]

The host and its images are those of `quality.py --host reference`; --fitted is the folder `fitted` of its --out, with
bottlenecks of two seeds or more. Writes results/quality/sanity.json and sanity.png:

- rank correlation of the maps of any two fitting seeds;
- bits for the predicted class, the second one and one drawn at random, and the share of images that get fewer bits for
  the random class than for the predicted one;
- 1 - rank correlation between the maps of the first and the second class, beside Grad-CAM's at layer3;
- cascading randomisation (Adebayo et al. 2018, arXiv 1810.03292) of the per-image bottleneck beside Grad-CAM;
- a bottleneck fitted again to the wholly randomised host against the one of the trained host.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import quality
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ib_explain as ibx
from ib_explain.files import replace_file
from ib_explain.io import versions
from ib_explain.metrics import (
    Randomisation,
    cascading_randomisation,
    rank_correlation,
    seed_correlation,
    target_sensitivity,
)
from ib_explain.metrics.random_weights import randomisable_layers
from ib_explain.sources import Source

CASCADE = ("fc", "layer4", "layer3", "layer2", "layer1", "conv1")
BESIDE = "layer3"  # Grad-CAM's best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fitted", type=Path, required=True)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--cascade", type=int, default=24, help="images of the cascade")
    parser.add_argument("--steps", type=int, default=100, help="of the fit to the randomised host")
    options = parser.parse_args()
    options.split = "val"
    host, data = quality.reference(options)
    host = host.to(memory_format=torch.channels_last)
    x = torch.cat([batch.x for batch in Source(data.measured, images=options.images).batches()])
    fitted = [ibx.IBAttention.load(folder, host) for folder in sorted(options.fitted.glob("ib-gradient-*[0-9t]"))]
    ib, layer = fitted[0], fitted[0].site.name

    found: dict[str, Any] = {"images": options.images, "bottlenecks": len(fitted)}
    explains = [lambda _host, part, target, one=one: one.attribute(part, target) for one in fitted]
    found["rank correlation of two seeds"] = told(seed_correlation(host, x, explains))
    found |= classes(host, ib, x)

    def grad_cam(model: nn.Module, part: Tensor, target: Tensor) -> Tensor:
        return ibx.attribute(model, part, target=target, method="grad_cam", layer=BESIDE)

    def per_image(model: nn.Module, part: Tensor, target: Tensor) -> Tensor:
        return ibx.attribute(model, part, target=target, layer=layer, reference=examples)

    changes = {"ib": explains[0], f"grad_cam {BESIDE}": grad_cam}
    found["change from the first class to the second"] = {
        name: told(target_sensitivity(host, x, explain).change) for name, explain in changes.items()
    }
    examples = data.examples(64)
    few = x[: options.cascade]
    cascades = {
        "ib, per image": cascading_randomisation(host, few, per_image, layers=CASCADE),
        f"Grad-CAM {BESIDE}": cascading_randomisation(host, few, grad_cam, layers=CASCADE),
    }
    found["cascade"] = {"images": len(few), "layers": list(CASCADE)} | {
        name: {
            "rank correlation": [told(row) for row in cascade.rank_correlation],
            "SSIM": [told(row) for row in cascade.ssim],
        }
        for name, cascade in cascades.items()
    }
    draw(cascades).savefig(quality.RESULTS / "sanity.png", dpi=100)

    twin = randomised(host, x)
    quality.in_bf16(twin)
    other = ibx.IBAttention(twin, layer).fit(
        DataLoader(data.fit, quality.FIT_BATCH, shuffle=True, drop_last=True), steps=options.steps
    )
    classes_of_host = host(x).argmax(1)
    pairs = rank_correlation(maps(ib, x, classes_of_host), maps(other, x, classes_of_host))
    found["rank correlation with the bottleneck of the randomised host"] = told(pairs)

    found["device"] = f"CPU, {torch.get_num_threads()} threads"
    found["command"] = "python benchmarks/sanity.py " + " ".join(Path(word).name for word in sys.argv[1:])
    found["versions"] = versions()
    with replace_file(quality.RESULTS / "sanity.json") as file:
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def maps(ib: ibx.IBAttention, x: Tensor, target: Tensor) -> Tensor:
    """Maps (B, 1, H, W), 32 images at a time."""
    parts = [ib.attribute(part, t) for part, t in zip(x.split(32), target.split(32), strict=True)]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


@torch.no_grad()
def asked(host: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Classes (B,) to ask for: the predicted one, the second one, and another one than the predicted at random."""
    logits = torch.cat([host(part) for part in x.split(32)])
    first, second = logits.topk(2, dim=1).indices.unbind(1)
    offset = torch.randint(1, logits.shape[1], first.shape, generator=torch.Generator().manual_seed(0))
    return {"predicted": first, "second": second, "random": (first + offset) % logits.shape[1]}


@torch.no_grad()
def classes(host: nn.Module, ib: ibx.IBAttention, x: Tensor) -> dict[str, Any]:
    """Bits by the class that is asked for."""
    bits = {name: maps(ib, x, target).sum(dim=(1, 2, 3)) for name, target in asked(host, x).items()}
    return {
        "bits": {name: told(values) for name, values in bits.items()},
        "fewer bits for a random class": told((bits["random"] < bits["predicted"]).float()),
    }


def randomised(host: nn.Module, x: Tensor) -> nn.Module:
    """A copy with fresh weights in every layer."""
    twin = copy.deepcopy(host)
    torch.manual_seed(0)
    for name in randomisable_layers(host, x[:1]):
        module = twin.get_submodule(name)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return twin.eval()


def told(values: Tensor) -> dict[str, float]:
    """Mean over images, and half the width of its 95 % interval."""
    values = values.flatten()[torch.isfinite(values.flatten())].double()
    half = 1.96 * values.std().item() / math.sqrt(max(1, len(values)))
    return {"mean": round(values.mean().item(), 4), "half width": round(half, 4)}


def draw(cascades: dict[str, Randomisation]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for panel, kind in zip(panels, ("rank_correlation", "ssim"), strict=True):
        for name, cascade in cascades.items():
            values = getattr(cascade, kind)  # (L, B)
            mean = [1.0, *values.nanmean(dim=1).tolist()]
            panel.plot(range(len(mean)), mean, marker="o", label=name)
        panel.set_xticks(range(len(CASCADE) + 1), ["none", *CASCADE], rotation=30)
        panel.set_title(kind.replace("_", " ").replace("ssim", "SSIM"))
        panel.axhline(0, color="grey", linewidth=0.6)
    panels[0].set_xlabel("randomised down to")
    panels[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
