"""Hints: what a trained teacher's stages hold should be told from a student's features by linear maps.

Adriana Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.hooks import capture


class Hints(nn.Module):
    """Runs a student and its teacher on the same images and measures how well the one tells the other's features.

    Args:
        student: a host for images (B, 3, 64, 64) whose modules return grids (B, h, w, C) or tokens (B, P + h * w, C).
        teacher: a trained host whose modules return (B, C, h, w).
        pairs: the student's modules, and the teacher's module that each should tell of.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: dict[str, str]) -> None:
        super().__init__()
        teacher.requires_grad_(False).to(memory_format=torch.channels_last)
        self._models = student, teacher  # in a tuple: neither is a part of this module
        self.pairs = pairs
        self.readers = nn.ModuleList()
        self.moments: list[tuple[Tensor, Tensor]] = []  # of the teacher's channels in the first batch
        with torch.no_grad():
            _, _, features = self._observe(student, torch.zeros(1, 3, 64, 64))
        for grid, told in features:
            self.readers.append(nn.Sequential(nn.LayerNorm(grid.shape[-1]), nn.Linear(grid.shape[-1], told.shape[-1])))

    def forward(self, run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of `run`, which calls the student once; the error; and the teacher's logits.

        The error is a sum over pairs of the mean square, in variances of the teacher's channels; scalar.
        """
        logits, taught, features = self._observe(run, images)
        if not self.moments:
            self.moments = [(told.mean((0, 1, 2)), told.std((0, 1, 2)) + 1e-3) for _, told in features]
        errors = [
            F.mse_loss(reader(grid.float()).float(), (told - mean) / std)
            for (grid, told), reader, (mean, std) in zip(features, self.readers, self.moments, strict=True)
        ]
        return logits, torch.stack(errors).sum(), taught

    def _observe(self, run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor, Any]:
        student, teacher = self._models
        with torch.no_grad(), capture(teacher, self.pairs.values()) as told:
            taught = teacher(images.contiguous(memory_format=torch.channels_last))
        with capture(student, self.pairs) as seen:
            logits = run(images)
        grids = [grid_of(student, seen[name]) for name in self.pairs]
        stages = [told[name].float() for name in self.pairs.values()]
        return logits, taught, [(g, on_grid(t, g.shape[1])) for g, t in zip(grids, stages, strict=True)]


def grid_of(host: nn.Module, features: Tensor) -> Tensor:
    """Features (B, h, w, C) of a module's output, either that or tokens (B, prefix + h * w, C)."""
    if features.ndim == 4:
        return features
    tokens = features[:, getattr(host, "num_prefix_tokens", 0) :]
    side = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (side, side))


def on_grid(stage: Tensor, side: int) -> Tensor:
    """Bring (B, C, h, h) to `side` positions a side, channels last; positions within one become its channels."""
    while stage.shape[-1] > side:
        stage = F.pixel_unshuffle(stage, 2)
    return F.interpolate(stage, size=(side, side), mode="bilinear").permute(0, 2, 3, 1)
