"""Data: pictures from anywhere, the host's own preprocessing, boxes, gaze, and pictures with known evidence.

Names load on first use: `import ib_explain.data` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ib_explain.data.boxes import BoxImages as BoxImages
    from ib_explain.data.boxes import read_boxes as read_boxes
    from ib_explain.data.gaze import GazeImages as GazeImages
    from ib_explain.data.gaze import read_fixations as read_fixations
    from ib_explain.data.images import ImageFiles as ImageFiles
    from ib_explain.data.images import LabelledImages as LabelledImages
    from ib_explain.data.images import UnreadableImage as UnreadableImage
    from ib_explain.data.images import images_of as images_of
    from ib_explain.data.images import list_images as list_images
    from ib_explain.data.images import open_dataset as open_dataset
    from ib_explain.data.images import read_image as read_image
    from ib_explain.data.preprocessing import Preprocess as Preprocess
    from ib_explain.data.preprocessing import preprocess as preprocess
    from ib_explain.data.synthetic import CLASS_NAMES as CLASS_NAMES
    from ib_explain.data.synthetic import Synthetic as Synthetic
    from ib_explain.data.synthetic import SyntheticSample as SyntheticSample
    from ib_explain.data.synthetic import demo_host as demo_host

_HOMES = {
    "BoxImages": "boxes",
    "CLASS_NAMES": "synthetic",
    "GazeImages": "gaze",
    "ImageFiles": "images",
    "LabelledImages": "images",
    "Preprocess": "preprocessing",
    "Synthetic": "synthetic",
    "SyntheticSample": "synthetic",
    "UnreadableImage": "images",
    "demo_host": "synthetic",
    "images_of": "images",
    "list_images": "images",
    "open_dataset": "images",
    "preprocess": "preprocessing",
    "read_boxes": "boxes",
    "read_fixations": "gaze",
    "read_image": "images",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"ib_explain.data.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ib_explain.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
