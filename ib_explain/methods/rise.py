"""RISE: Petsiuk, Das and Saenko, BMVC 2018, arXiv 1806.07421, section 3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ib_explain.checks import check_number, check_positive_int
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.masking import masked_scores
from ib_explain.randomness import generator_of, uniform

__all__ = ["RISE", "rise_masks"]


@register_method("rise")
@dataclass(frozen=True)
class RISE:
    """RISE: mean probability of the target over random masks that show the pixel (Petsiuk et al. 2018).

    Non-negative: the expected probability given that a pixel is seen. One forward pass for each mask; all images see
    the same masks, which depend on the seed alone. Takes no layer.

    Attributes:
        masks: number of masks; the paper's 4,000 (8,000 for its ResNet-50).
        cells: mask cells per side before upsampling.
        keep: probability that a cell is shown.
    """

    unit: ClassVar[str] = "probability"
    masks: int = 4000
    cells: int = 7
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_positive_int(self.masks, "masks")
        check_positive_int(self.cells, "cells")
        if not 0 < check_number(self.keep, "keep") < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {self.keep!r}")

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("rise")
        # Drawn on the CPU, all at once: the masks are the same on every device and in passes of any size.
        generator = generator_of(call.seed)
        cells = uniform(generator, self.masks, self.cells, self.cells) < self.keep
        shifts = uniform(generator, self.masks, 2)
        cells, shifts = cells.to(call.x.device), shifts.to(call.x.device)
        heat = call.x.new_zeros((len(call.x), *call.size), dtype=torch.float32)
        classes = call.classes()
        with torch.no_grad():
            for part, shift in zip(cells.split(call.copies_per_pass), shifts.split(call.copies_per_pass), strict=True):
                masks = rise_masks(part, shift, call.size)
                scores = masked_scores(call.model, call.x, masks[None], classes, probability=True)
                heat += torch.einsum("bm,mhw->bhw", scores, masks)
        return heat[:, None] / (self.masks * self.keep)


def rise_masks(cells: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample binary cells bilinearly to one cell more than the image, and cut the image out at a random shift.

    Args:
        cells: (M, s, s) bool.
        shifts: (M, 2) in [0, 1), shares of a cell.
        size: (H, W) of the image.

    Returns:
        (M, H, W) float32 in [0, 1].
    """
    weights = [_interpolation(int(cells.shape[1]), extent, shifts[:, axis]) for axis, extent in enumerate(size)]
    return weights[0] @ cells.float() @ weights[1].transpose(1, 2)


def _interpolation(side: int, extent: int, shifts: Tensor) -> Tensor:
    """Bilinear weights of `side` cells for each pixel along one axis, (M, extent, side)."""
    cell = math.ceil(extent / side)
    pixels = torch.arange(extent, device=shifts.device) + (shifts[:, None] * cell).floor()
    where = (pixels + 0.5) * side / ((side + 1) * cell) - 0.5  # in cells; 0 is the first one's centre
    # Beyond the outer cells' centres the grid is mirrored, as in the authors' code (scikit-image's "reflect").
    where = (side - 1 - (side - 1 - where.abs()).abs()).clamp_min(0)
    return (1 - (where[..., None] - torch.arange(side, device=shifts.device)).abs()).clamp_min(0)
