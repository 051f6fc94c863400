"""What fitting and attributing cost, as ratios to the same work written by hand, timed alternately in one run.

    python benchmarks/attribution_speed.py [--batch 32] [--rounds 5] [--device cuda] [--part attribute]

Writes benchmarks/results/attribution_speed.json: for every comparison the median of the paired ratios, their range, and
what was compared with what. Weights are random: only time and memory are measured. A bottleneck is fitted for two steps
first; its cost does not depend on how well it is fitted. It sits at the ResNet's default layer, and in the ViT at a
third of its depth, where the default layer of the trained one of quality.py is: that of random weights, whose class
token gathers the image from the first block on, is the embedding.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.bottleneck.module import Restriction
from ib_explain.data.batches import Batches
from ib_explain.fitting import DEFAULT_IMAGES, launched
from ib_explain.io import versions
from ib_explain.lending import frozen
from ib_explain.metrics.cost import peak_bytes
from ib_explain.observation import observe
from ib_explain.per_image import PerImageSettings, optimise
from ib_explain.places import find_place
from ib_explain.reference import reference_statistics
from ib_explain.training import UPDATES, FitSettings, Trainer

RESULTS = Path(__file__).parent / "results" / "attribution_speed.json"
LAYERS = {"resnet50": "layer3", "vit_small_patch16_224": "blocks.3"}
LAST_STAGES = {"resnet50": "layer4", "vit_small_patch16_224": "blocks.10"}  # for Captum's Grad-CAM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=["attribute", "fit", "per_image", "memory"], action="append")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # a child process that measures one peak of memory
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak_of:
        host, work = options.peak_of.split("/")
        run = attribute_works(host, options)[work]
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the set-up
        run()
        print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
        return
    parts = {"attribute": attribute, "fit": fit, "per_image": per_image, "memory": memory}
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in options.part or parts:  # one that is not asked for stays as it was
        table[part] = {**about(options), "ratios": parts[part](options)}
        RESULTS.write_text(json.dumps(table, indent=2) + "\n")


def about(options: argparse.Namespace) -> dict[str, object]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
    return {"command": command, "device": name, "batch": options.batch, "layers": LAYERS, "versions": versions()}


def build(name: str, options: argparse.Namespace, size: int = 224) -> tuple[nn.Module, Tensor]:
    host = timm.create_model(name).eval().to(options.device)
    return host, torch.randn(options.batch, 3, size, size, device=options.device)


def attribute_works(name: str, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The things that are compared on one host, each a function without arguments."""
    host, x = build(name, options)
    data = [x[:4]] * 2
    fitted = {reads: ibx.IBAttention(host, LAYERS[name], reads=reads) for reads in ("features", "gradient")}
    for ib in fitted.values():
        ib.fit(data, steps=2, show_progress=False)
    site = fitted["gradient"].site
    module = dict(host.named_modules())[site.name]
    last = dict(host.named_modules())[LAST_STAGES[name]]

    def forward() -> Tensor:
        with torch.no_grad():
            return host(x)

    def forward_and_backward_behind() -> Tensor:
        kept: list[Tensor] = []

        def switch(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            kept.append(output.detach().requires_grad_())
            return kept[0].clone()

        handle = module.register_forward_hook(switch)
        try:
            with frozen(host), torch.no_grad():
                logits = host(x)
                with torch.enable_grad():
                    score = logits.gather(1, logits.argmax(1, keepdim=True)).sum()
                return torch.autograd.grad(score, kept[0])[0]
        finally:
            handle.remove()

    def captum_grad_cam() -> Tensor:
        with frozen(host):
            return LayerGradCam(host, last).attribute(x, target=0)

    return {
        "forward": forward,
        "forward and backward behind the site": forward_and_backward_behind,
        "attribute, features": lambda: fitted["features"].attribute(x),
        "attribute, gradient": lambda: fitted["gradient"].attribute(x),
        "Captum LayerGradCam, last stage": captum_grad_cam,
    }


def attribute(options: argparse.Namespace) -> dict[str, object]:
    """Fitted `attribute` against one forward pass, or one forward pass and one backward behind the site."""
    found = {}
    for name in LAYERS:
        works = attribute_works(name, options)
        pairs = [
            ("attribute, features", "forward"),
            ("attribute, gradient", "forward and backward behind the site"),
            ("attribute, gradient", "forward"),
            ("Captum LayerGradCam, last stage", "forward"),
        ]
        for work, against in pairs:
            label = f"{name}: {work} / {against}"
            found[label] = compare(label, works[work], works[against], options)
    return found


def fit(options: argparse.Namespace) -> dict[str, object]:
    """One step of the optimiser against the passes that it cannot do without, written by hand.

    Timed are all steps on a batch, which share a clean pass, and divided by their number.
    """
    found: dict[str, object] = {}
    for name in LAYERS:
        for reads in ("features", "gradient"):
            found |= fit_one(name, reads, options)
    return found


def fit_one(name: str, reads: str, options: argparse.Namespace) -> dict[str, object]:
    host, x = build(name, options)
    ib = ibx.IBAttention(host, LAYERS[name], reads=reads).fit([x[:4]] * 2, steps=2, show_progress=False)
    settings = FitSettings(1000, 1.0, 1e-3, "prediction", "fp32", 0)
    found = {}
    with frozen(host), launched(x.device) as accelerator:
        place, bottleneck = ib._place, ib.bottleneck.requires_grad_(True)
        trainer = Trainer(bottleneck, host, place, Batches([x], 0).share, settings, accelerator)
        trainer.step(x, None)  # the first and every eighth batch also score the closed bottleneck; not timed here
        for label, clean, restricted in (
            ("up to the site without autograd, forward and backward behind it", False, 1),
            ("its share of all passes that its targets, readings and prices need, by hand", True, UPDATES),
        ):
            label = f"{name}: fit step, {reads} / {label}"
            by_hand = functools.partial(plain, host, place, x, clean, restricted)
            found[label] = compare(label, lambda: trainer.step(x, None), by_hand, options, factor=restricted / UPDATES)
    label = f"{name}: default fit of {DEFAULT_IMAGES[reads]:,} images, {reads} / training passes over 10,000 images"

    def step() -> None:
        with frozen(host):
            trainer.step(x, None)

    share = DEFAULT_IMAGES[reads] / 10_000
    found[label] = compare(label, step, lambda: training_pass(host, x), options, factor=share)
    return found


def training_pass(host: nn.Module, x: Tensor) -> None:
    """Forward and backward through the whole host, to all of its parameters."""
    logits = host(x)
    torch.autograd.grad(F.cross_entropy(logits, logits.detach().argmax(1)), list(host.parameters()))


def plain(host: nn.Module, place, x: Tensor, clean: bool, restricted: int) -> None:
    """Forward up to the site without autograd, and forward and backward behind it, once clean, if asked, and so often
    restricted."""
    with torch.no_grad():
        seen = observe(host, place.site, x, gradient=True) if clean else Prefix(host, place, x)
        features = place.site.layout.to_grid(seen.output).detach()
    for _ in range(restricted):
        leaf = features.clone().requires_grad_()
        with torch.enable_grad():
            logits = seen.tail(place.site.layout.with_grid(seen.output, leaf * 1.0))
            torch.autograd.grad(F.cross_entropy(logits, logits.detach().argmax(1)), leaf)


class Prefix:
    """The pass up to the site alone, ended there."""

    def __init__(self, host: nn.Module, place, x: Tensor) -> None:
        from ib_explain.hooks import capture
        from ib_explain.tails import TailRecorder

        with TailRecorder(host, place.site.name) as recorder, capture(host, [place.site.name], stop=True) as seen:
            host(x)
        self.output, self.tail = seen[place.site.name], recorder.tail(x)


def per_image(options: argparse.Namespace) -> dict[str, object]:
    """A batch optimised at once against one image at a time as published: same steps and noise copies, frozen host."""
    steps, copies = 4, 4
    host, x = build("resnet18", options, size=128)
    settings = PerImageSettings(steps=steps, copies=copies)
    place = find_place(host, "layer2", (3, 128, 128), read=False)
    with frozen(host):
        found = reference_statistics(host, place.site, None, per_element=False)
        restriction = Restriction("gaussian", found.moments, found.side).to(x.device).requires_grad_(False)
    target = host(x).argmax(1)

    def one_at_a_time() -> None:
        module = dict(host.named_modules())["layer2"]
        with frozen(host):
            for image, wanted in zip(x[: max(2, options.batch // 8)], target, strict=False):
                tiled, alpha = image.expand(copies, -1, -1, -1), torch.full((1, 1, 16, 16), 1.0, device=x.device)
                alpha.requires_grad_()
                optimiser = torch.optim.Adam([alpha], lr=0.5)
                for _ in range(steps):
                    nats: list[Tensor] = []

                    def hook(_m: nn.Module, _i: object, output: Tensor, alpha=alpha, nats=nats) -> Tensor:
                        r, a = restriction.moments(output), alpha.sigmoid()
                        nats.append(restriction.gate.bits(a, r.square().sum(1, keepdim=True), r.shape[1]).mean())
                        return restriction.moments.restore(restriction.gate.mix(r, a, torch.randn_like(r)))

                    handle = module.register_forward_hook(hook)
                    logits = host(tiled)
                    handle.remove()
                    loss = F.cross_entropy(logits, wanted.expand(copies)) + nats[0]
                    (alpha.grad,) = torch.autograd.grad(loss, alpha)
                    optimiser.step()

    def together() -> None:
        with frozen(host), torch.no_grad():
            seen = observe(host, place.site, x, target)
            optimise(restriction, seen, place.site.layout, settings)

    share = options.batch / max(2, options.batch // 8)
    label = f"resnet18 at 128 px, layer2: one image at a time / batch of {options.batch}, per image"
    return {label: compare(label, one_at_a_time, together, options, factor=share)}


def memory(options: argparse.Namespace) -> dict[str, object]:
    """Peak memory of a fitted `attribute` against the same passes by hand.

    Of a whole process, each in one of its own, and of the tensors alone that live at once meanwhile: without weights,
    images, modules and what an allocator keeps.
    """
    found = {}
    for name in LAYERS:
        works = attribute_works(name, options)
        for work, against in [
            ("attribute, features", "forward"),
            ("attribute, gradient", "forward and backward behind the site"),
        ]:
            peaks = [peak(f"{name}/{w}", options) for w in (work, against)]
            label = f"{name}: peak memory, {work} / {against}"
            found[label] = {"ratio": round(peaks[0] / peaks[1], 3), "megabytes": [round(p / 2**20) for p in peaks]}
            made = [peak_bytes(works[w], torch.device(options.device)) for w in (work, against)]
            found[label]["tensors made meanwhile"] = {
                "ratio": round(made[0] / made[1], 3),
                "megabytes": [round(m / 2**20) for m in made],
            }
            print(label, found[label], flush=True)
    return found


def peak(work: str, options: argparse.Namespace) -> float:
    """Bytes: allocated on the GPU, or on the CPU the whole process's resident peak (Linux alone tells it)."""
    if options.device == "cuda":
        host, name = work.split("/")
        run = attribute_works(host, options)[name]
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    command = [sys.executable, __file__, "--peak-of", work, "--batch", str(options.batch), "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-2]) * 1024  # VmHWM: N kB


def compare(
    label: str,
    work: Callable[[], object],
    against: Callable[[], object],
    options: argparse.Namespace,
    factor: float = 1.0,
) -> dict[str, object]:
    """Median and range of time(work) / time(against) over alternating rounds, after one round that is not counted."""
    ratios = []
    for number in range(options.rounds + 1):
        pair = [seconds(w, options) for w in ((work, against) if number % 2 else (against, work))]
        first, second = pair if number % 2 else reversed(pair)
        if number:
            ratios.append(first / second * factor)
    result = {
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": options.rounds,
    }
    print(label, result, flush=True)
    return result


def seconds(work: Callable[[], object], options: argparse.Namespace) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
