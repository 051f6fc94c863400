"""Methods of many passes on fewer images: RISE, ScoreCAM, occlusion and feature ablation beside `ib`.

    python benchmarks/many_passes.py --host reference --weights FILE --data FOLDER --out FOLDER [--images 96] [...]
    python benchmarks/many_passes.py --host vit --hosts FOLDER --out FOLDER [--images 96] [--methods ib,rise,...]

The hosts, their fitting and validation images, the seven measures and the methods are those of `quality.py`, by whose
table Grad-CAM's layer is chosen; its 500 images would take RISE's 4,000 masks hours, so here are fewer. Explained is
the predicted class, and all methods are held against `ib` refined by ten steps: the question is what hundreds of passes
buy. Of a host whose table has the others RISE alone is run.

In --out lie the fitted bottleneck and a run for each method, all of which go on where they were stopped; `--methods`
runs some of them, by parts of their names, and makes no table, so that several processes can share the work. Without it
results/quality/HOST/ gets many_passes.md and many_passes.json.
"""

from __future__ import annotations

import argparse
import json
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

DEAR = ("feature_ablation", "score_cam", "occlusion", "rise")
HOSTS = tuple(name for name in quality.HOSTS if name != "cnn")  # whose table has them all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, choices=HOSTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[], help="some, without a table")
    quality.add_host_arguments(parser)
    options = parser.parse_args()
    quality.check_host_arguments(parser, options)
    options.split, options.steps, options.kept = "val", None, None
    host, data = quality.open_host(options)
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

    told = json.loads((quality.RESULTS / options.host / "table.json").read_text())
    layer = told["best_grad_cam"].removeprefix("grad_cam ")
    examples = data.examples(quality.EXAMPLES).to(pick_device())
    extras = q.extras(layer, examples, int(examples.shape[-1]))
    dear = [name for name in extras if name.split()[0] in DEAR and name not in told["scores"]]
    return {
        refined(): lambda: (ib(), {"refine": q.REFINE}),
        "ib": ib,
        f"grad_cam {layer}": ("grad_cam", {"layer": layer}),
        "iba": extras["iba"],
        **{name: extras[name] for name in dear},
    }


def write(board: Any, host: nn.Module, data: quality.Data, options: argparse.Namespace) -> None:
    """many_passes.md and many_passes.json."""
    command = f"python benchmarks/many_passes.py {' '.join(os.path.basename(word) for word in sys.argv[1:])}"
    device = next(host.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = [
        f"# Methods of many passes on the host `{options.host}`",
        f"`{command}`",
        f"Means over {options.images} {data.name} (float32; {where}) ± half of the 95 % bootstrap interval. ▲ better, "
        f"▼ worse than `{refined()}` by a paired 95 % interval that leaves 0 out.",
    ]
    about = {"host": options.host, "command": command, "data": data.name, "images": options.images, "seed": 0}
    about |= {"device": where, "precision": "float32", "versions": versions()}
    tables.write_short(board, refined(), head, about, quality.RESULTS / options.host / "many_passes")
    print((quality.RESULTS / options.host / "many_passes.md").read_text())


if __name__ == "__main__":
    main()
