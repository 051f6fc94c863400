"""How much of a full leaderboard's time goes into the model's own passes?

    python benchmarks/leaderboard_speed.py [--images 16] [--size 128] [--device cpu]

Twelve methods by eight metrics on a ResNet-18 with random weights and synthetic pictures: what is measured does not
depend on what the model predicts. Time inside of the model's forward and of autograd's backward passes is taken from
the outside, everything else is ours or Captum's: maps, masks, imputation, ranking, rows, intervals. Tables, figures and
the HTML page are made once, however many images there are, and are told apart. One thread on a CPU. Writes
results/leaderboard_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

import ib_explain as ibx
from ib_explain.data import Synthetic
from ib_explain.io import versions

RESULT = Path(__file__).parent / "results" / "leaderboard_speed.json"
METHODS = ("grad_cam", "grad_cam_pp", "hires_cam", "layer_cam", "eigen_cam", "br_npa", "iba", "saliency")
METHODS += ("integrated_gradients", "occlusion", "center_gaussian")  # and a fitted bottleneck
METRICS = ("insertion", "deletion", "degradation_8", "road", "average_drop")
METRICS += ("energy_inside", "pointing_game", "effective_heat_ratio")
FITTING = 64  # pictures of the bottleneck's two steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    host = timm.create_model("resnet18", num_classes=8).eval().to(options.device)
    pictures = Synthetic(options.images, size=options.size)
    examples = Synthetic(FITTING, size=options.size, seed=1).batch(range(FITTING)).image
    ib = ibx.IBAttention(host).fit(examples.split(32), steps=2, show_progress=False)
    methods = [ib, *METHODS]

    with model_clock(host, options.device) as inside:
        started = clock(options.device)
        board = ibx.benchmark(host, pictures, methods=methods, metrics=METRICS, show_progress=sys.stderr.isatty())
        rows = {"seconds": clock(options.device) - started, "in model passes": inside["seconds"]}
        started = clock(options.device)
        with tempfile.TemporaryDirectory() as folder:
            board.save(folder)
        report = clock(options.device) - started
    missing = sorted({row.method for row in board.rows if row.status != "ok"})
    found: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu",
        "threads": 1,
        "versions": versions(),
        "model": f"resnet18, random weights, {options.size} px",
        "images": options.images,
        "methods": list(board.run["settings"]["methods"]),
        "metrics": list(METRICS),
        "methods with cells that failed": missing,
        "share of the time in model passes": round(rows["in model passes"] / rows["seconds"], 4),
        "seconds": {name: round(value, 2) for name, value in rows.items()},
        "seconds for tables, figures and page": round(report, 2),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


@contextmanager
def model_clock(host: nn.Module, device: str) -> Iterator[dict[str, float]]:
    """Add up the time inside of the host's forward and of autograd's backward passes, each call from the outside."""
    spent = {"seconds": 0.0}
    running = False

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:
                return run(*args, **kwargs)
            running, started = True, clock(device)
            try:
                return run(*args, **kwargs)
            finally:
                running = False
                spent["seconds"] += clock(device) - started

        return wrapped

    grad, backward = timed(torch.autograd.grad), timed(torch.autograd.backward)
    with (
        mock.patch.object(host, "forward", timed(host.forward)),
        mock.patch.object(torch.autograd, "grad", grad),
        mock.patch.object(torch.autograd, "backward", backward),
    ):
        yield spent


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, which other programs disturb least; of the wall on a GPU, all work done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
