"""How alike are two maps of one image: rank correlation and structural similarity, each (B,) float32.

Neither depends on the maps' scale, so a map in bits and its double are equal. Signs are kept: take `maps.abs()` where
only strength should count. NaN where one of the two is constant (up to float32 rounding) or holds NaN or infinity,
which the maps of a randomised host may do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ib_explain.checks import check_maps
from ib_explain.metrics.values import is_constant, undefined_where

__all__ = ["rank_correlation", "ssim"]

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation in pixels of SSIM's window."""


def rank_correlation(maps: Tensor, other: Tensor) -> Tensor:
    """Spearman's rank correlation over pixels, in [-1, 1]; equal values share the mean of their ranks.

    Args:
        maps, other: (B, 1, H, W) or (B, H, W).

    Returns:
        (B,) float32, NaN where undefined.
    """
    first, second = _pair(maps, other)
    undefined = _undefined(first) | _undefined(second)
    first, second = _ranks(first.flatten(1)), _ranks(second.flatten(1))
    first, second = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (first, second))
    score = (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1))
    return undefined_where(undefined, score.clamp(-1, 1))


def ssim(maps: Tensor, other: Tensor) -> Tensor:
    """Mean structural similarity of the maps, each stretched to [0, 1]: 1 for equal ones, at least -1.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window of 11 x 11 pixels with sigma 1.5, weighted
    population variances, K1 = 0.01, K2 = 0.03, mean over all windows that lie inside of the image. That is
    scikit-image's `structural_similarity` with `gaussian_weights=True, use_sample_covariance=False, data_range=1`. Maps
    have no range of their own, hence the stretching.

    Args:
        maps, other: (B, 1, H, W) or (B, H, W), at least 11 pixels a side.

    Returns:
        (B,) float32, NaN where undefined.
    """
    first, second = _pair(maps, other)
    if min(first.shape[1:]) < WINDOW:
        raise ValueError(f"maps must have at least {WINDOW} pixels a side for SSIM, got {tuple(first.shape[1:])}")
    undefined = _undefined(first) | _undefined(second)
    first, second = _stretched(first), _stretched(second)
    moments = torch.stack([first, second, first * first, second * second, first * second], dim=1)  # (B, 5, H, W)
    mean_a, mean_b, square_a, square_b, product = _windowed(moments).unbind(dim=1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    spread = square_a - mean_a**2 + square_b - mean_b**2
    structure = (2 * (product - mean_a * mean_b) + c2) / (spread + c2)
    return undefined_where(undefined, (luminance * structure).mean(dim=(1, 2)))


def _pair(maps: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    first = check_maps(maps, finite=False)
    try:
        second = check_maps(other, size=(first.shape[1], first.shape[2]), batch=len(first), finite=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the other {error}") from None
    return first.double(), second.double().to(first.device)


def _undefined(maps: Tensor) -> Tensor:
    values = maps.flatten(1)
    return is_constant(values) | ~values.isfinite().all(dim=1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 within each row of (B, N), float64; ties get their mean rank."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    lower = torch.searchsorted(ordered, values)
    not_higher = torch.searchsorted(ordered, values, right=True)
    return (lower + not_higher + 1).double() / 2


def _stretched(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


def _windowed(images: Tensor) -> Tensor:
    """Gaussian-weighted mean of each window inside of the image: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    places = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    taps = torch.exp(-0.5 * (places / SIGMA) ** 2)
    taps = taps / taps.sum()
    rows = F.conv2d(images.flatten(0, 1)[:, None], taps.view(1, 1, -1, 1))
    return F.conv2d(rows, taps.view(1, 1, 1, -1))[:, 0].unflatten(0, images.shape[:2])
