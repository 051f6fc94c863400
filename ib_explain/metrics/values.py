"""Maps as rows of numbers: the checks and the two conventions (constant, heat) that scores against a truth share."""

from __future__ import annotations

import torch
from torch import Tensor

from ib_explain.checks import check_maps

__all__ = ["evened", "flat_heat", "flat_values", "is_constant", "undefined_where"]

_ROUNDING = 8 * torch.finfo(torch.float32).eps


def flat_values(maps: Tensor, *, name: str = "maps") -> Tensor:
    """Values as they are, signs included: (B, 1, H, W) or (B, H, W) -> (B, H*W) float64, for scores that only rank.

    Raises:
        TypeError, ValueError: as `check_maps`; `name` says which argument it was.
    """
    try:
        return check_maps(maps).double().flatten(1)
    except (TypeError, ValueError) as error:
        if name == "maps":
            raise
        raise type(error)(f"{name}: {error}") from None


def flat_heat(maps: Tensor) -> Tensor:
    """Positive part of the values: (B, 1, H, W) or (B, H, W) -> (B, H*W) float64, for scores that share out a mass."""
    return flat_values(maps).clamp_min(0)


def is_constant(values: Tensor) -> Tensor:
    """Which rows of (B, N) hold one value, up to float32 rounding: (B,) bool.

    The margin matters: a resized constant map is constant only up to the rounding of its interpolation weights, and
    without a margin a score would rank that rounding.
    """
    low, high = values.aminmax(dim=1)
    return high - low <= _ROUNDING * torch.maximum(low.abs(), high.abs())


def evened(values: Tensor) -> Tensor:
    """Values (B, ...) in which rows that `is_constant` finds hold one value indeed, so that nothing ranks rounding."""
    flat = values.flatten(1)
    return torch.where(is_constant(flat)[:, None], flat[:, :1], flat).view_as(values)


def undefined_where(condition: Tensor, scores: Tensor) -> Tensor:
    """Scores (B,) as float32, NaN where `condition` (B,) holds."""
    return scores.masked_fill(condition, torch.nan).float()
