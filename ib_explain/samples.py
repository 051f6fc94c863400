"""What a benchmark knows of some images, and how it is found in what a loader yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ib_explain.metrics.ground_truth import boxes_to_masks, fixation_pixels

__all__ = ["TRUTHS", "ImageBatch", "join", "parts_of", "truths_of"]

TRUTHS = ("masks", "density", "fixations")


@dataclass(frozen=True)
class ImageBatch:
    """Some images with what is known about them, on the CPU or wherever the data put them."""

    number: int
    """Of the batch in the whole data, the same however many processes share the work."""
    images: Sequence[int]
    """Index of each image in the data."""
    names: Sequence[str]
    x: Tensor
    """(B, C, H, W), normalised."""
    labels: Tensor | None = None
    """(B,) int64"""
    masks: Tensor | None = None
    """(B, 1, H, W) bool"""
    density: Tensor | None = None
    """(B, 1, H, W)"""
    fixations: Sequence[Tensor] | None = None
    """B tensors (n_i, 2) of (x, y)."""

    @property
    def truths(self) -> tuple[str, ...]:
        """Which of masks, density and fixations the data gives."""
        return tuple(name for name in TRUTHS if getattr(self, name) is not None)

    def take(self, rows: Sequence[int]) -> ImageBatch:
        """These rows alone, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long, device="cpu")
        picked: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in ("images", "names")}
        for name in ("x", "labels", "masks", "density"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[index.to(value.device)]
        fixations = None if self.fixations is None else [self.fixations[row] for row in rows]
        return replace(self, **picked, fixations=fixations)


_FIELDS = ("image", "label", "mask", "boxes", "density", "fixations", "name")


def parts_of(raw: Any, number: int) -> dict[str, Any]:
    """The parts of batch `number` by name, whatever it is; what is None is left out.

    Raises:
        TypeError: it holds no images.
    """
    if isinstance(raw, Tensor):
        return {"image": raw}
    if isinstance(raw, tuple | list) and not hasattr(raw, "_fields"):
        if not raw:
            raise TypeError(f"batch {number} of the data must be images or (images, labels), got an empty one")
        return {"image": raw[0]} | ({"label": raw[1]} if len(raw) > 1 and raw[1] is not None else {})
    read = raw.get if isinstance(raw, Mapping) else lambda name: getattr(raw, name, None)
    found = {name: value for name in _FIELDS for value in [_first_of(read, name)] if value is not None}
    if "image" not in found:
        came = f"keys {', '.join(map(repr, raw))}" if isinstance(raw, Mapping) else type(raw).__name__
        expected = "images, (images, labels), or have a field 'image'"
        raise TypeError(f"batch {number} of the data must be {expected}, got {came}")
    return found


def _first_of(read: Any, name: str) -> Any:
    value = read(name)
    return value if value is not None or name in ("boxes", "fixations") else read(f"{name}s")


def truths_of(parts: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """Masks, density and fixations of a batch, checked against its images."""
    size, truths = (int(x.shape[2]), int(x.shape[3])), {}
    masks = parts.get("mask")
    if masks is None and "boxes" in parts:
        if len(parts["boxes"]) != len(x):
            raise ValueError(f"boxes must hold one tensor for each of the {len(x)} images, got {len(parts['boxes'])}")
        masks = boxes_to_masks(parts["boxes"], size)
    for name, value, kind in (("masks", masks, "bool"), ("density", parts.get("density"), "floating-point")):
        if value is None:
            continue
        value = value[:, None] if isinstance(value, Tensor) and value.ndim == 3 else value
        fits = isinstance(value, Tensor) and tuple(value.shape) == (len(x), 1, *size)
        if not fits or (value.dtype != torch.bool if kind == "bool" else not value.is_floating_point()):
            came = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a {kind} tensor {(len(x), 1, *size)}, got {came}")
        if kind != "bool" and not (torch.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"{name} must be finite and >= 0")
        truths[name] = value
    if "fixations" in parts:
        fixations = list(parts["fixations"])
        if len(fixations) != len(x):
            raise ValueError(f"fixations must hold one tensor for each of the {len(x)} images, got {len(fixations)}")
        fixation_pixels(fixations, size)  # refuses what lies outside
        truths["fixations"] = fixations
    return truths


def join(parts: Sequence[ImageBatch]) -> ImageBatch:
    """One batch, numbered 0, of the pixels, labels and names of several; ground truth is left out."""

    def all_of(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return ImageBatch(
        0,
        [image for part in parts for image in part.images],
        [name for part in parts for name in part.names],
        **{name: all_of(name) for name in ("x", "labels")},
    )
