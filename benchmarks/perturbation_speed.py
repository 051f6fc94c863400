"""How much time do insertion, deletion and ROAD take beyond the model's own forward passes, and what do others take?

    python benchmarks/perturbation_speed.py [--device cpu] [--size 128] [--batch 8] [--steps 8] [--rounds 3]

Each comparison runs A B A B ... in this process, on one thread on a CPU, and gives the ratios of neighbours, as their
median and range, of CPU time on a CPU (which other programs disturb least) and of wall time. The model is a ResNet-18
with random weights: what is measured does not depend on what it predicts. Writes results/perturbation_speed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.metrics import deletion, insertion, insertion_deletion, noisy_linear_imputation
from ib_explain.perturb import rise_blur

RESULT = Path(__file__).parent / "results" / "perturbation_speed.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--batch", type=int, default=8, help="images, also in one forward pass")
    parser.add_argument("--steps", type=int, default=8, help="steps of a curve; must divide the number of pixels")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("resnet18").eval().to(args.device)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    maps = smooth_maps(args.batch, args.size).to(args.device)
    settings: dict[str, Any] = {"steps": args.steps, "batch_size": args.batch}
    per_step = args.size**2 // args.steps
    compare = Comparison(args.device, args.rounds)

    compare(
        "deletion / its own forward passes, bare",
        lambda: deletion(model, x, maps, **settings),
        lambda: forward_passes(model, x, args.steps + 1),
    )
    compare(
        "insertion, with RISE's blur / its own forward passes, bare",
        lambda: insertion(model, x, maps, **settings),
        lambda: forward_passes(model, x, args.steps + 1),
    )
    compare(
        "RISE's own procedure, an image at a time / insertion and deletion, equal steps",
        lambda: rise_procedure(model, x, maps, per_step),
        lambda: insertion_deletion(model, x, maps, pixels_per_step=per_step, batch_size=args.batch),
    )
    compare(
        "insertion and deletion / torchcam's metric, equal steps",
        lambda: insertion_deletion(model, x, maps, fill="zero", **settings),
        lambda: torchcam_metric(model, x, maps, args.steps, args.batch),
    )
    compare(
        "Quantus PixelFlipping / deletion, equal pixels per step",
        lambda: quantus_pixel_flipping(model, x, maps, per_step, args.batch, args.device),
        lambda: deletion(model, x, maps, pixels_per_step=per_step, batch_size=args.batch),
    )
    images = 16
    for kind, ranked in (("smooth", smooth_maps(images, 224)), ("random", torch.rand(images, 1, 224, 224))):
        removed = ranked[:, 0] > ranked.flatten(1).median(dim=1).values[:, None, None]
        pictures = smooth_maps(images * 3, 224).view(images, 3, 224, 224) + 0.1 * torch.randn(images, 3, 224, 224)
        ours = pictures.to(args.device), removed.to(args.device)
        compare(
            f"pytorch-grad-cam imputation / ours, 50 % removed, {kind} map, 224 pixels, for each image",
            lambda pictures=pictures, removed=removed: grad_cam_imputation(pictures[:2], removed[:2]),
            lambda ours=ours: noisy_linear_imputation(*ours),
            scale=images / 2,
        )

    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "model": "resnet18, random weights",
        "ratios": compare.rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")


PACKAGES = ("torch", "timm", "torchcam", "quantus", "grad-cam", "scipy", "numpy")


class Comparison:
    """Runs A B A B ... and keeps the ratios."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, a: Callable[[], Any], b: Callable[[], Any], *, scale: float = 1.0) -> None:
        """File the ratios `scale` * a / b; `scale` makes up for different numbers of images."""
        pairs = [(self._time(a), self._time(b)) for _ in range(self.rounds + 1)][1:]  # the first is a warm-up
        row = {}
        for clock in ("cpu", "wall"):
            ratios = sorted(scale * first[clock] / second[clock] for first, second in pairs)
            row[clock] = {"median": round(statistics.median(ratios), 3), "range": [round(ratios[0], 3)]}
            row[clock]["range"].append(round(ratios[-1], 3))
        if self.device.startswith("cuda"):
            del row["cpu"]  # says nothing about a GPU
        row["seconds"] = {"a": round(pairs[-1][0]["wall"], 3), "b": round(pairs[-1][1]["wall"], 3)}
        self.rows[name] = row
        print(f"{name}: {row}", flush=True)

    def _time(self, run: Callable[[], Any]) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def smooth_maps(count: int, size: int) -> Tensor:
    return F.interpolate(torch.randn(count, 1, 7, 7), size=(size, size), mode="bicubic")


@torch.no_grad()
def forward_passes(model: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        model(x)


@torch.no_grad()
def rise_procedure(model: nn.Module, x: Tensor, maps: Tensor, per_step: int) -> None:
    """Insertion and deletion as RISE's `CausalMetric.single_run` has them: image by image, step by step."""
    for image, heat in zip(x, maps, strict=True):
        target = model(image[None]).softmax(dim=1).argmax(dim=1)
        order = heat.flatten().argsort(descending=True)
        for start, finish in ((image.clone(), torch.zeros_like(image)), (rise_blur(image[None])[0], image)):
            scores = []
            for step in range(len(order) // per_step + 1):
                scores.append(model(start[None]).softmax(dim=1)[0, target])
                replaced = order[per_step * step : per_step * (step + 1)]
                start.flatten(1)[:, replaced] = finish.flatten(1)[:, replaced]
            torch.cat(scores)


def torchcam_metric(model: nn.Module, x: Tensor, maps: Tensor, steps: int, batch_size: int) -> None:
    from torchcam.metrics import DeletionInsertionMetric

    class Given:
        """A CAM extractor that returns the maps it was given: only the metric is timed."""

        def __init__(self) -> None:
            self.model = model

        def __call__(self, class_idx: Any = None, scores: Any = None, **_: Any) -> list[Tensor]:
            return [maps[:, 0]]

        def fuse_cams(self, cams: list[Tensor]) -> Tensor:
            return cams[0]

        def _hooks_off(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    metric = DeletionInsertionMetric(Given(), lambda logits: logits.softmax(1), steps=steps, batch_size=batch_size)
    metric.update(x)
    metric.summary()


def quantus_pixel_flipping(
    model: nn.Module, x: Tensor, maps: Tensor, per_step: int, batch_size: int, device: str
) -> None:
    import quantus

    metric = quantus.PixelFlipping(features_in_step=per_step, disable_warnings=True, display_progressbar=False)
    with torch.no_grad():
        target = model(x).argmax(1)
    metric(model, x.cpu().numpy(), target.cpu().numpy(), maps.cpu().numpy(), device=device, batch_size=batch_size)


def grad_cam_imputation(x: Tensor, removed: Tensor) -> None:
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    impute = NoisyLinearImputer()
    for image, holes in zip(x, removed, strict=True):
        impute(image, (~holes).float())


if __name__ == "__main__":
    main()
