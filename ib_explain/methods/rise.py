"""RISE: Petsiuk, Das and Saenko, BMVC 2018, arXiv 1806.07421, section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ib_explain.checks import check_number, check_positive_int
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.masking import masked_scores
from ib_explain.perturb import rise_masks
from ib_explain.randomness import generator_of, uniform

__all__ = ["RISE"]


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
