"""A made-up run that tests of tables, page and leaderboard share."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from ib_explain.results import RunStore
from ib_explain.rows import CurveBatch, Row

HOSTILE = '<script>alert("x")</script>&.jpg'
METRICS = {
    "insertion": {"family": "perturbation", "unit": "probability", "higher_is_better": True, "protocol": "RISE <b>"},
    "deletion": {"family": "perturbation", "unit": "probability", "higher_is_better": False, "protocol": "RISE"},
    "energy": {"family": "localisation", "unit": "share", "higher_is_better": True, "protocol": "in the box"},
    "passes": {"family": "cost", "unit": "forward passes", "higher_is_better": False, "protocol": "counted"},
}
LEVELS = {"ib": (0.7, 0.1, 0.6, 1.1), "grad_cam": (0.5, 0.2, 0.5, 1.04), "$rise_$|": (0.6, 0.15, 0.4, 4000.0)}
METHODS = {**dict.fromkeys(LEVELS, {}), "rollout": {"heads": "mean <i>"}}
SETTINGS = {
    "model": {"name": "resnet<18>"},
    "data": {"name": "val"},
    "seed": 3,
    "methods": METHODS,
    "metrics": METRICS,
}
INFO = {"command": "ib-explain benchmark --out 'a&b'", "device": "cpu", "reference": "grad_cam"}
IMAGES = 12


def make_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(IMAGES):
        name = HOSTILE if i == 0 else f"val/{i}.jpg"
        for method in METHODS:
            for k, metric in enumerate(METRICS):
                if method == "rollout":
                    row = Row(i, name, method, metric, status="not_applicable", reason="no <attention> here")
                elif method == "ib" and metric == "deletion" and i < 4:
                    row = Row(i, name, method, metric, status="failed", reason="OutOfMemoryError: 2 GiB")
                elif metric == "energy" and i == 5:
                    row = Row(i, name, method, metric)
                else:
                    noise = 0 if metric == "passes" else rng.normal(0, 0.05) + 0.2 * (metric == "insertion" and i == 0)
                    row = Row(i, name, method, metric, LEVELS[method][k] + noise)
                rows.append(row)
    return rows


def make_curves() -> list[CurveBatch]:
    scores = np.random.default_rng(1).random((IMAGES, 6))
    return [CurveBatch(m, "insertion", np.arange(IMAGES), np.linspace(0, 1, 6), scores) for m in LEVELS]


def make_store(folder=None) -> RunStore:
    store = RunStore.open(folder, SETTINGS, INFO)
    rows, curves = make_rows(), make_curves()
    for batch in range(3):
        low, high = 4 * batch, 4 * batch + 4
        part = [dataclasses.replace(c, images=c.images[low:high], scores=c.scores[low:high]) for c in curves]
        store.append(batch, [row for row in rows if low <= row.image < high], part)
    return store


def png(width: int = 30, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()
