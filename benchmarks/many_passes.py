"""Methods of many passes on the reference host: RISE, ScoreCAM, occlusion and feature ablation beside `ib`.

    python benchmarks/many_passes.py --weights FILE --data FOLDER --out FOLDER [--images 96] [--methods ib,rise,...]

The host, its fitting and validation images, the seven measures and the methods are those of `quality.py --host
reference`; its 500 images would take RISE's 4,000 masks hours, so here are fewer. Explained is the predicted class, and
all methods are held against `ib` refined by ten steps: the question is what hundreds of passes buy.

In --out lie the fitted bottleneck and a run for each method, all of which go on where they were stopped; `--methods`
runs some of them, by parts of their names, and makes no table, so that several processes can share the work. Without it
results/quality/reference/ gets many_passes.md and many_passes.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import quality
import quality_methods as q
import quality_table as tables
import torch
from torch import nn

from ib_explain.hosts import pick_device
from ib_explain.io import versions
from ib_explain.leaderboard import Leaderboard

BEST = "layer3"  # Grad-CAM's, by quality.py
DEAR = ("feature_ablation", f"score_cam {BEST}", "occlusion", q.RISE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[], help="some, without a table")
    options = parser.parse_args()
    options.split, options.steps, options.kept = "val", None, None
    host, data = quality.reference(options)
    host = host.to(pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    boards = []
    for name, made in methods(host, data, options).items():
        if options.methods and not any(part in name for part in options.methods):
            continue
        run = name.replace(" ", "-")
        if not (options.out / run / "summary.json").exists():  # which is written when all images are measured
            quality.run(run, host, data, {name: made() if callable(made) else made}, options)
        boards.append(Leaderboard.read(options.out / run))
    if not options.methods:
        write(tables.join(boards, refined(), options.out / "report"), host, data, options)


def refined() -> str:
    """What all others are held against."""
    return f"ib refine={q.REFINE}"


def methods(host: nn.Module, data: quality.Data, options: argparse.Namespace) -> dict[str, Any]:
    """By name; what needs the fitted bottleneck is made on demand."""

    def ib() -> Any:
        return quality.fit(host, data, 0, "gradient", options)

    size = quality.SIZE
    extras = q.extras(BEST, data.examples(quality.EXAMPLES).to(pick_device()), size)
    return {
        refined(): lambda: (ib(), {"refine": q.REFINE}),
        "ib": ib,
        f"grad_cam {BEST}": ("grad_cam", {"layer": BEST}),
        "iba": extras["iba"],
        **{name: extras[name] for name in DEAR},
    }


def write(board: Any, host: nn.Module, data: quality.Data, options: argparse.Namespace) -> None:
    """many_passes.md and many_passes.json."""
    command = f"python benchmarks/many_passes.py {' '.join(os.path.basename(word) for word in sys.argv[1:])}"
    device = next(host.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = [
        "# Methods of many passes on the host `reference`",
        f"`{command}`",
        f"Means over {options.images} {data.name}, evenly over those with boxes (float32; {where}) ± half of the "
        f"95 % bootstrap interval. ▲ better, ▼ worse than `{refined()}` by a paired 95 % interval that leaves 0 out.",
    ]
    about = {"host": "reference", "command": command, "data": data.name, "images": options.images, "seed": 0}
    about |= {"device": where, "precision": "float32", "versions": versions()}
    tables.write_short(board, refined(), head, about, quality.RESULTS / "reference" / "many_passes")
    print((quality.RESULTS / "reference" / "many_passes.md").read_text())


if __name__ == "__main__":
    main()
