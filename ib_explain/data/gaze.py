"""Pictures with human gaze: fixated points and a fixation map, moved to the host's input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ib_explain.data.csv_tables import lines
from ib_explain.data.images import list_images, read_image
from ib_explain.data.preprocessing import Preprocess

__all__ = ["GazeBatch", "GazeImages", "GazeSample", "read_fixations"]


class GazeSample(NamedTuple):
    """One picture with the gaze of its observers.

    Attributes:
        image: (3, H, W), the host's input.
        fixations: (n, 2) float32, (x, y) in pixels of the input, 0 at the centre of the first; those that the crop
            kept.
        density: (1, H, W) float32, the given fixation map; its sum is 1, or 0 where the crop left nothing.
        dropped: number of fixations that the crop lost.
    """

    image: Tensor
    fixations: Tensor
    density: Tensor
    dropped: int


class GazeBatch(NamedTuple):
    """Several samples.

    Attributes:
        image: (B, 3, H, W)
        fixations: B tensors (n_i, 2).
        density: (B, 1, H, W)
        dropped: (B,) int64
    """

    image: Tensor
    fixations: list[Tensor]
    density: Tensor
    dropped: Tensor


def read_fixations(path: str | Path) -> dict[str, Tensor]:
    """Read a table image,x,y of fixations: name of the image to points (n, 2) float32 in pixels of that image.

    Raises:
        ValueError: no such file or column, or a coordinate that is no number (it names the line).
    """
    found: dict[str, list[list[float]]] = {}
    for where, line in lines(Path(path), ("image", "x", "y"), "fixations"):
        try:
            point = [float(line["x"]), float(line["y"])]
        except ValueError:
            point = [math.nan]
        if not all(map(math.isfinite, point)):
            raise ValueError(f"{where}: x and y must be numbers, got ({line['x']}, {line['y']})")
        found.setdefault(line["image"], []).append(point)
    return {image: torch.tensor(points, device="cpu") for image, points in found.items()}


class GazeImages(Dataset[GazeSample]):
    """A folder of gaze data: `images/NAME.*`, `maps/NAME.png` and `fixations.csv` (image,x,y with image = NAME).

    Fixations move with the pixels, x' = (x + 0.5) * w'/w - 0.5, less the crop's offset; the map is resized bilinearly.
    People saw the whole picture: with the host's centre crop the fixations outside of it are dropped and counted,
    `preprocess(model, crop_mode="squash", crop_pct=1.0)` keeps all of them and bends the picture. Report which was
    used, and `dropped_share`.

    Args:
        root: the folder.
        preprocess: the host's preprocessing.

    Attributes:
        names: NAME of each picture, sorted; those without fixations too.
        fixations: points (n, 2) of each picture, in its own pixels.

    Raises:
        ValueError: a part of the folder is missing, a picture lacks its map or has one of another size, fixations of an
            unknown picture, or a fixation outside of its picture.
    """

    def __init__(self, root: str | Path, preprocess: Preprocess) -> None:
        root = Path(root)
        table = read_fixations(root / "fixations.csv")
        self.preprocess = preprocess
        self._files = list_images(root / "images")
        self._maps = [root / "maps" / f"{file.stem}.png" for file in self._files]
        self.names = [file.stem for file in self._files]
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(
                f"{root / 'images'} holds several pictures called {twice!r}; their gaze cannot be told apart"
            )
        self.fixations = [table.get(name, torch.zeros(0, 2, device="cpu")) for name in self.names]
        unknown = sorted(set(table) - set(self.names))
        if unknown:
            raise ValueError(f"fixations.csv has {len(unknown)} names without a picture, the first is {unknown[0]!r}")
        self._sizes = [_size(file) for file in self._files]
        for name, (height, width), points in zip(self.names, self._sizes, self.fixations, strict=True):
            inside = (points >= -0.5) & (points < points.new_tensor([width - 0.5, height - 0.5]))
            if not inside.all():
                x, y = points[~inside.all(dim=1)][0].tolist()
                raise ValueError(f"fixation ({x:g}, {y:g}) of {name} lies outside of its {width}x{height} pixels")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> GazeSample:
        image = read_image(self._files[index])
        placement = self.preprocess.placement((image.height, image.width))
        points, inside = placement.points(self.fixations[index])
        density = placement.density(_read_map(self._maps[index], self._sizes[index]))
        total = density.sum()
        density = density / total if total > 0 else density
        return GazeSample(self.preprocess(image), points[inside], density, int((~inside).sum()))

    def name(self, index: int) -> str:
        """The picture's name."""
        return self.names[index]

    @property
    def dropped_share(self) -> float:
        """Share of all fixations that the preprocessing crops away; 0 where there are none."""
        kept = [
            self.preprocess.placement(size).points(points)[1]
            for size, points in zip(self._sizes, self.fixations, strict=True)
        ]
        inside = torch.cat(kept).double()
        return 1 - inside.mean().item() if len(inside) else 0.0

    @staticmethod
    def collate(samples: Sequence[GazeSample]) -> GazeBatch:
        """For `DataLoader(..., collate_fn=GazeImages.collate)`: all stacked but the lists of fixations."""
        images, fixations, densities, dropped = zip(*samples, strict=True)
        outside = torch.tensor(dropped, device="cpu")
        return GazeBatch(torch.stack(images), list(fixations), torch.stack(densities), outside)


def _size(file: Path) -> tuple[int, int]:
    """(h, w) of a picture as `read_image` gives it, from the file's head alone unless EXIF turns it."""
    with Image.open(file) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _read_map(file: Path, size: tuple[int, int]) -> Tensor:
    if not file.is_file():
        raise ValueError(f"no fixation map {file}")
    values = np.asarray(read_image(file).convert("L"), dtype=np.float32)
    if values.shape != size:
        raise ValueError(f"{file} must have its picture's size {size}, got {values.shape}")
    return torch.from_numpy(values / 255)[None]
