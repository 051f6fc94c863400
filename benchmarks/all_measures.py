"""The measures of the package, but for human gaze: a leaderboard of the quick methods on the reference host.

    python benchmarks/all_measures.py --weights FILE --data FOLDER --fitted FOLDER --out FOLDER [--images 100] [--bf16]

The host and its validation images with boxes are those of `quality.py --host reference`, the measures at their own
defaults; --fitted is the folder `fitted` of its --out. Most of the time goes into tile degradation (200 passes for each
map and tile size) and sensitivity-n (1,600 passes for each image, whatever the number of methods). In --out lie the
run, which goes on where it was stopped, and its page; results/quality/reference/ gets all_measures.md and
all_measures.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import quality
import torch

import ib_explain as ibx
from ib_explain.files import write_file
from ib_explain.hosts import pick_device
from ib_explain.io import versions
from ib_explain.metrics import METRICS
from ib_explain.samples import TRUTHS

BEST = "layer3"  # Grad-CAM's, by quality.py
OWN = ("degradation_10_steps", "road_3_shares", "lattice", "passes")  # of quality.py
ELSEWHERE = ("model_randomisation",)  # a fitted bottleneck belongs to its host; sanity.py fits another one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fitted", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="the host computes in bfloat16")
    options = parser.parse_args()
    options.split = "val"
    host, data = quality.reference(options)
    host = host.to(pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.bf16:
        quality.in_bf16(host)
    device = next(host.parameters()).device
    board = ibx.benchmark(
        host,
        data.measured,
        methods=methods(host, options.fitted),
        metrics=measures(),
        images=options.images,
        out=options.out,
        reference=f"grad_cam {BEST}",
        data_name=data.name,
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = [
        "# All measures on the reference host",
        f"`python benchmarks/all_measures.py {' '.join(os.path.basename(word) for word in sys.argv[1:])}`",
        f"{options.images} {data.name}; {where}; the host in {'bfloat16' if options.bf16 else 'float32'}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    folder = quality.RESULTS / "reference"
    write_file(folder / "all_measures.md", "\n\n".join([*head, board.to_markdown()]))
    write_file(folder / "all_measures.csv", board.to_csv())
    print(board)


def methods(host: torch.nn.Module, fitted: Path) -> dict[str, Any]:
    """Ten methods of up to two passes and three controls; the CAM family where Grad-CAM is best."""
    ours = {
        name: ibx.IBAttention.load(fitted / f"ib-{reads}-seed0-steps-default", host)
        for name, reads in (("ib", "gradient"), ("ib_features", "features"))
    }
    cams = ("grad_cam", "grad_cam_pp", "layer_cam", "hires_cam", "eigen_cam")
    others = ("br_npa", "saliency", "input_x_gradient", "edges", "center_gaussian", "random")
    return {**ours, **{f"{name} {BEST}": (name, {"layer": BEST}) for name in cams}, **{name: name for name in others}}


def measures() -> list[str]:
    """The package's own names, without those that need gaze."""
    gaze = set(TRUTHS) - {"masks"} | {"other", "baseline"}
    return [name for name in METRICS if name not in OWN + ELSEWHERE and not gaze & set(METRICS.get(name).needs)]


if __name__ == "__main__":
    main()
