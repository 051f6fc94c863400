"""How good are the maps? All methods under seven measures on one host: a table, its numbers, figures, and maps.

    python benchmarks/quality.py --host cnn --out FOLDER [--images 500] [--split val] [--seeds 0,1,2] [--methods all]
    python benchmarks/quality.py --host reference --weights FILE --data FOLDER --out FOLDER [...]
    python benchmarks/quality.py --host swin --hosts FOLDER --out FOLDER [...]

`reference` is a timm resnet18 with 100 classes at 128 px; its data folder holds train.tar, val.tar and boxes.csv (see
reference_host.py). The other hosts classify the package's synthetic pictures, with exact masks of the evidence: `cnn`
is the demo's, the others are read from --hosts (see train_hosts.py).

Bottlenecks are fitted on four fifths of the training images, or on synthetic pictures of their own. `--split train`
measures on the last fifth, or on pictures kept for choosing between settings, and writes below --out alone; `--split
val` is for final tables and writes to results/quality/HOST/ as well: table.md, table.json,
cost_faithfulness.png, maps.jpg (a map for each of 64 images) and methods.jpg (the main methods on eight images).

In --out lie the fitted bottlenecks, a run of `ib_explain.benchmark` for each group of methods (all of which go on where
they were stopped), and report/, the page of all together. With --kept what was measured is also kept without its
figures, small enough for a repository, and a later run elsewhere goes on from there: results/quality/HOST/kept holds
each image's values of all methods but ours. After a change of our method delete its fits and runs, named ib-*, in both;
the others stand. A run with --bf16 needs an --out of its own: its fits and rows look like any others.

`--methods baselines` needs no fit and makes no table yet: it is the part that can run before. `--methods own` measures
what a change of our method moves, `ib` of each seed, as fitted and refined, with its controls, beside Grad-CAM alone,
and writes own.md and own.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quality_figures as figures
import quality_methods as q
import quality_table as tables
import torch
from quality_kept import bring_run, copy_fit, keep_run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import ib_explain as ibx
from ib_explain.data import BoxImages, Synthetic, demo_host, open_dataset, preprocess, read_boxes
from ib_explain.hosts import load_host, pick_device
from ib_explain.io import versions
from ib_explain.leaderboard import Leaderboard
from ib_explain.metrics import METRICS, Case
from ib_explain.sources import Source

RESULTS = Path(__file__).parent / "results" / "quality"
HOSTS = ("reference", "cnn", "swin", "vit", "mixer")
SIZE = 128  # pixels a side for the reference host
FIT_BATCH = 32
FIT_PICTURES = 4096  # synthetic ones
SEEDS = {"fit": 31, "train": 32, "val": 33}  # of synthetic pictures; hosts are trained on others
HELD_OUT = 5  # every fifth training image is not fitted on
EXAMPLES = 1000  # fitting images for statistics of other methods
SHEET = 64  # images of maps.jpg
FIT_LEFT_OUT = ("history", "versions", "data", "device")  # of a fit's record: long, or told elsewhere


@dataclass(frozen=True)
class Data:
    """What is fitted on and what is measured on."""

    name: str
    fit: Dataset[Any]
    """Items are (image, ...)."""
    measured: Any
    """For `benchmark`: with masks or boxes."""

    def examples(self, count: int) -> Tensor:
        """Images of the fitting part, evenly over its length: (count, 3, H, W), all if there are fewer."""
        total = len(self.fit)  # type: ignore[arg-type]
        count = min(count, total)
        return torch.stack([self.fit[i * total // count][0] for i in range(count)])


def main() -> None:
    options = parse()
    host, data = open_host(options)
    # A sixth faster on a CPU, the same logits to 6 digits.
    host = host.to(pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.bf16:
        in_bf16(host)
    estimate(host, data, options)
    examples = data.examples(EXAMPLES).to(pick_device())
    layers = q.stage_layers(host)
    grad_cams = q.grad_cams(layers)
    boards = [run("grad-cam", host, data, grad_cams, options)]
    best = tables.best_by_gap(boards[0])
    layer = grad_cams[best][1]["layer"]
    baselines = q.baselines(layers, layer, examples)
    if options.methods != "own":
        boards.append(run("baselines", host, data, baselines, options))
        if layer != ibx.default_layer(host):
            boards.append(run("energy", host, data, q.deep_energy(layer, examples), options))
    if options.methods == "baselines":
        return

    seed = options.seeds[0]
    fitted = {f"ib seed {n}": fit(host, data, n, "gradient", options) for n in options.seeds}
    name, ib = next(iter(fitted.items()))
    more = {"refine": q.REFINE}
    refined = {f"ib refine={q.REFINE} seed {n}": (fitted[f"ib seed {n}"], more) for n in options.seeds}
    controls = q.controls(host, ib, layer, examples)
    boards.append(run(f"ib-seed{seed}", host, data, {name: ib} | controls, options))
    for n, key in list(zip(options.seeds, fitted, strict=True))[1:]:
        boards.append(run(f"ib-seed{n}", host, data, {key: fitted[key]}, options))
    for n, key in zip(options.seeds, refined, strict=True):
        boards.append(run(f"ib-refined-seed{n}", host, data, {key: refined[key]}, options))
    roles = tables.Roles(
        best=best,
        seeds=list(fitted),
        earlier=f"ib at {q.one_stage_earlier(host)}",
        refined=list(refined),
        controls=list(controls),
        rivals=["attention_gradient_rollout"],
        costly=[q.RISE, "iba", "occlusion", "feature_ablation", "integrated_gradients blurred"],
        energy="activation_energy",
    )
    folder = RESULTS / options.host if options.split == "val" else options.out / "table"
    folder.mkdir(parents=True, exist_ok=True)
    few = Source(data.measured, images=min(SHEET, options.images)).batches()
    images = torch.cat([batch.x for batch in few]).to(pick_device())
    figures.maps_sheet(host, images, ib, folder)
    if options.methods == "own":
        told = about(host, data, fitted, options)
        tables.write_own(tables.join(boards, best, options.out / "report"), roles, told, folder)
        print((folder / "own.md").read_text())
        return

    features = {f"ib_features seed {seed}": fit(host, data, seed, "features", options)}
    boards.append(run("ib-features", host, data, features, options))
    earlier = q.one_stage_earlier(host)
    shallow = {roles.earlier: fit(host, data, seed, "gradient", options, layer=earlier)}
    boards.append(run("ib-earlier", host, data, shallow, options))
    if options.methods == "all":
        host.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # DeepLIFT refuses the other one
        extras = q.extras(layer, examples, int(examples.shape[-1]))
        if unknown := set(options.without) - set(extras):
            sys.exit(f"--without takes of {', '.join(extras)}; got {', '.join(sorted(unknown))}")
        for extra, made in extras.items():  # a run each: a day may be too short for all
            if extra not in options.without:
                boards.append(run(f"extra-{extra.replace(' ', '-')}", host, data, {extra: made}, options))

    tables.write(
        tables.join(boards, best, options.out / "report"),
        roles,
        about(host, data, fitted | features | shallow, options),
        folder,
    )
    finest = {roles.refined[0]: refined[roles.refined[0]]}
    seeing = {key: made for key, made in baselines.items() if key not in q.HOST_FREE}
    figures.methods_sheet(host, images, {name: ib} | features | finest | {best: grad_cams[best]} | seeing, folder)
    print((folder / "table.md").read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, choices=HOSTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--split", choices=["train", "val"], default="train")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0])
    parser.add_argument("--steps", type=int, help="of a fit; the package's default if left out")
    parser.add_argument("--methods", choices=["own", "baselines", "core", "all"], default="core")
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help="methods of all to leave out")
    parser.add_argument("--bf16", action="store_true", help="the host computes in bfloat16: twice as fast on some CPUs")
    parser.add_argument("--kept", type=Path, help="folder of finished runs and fits to go on from, and to add to")
    add_host_arguments(parser)
    options = parser.parse_args()
    check_host_arguments(parser, options)
    return options


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the hosts lie."""
    parser.add_argument("--hosts", type=Path, help="folder of swin, vit and mixer")
    parser.add_argument("--weights", type=Path, help="of the reference host")
    parser.add_argument("--data", type=Path, help="of the reference host")


def check_host_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a host without its files."""
    if options.host == "reference" and not (options.weights and options.data):
        parser.error("the reference host needs --weights FILE and --data FOLDER")
    if options.host in ("swin", "vit", "mixer") and not options.hosts:
        parser.error(f"the host {options.host} needs --hosts FOLDER")


def in_bf16(host: nn.Module) -> None:
    """Let the host run under autocast to bfloat16; its logits, and all that is not the host, stay float32.

    By its class, so that a copy runs its own modules.
    """
    kind = type(host)

    def lower(self: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return kind.forward(self, x).float()  # type: ignore[operator]

    host.__class__ = type(kind.__name__, (kind,), {"forward": lower})


def open_host(options: argparse.Namespace) -> tuple[nn.Module, Data]:
    """The host that was asked for, and its pictures."""
    return reference(options) if options.host == "reference" else synthetic(options)


def reference(options: argparse.Namespace) -> tuple[nn.Module, Data]:
    """The host of reference_host.py and its pictures with boxes."""
    host = load_host("resnet18", checkpoint=options.weights, num_classes=100, input_size=(SIZE, SIZE))
    host.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
    pictures = preprocess(host, size=(SIZE, SIZE), crop_pct=1.0, crop_mode="squash", interpolation="bilinear")
    train = open_dataset(options.data / "train.tar", transform=pictures)
    fitted_on = [index for index in range(len(train)) if index % HELD_OUT != HELD_OUT - 1]
    stored = open_dataset(options.data / f"{options.split}.tar")
    boxed = BoxImages(stored, read_boxes(options.data / "boxes.csv", split=options.split), pictures)
    kept = [
        place for place, index in enumerate(boxed.indices) if options.split == "val" or index % HELD_OUT == HELD_OUT - 1
    ]
    loader = DataLoader(Subset(boxed, kept), batch_size=32, collate_fn=BoxImages.collate)
    name = "validation images" if options.split == "val" else "training images that were not fitted on"
    return host, Data(name, Subset(train, fitted_on), loader)


def synthetic(options: argparse.Namespace) -> tuple[nn.Module, Data]:
    """One of the hosts of synthetic pictures, and these."""
    if options.host == "cnn":
        host = demo_host()
    else:
        from small_hosts import load

        host = load(options.host, options.hosts)
    # Half of the fitting pictures hold two objects: on single ones the host is so sure of its class that the attention
    # would hardly ever be asked for another.
    half = range(FIT_PICTURES // 2)
    drawn = [Synthetic(len(half), seed=SEEDS["fit"], pairs=pairs).batch(half).image for pairs in (False, True)]
    pictures = TensorDataset(torch.stack(drawn, dim=1).flatten(0, 1))  # in turns, so that a part is like the whole
    return host, Data("synthetic pictures", pictures, Synthetic(options.images, seed=SEEDS[options.split]))


def fit(
    host: nn.Module, data: Data, seed: int, reads: str, options: argparse.Namespace, layer: str | None = None
) -> ibx.IBAttention:
    """A bottleneck with default settings; read from --out where it is there."""
    name = f"{layer or 'ib'}-{reads}-seed{seed}-steps{options.steps or '-default'}"
    folder = options.out / "fitted" / name
    if options.kept:
        copy_fit(options.kept / "fitted" / name, folder)
    if not folder.exists():
        loader = DataLoader(data.fit, FIT_BATCH, shuffle=True, drop_last=True)
        ib = ibx.IBAttention(host, layer, reads=reads, seed=seed)
        ib.fit(loader, steps=options.steps, checkpoint=f"{folder}-run", resume=True).save(folder)
    if options.kept:
        copy_fit(folder, options.kept / "fitted" / name)
    return ibx.IBAttention.load(folder, host)


def run(name: str, host: nn.Module, data: Data, methods: dict[str, Any], options: argparse.Namespace) -> Leaderboard:
    """Measure some methods; goes on where it was stopped."""
    print(f"{name}: {', '.join(methods)}", file=sys.stderr, flush=True)
    if options.kept:
        bring_run(options.kept / name, options.out / name)
    board = ibx.benchmark(
        host,
        data.measured,
        methods=methods,
        metrics=q.METRICS,
        images=options.images,
        out=options.out / name,
        reference=None,
        data_name=data.name,
    )
    if options.kept:
        keep_run(options.out / name, options.kept / name)
    return board


def estimate(host: nn.Module, data: Data, options: argparse.Namespace) -> None:
    """Say how long the run will take, from one batch of random maps."""
    batch = Source(data.measured, images=options.images).first.take(range(min(8, options.images)))
    x = batch.x.to(pick_device())
    maps = torch.rand(len(x), 1, *x.shape[2:], generator=torch.Generator().manual_seed(0)).to(x)
    case = Case(host, x, maps, masks=None if batch.masks is None else batch.masks.to(x.device))
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter  # others' work on the machine aside
    with torch.no_grad():
        host(x)
        started = clock()
        for _ in range(4):
            host(x)
        rate = 4 * len(x) / (clock() - started)
    started = clock()
    for name in q.SEVEN:
        METRICS.get(name)(case)
    scoring = (clock() - started) / len(x)
    count = q.COUNTS[options.methods] + 2 * (len(options.seeds) - 1) * (options.methods != "baselines")
    text = f"{rate:.0f} forward passes a second; the seven measures of a map take {scoring:.3f} s, "
    text += f"those of {count} methods on {options.images} images {count * options.images * scoring / 3600:.1f} h"
    if options.methods == "all" and q.RISE not in options.without:
        text += f", and RISE's maps {options.images * q.RISE_MASKS / rate / 3600:.1f} h"
    print(text, file=sys.stderr, flush=True)


def about(
    host: nn.Module, data: Data, fitted: dict[str, ibx.IBAttention], options: argparse.Namespace
) -> dict[str, Any]:
    """What was run, for table.json."""
    device = next(host.parameters()).device
    records = {
        name: {key: value for key, value in (ib.record or {}).items() if key not in FIT_LEFT_OUT}
        for name, ib in fitted.items()
    }
    return {
        "host": options.host,
        "command": " ".join(["python benchmarks/quality.py", *(os.path.basename(word) for word in sys.argv[1:])]),
        "split": options.split,
        "data": data.name,
        "images": options.images,
        "seeds": options.seeds,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "precision": "the host in bfloat16" if options.bf16 else "float32",
        "versions": versions(),
        "fits": records,
    }


if __name__ == "__main__":
    main()
