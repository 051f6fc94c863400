"""Pictures and preprocessing that tests of the readers share."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from ib_explain.data.preprocessing import Preprocess, preprocess


def host(config: dict | None = None) -> nn.Module:
    model = nn.Identity()
    if config is not None:
        model.pretrained_cfg = config
    return model


def plain(size: tuple[int, int], crop_mode: str = "center", crop_pct: float = 1.0) -> Preprocess:
    """Preprocessing without normalisation."""
    return preprocess(
        host(),
        size=size,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation="bilinear",
    )


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def two_splits(folder: Path) -> Path:
    """Two splits of two classes with three pictures each; "test" as a tar file."""
    for split in ("train", "val"):
        for label, name in enumerate(("n01", "n02")):
            for i in range(3):
                save(Image.new("RGB", (8, 6), (10 * i, 100 * label, 0)), folder / split / name / f"{i}.png")
    with tarfile.open(folder / "test.tar", "w") as tar:
        for path in sorted((folder / "val").rglob("*.png")):
            tar.add(path, arcname=str(path.relative_to(folder / "val")))
    return folder
