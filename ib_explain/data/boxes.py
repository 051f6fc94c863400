"""Boxes around objects: reading them, and pictures with boxes moved to the host's input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ib_explain.data.csv_tables import lines
from ib_explain.data.images import ImageFiles, LabelledImages
from ib_explain.data.preprocessing import Preprocess

__all__ = ["BoxBatch", "BoxImages", "BoxSample", "read_boxes"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class BoxSample(NamedTuple):
    """One picture with its boxes.

    Attributes:
        image: (3, H, W), the host's input.
        label: class index, -1 where there is none.
        boxes: (n, 4) float32, xmin, ymin, xmax, ymax in pixels of the input, both ends inside; n is 0 if the crop lost
            all.
    """

    image: Tensor
    label: int
    boxes: Tensor


class BoxBatch(NamedTuple):
    """Several samples; `boxes_to_masks(batch.boxes, size)` turns the boxes into masks.

    Attributes:
        image: (B, 3, H, W)
        label: (B,) int64
        boxes: B tensors (n_i, 4).
    """

    image: Tensor
    label: Tensor
    boxes: list[Tensor]


def read_boxes(path: str | Path, split: str | None = None) -> dict[str, Tensor]:
    """Read a table of boxes.

    Args:
        path: CSV with the columns file, xmin, ymin, xmax, ymax and, where `split` is given, split; one box a line,
            several lines for several boxes. Corners are pixels of the stored picture with both ends inside.
        split: keep the lines of this split; None keeps all.

    Returns:
        File name to boxes (n, 4) float32, in the table's order.

    Raises:
        ValueError: no such file or column, no line of that split, a corner that is no number, or a box without area (it
            names the line).
    """
    path = Path(path)
    needed = ("file", *_CORNERS) if split is None else ("split", "file", *_CORNERS)
    found: dict[str, list[list[float]]] = {}
    splits: set[str] = set()
    for where, line in lines(path, needed, "boxes"):
        splits.add(line.get("split", ""))
        if split is not None and line["split"] != split:
            continue
        try:
            xmin, ymin, xmax, ymax = (float(line[corner]) for corner in _CORNERS)
        except ValueError:
            raise ValueError(f"{where}: corners must be numbers, got {[line[c] for c in _CORNERS]}") from None
        if not (0 <= xmin <= xmax < math.inf and 0 <= ymin <= ymax < math.inf):
            raise ValueError(f"{where}: need 0 <= min <= max, got ({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})")
        found.setdefault(line["file"], []).append([xmin, ymin, xmax, ymax])
    if not found:
        listed = f" of split {split!r}; splits there: {', '.join(sorted(splits))}" if split is not None else ""
        raise ValueError(f"{path} holds no boxes{listed}")
    return {file: torch.tensor(rows, device="cpu") for file, rows in found.items()}


class BoxImages(Dataset[BoxSample]):
    """The pictures of a data set that have boxes, with the boxes moved to the host's input.

    A box is scaled and shifted with its picture and cut at the input's border; one of which less than `keep` of the
    area is left is dropped, so an object outside of a centre crop does not count against a map. With
    `preprocess(model, crop_mode="squash", crop_pct=1.0)` nothing is lost.

    Args:
        images: what `open_dataset` gives; its own transform is not used.
        boxes: file name (as `images.name` gives it) to boxes (n, 4), from `read_boxes`.
        preprocess: the host's preprocessing.
        keep: least share of a box's area that must be in the input, in (0, 1].

    Attributes:
        indices: place of each picture in `images`.

    Raises:
        ValueError: no picture has a box, or (when a picture is read) a box reaches outside of its picture.
    """

    def __init__(
        self,
        images: LabelledImages | ImageFiles,
        boxes: Mapping[str, Tensor],
        preprocess: Preprocess,
        *,
        keep: float = 0.5,
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a share of a box's area in (0, 1], got {keep}")
        self.images, self.boxes, self.preprocess, self.keep = images, boxes, preprocess, keep
        self.indices = [index for index in range(len(images)) if images.name(index) in boxes]
        if not self.indices:
            raise ValueError(
                f"none of {len(images)} pictures has a box; pictures are called {images.name(0)!r}, "
                f"boxes {next(iter(boxes), 'nothing')!r}"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> BoxSample:
        place = self.indices[index]
        # Boxes are of the stored pixels, which a turn would move from under them.
        as_stored = {"upright": False} if isinstance(self.images, ImageFiles) else {}
        image, label = self.images.load(place, **as_stored)
        width, height = image.size
        boxes = self.boxes[self.images.name(place)]
        if (boxes[:, 2:] > boxes.new_tensor([width - 1, height - 1])).any():
            raise ValueError(
                f"a box of {self.images.name(place)} reaches outside of its {width}x{height} pixels, "
                f"got {boxes.tolist()}; both ends must be inside"
            )
        moved, share = self.preprocess.placement((height, width)).boxes(boxes)
        return BoxSample(self.preprocess(image), -1 if label is None else label, moved[share >= self.keep])

    def name(self, index: int) -> str:
        """The picture's file name."""
        return self.images.name(self.indices[index])

    @staticmethod
    def collate(samples: Sequence[BoxSample]) -> BoxBatch:
        """For `DataLoader(..., collate_fn=BoxImages.collate)`: pictures are stacked, boxes stay a list."""
        images, labels, boxes = zip(*samples, strict=True)
        return BoxBatch(torch.stack(images), torch.tensor(labels, device="cpu"), list(boxes))
