"""Small fits that several test modules make, here or in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from ib_explain.ib import IBAttention
from tests.models import CLASSES, images, tiny

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def batches(count=4, size=8):
    return [(images(size, seed=s), torch.randint(0, CLASSES, (size,))) for s in range(count)]


def fit(data, steps=6, **options):
    ib = IBAttention(tiny(), "stages.1", **{k: options.pop(k) for k in ("reads", "anchors", "seed") if k in options})
    return ib.fit(data, steps=steps, show_progress=False, **options)


def weights(ib):
    return ib.bottleneck.state_dict()


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def run_script(script, *arguments, launcher=()):
    command = [sys.executable, *launcher, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
