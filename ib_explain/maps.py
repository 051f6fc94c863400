"""Operations on maps: resizing, ranking. Maps are (B, H, W) or (B, 1, H, W) float tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["in_bits", "pixel_order", "resize", "spread", "spread_signed", "without_lattice", "without_lattice_signed"]


def in_bits(unit: str) -> bool:
    """Whether maps of this unit are amounts of information, so that the sum over pixels means something."""
    return unit in ("bits", "label bits")


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, 1, h, w) to (B, 1, *size), corners not aligned: values keep their scale."""
    return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)


def spread(amounts: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize non-negative amounts (B, 1, h, w) to (B, 1, *size) so that each image's sum stays.

    A density per grid position becomes a density per pixel: a map in bits sums to the same bits at any size. What is
    interpolated are the roots. Amounts would leave their neighbours too much: of a position alone in the dark 56 % stay
    on its own pixels, with roots 77 %.
    """
    fine = resize(amounts.float().clamp_min(0).sqrt(), size).square()
    total, spread_total = amounts.float().sum(dim=(1, 2, 3)), fine.sum(dim=(1, 2, 3))
    # 0/0 is an empty map.
    factor = torch.where(spread_total > 0, total / spread_total.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return fine * factor[:, None, None, None]


def spread_signed(amounts: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of amounts of either sign: what it loses of the sum comes back in even parts."""
    fine = resize(amounts, size) * (math.prod(amounts.shape[2:]) / math.prod(size))
    return fine + (amounts.float().sum(dim=(2, 3), keepdim=True) - fine.sum(dim=(2, 3), keepdim=True)) / math.prod(size)


def without_lattice(amounts: Tensor) -> Tensor:
    """Take the pattern of every second position out of non-negative amounts (B, 1, h, w); each image's sum stays.

    A stride-2 layer reads some positions more than their neighbours (a 1x1 shortcut reads every second one only), so
    what a host uses in front of it forms dots that tell of the host and not of the image. The filter (-1, 4, 10, 4, -1)
    / 16 is zero at the grid's Nyquist frequency and maximally flat at zero: straight edges and smooth parts stay.
    """
    amounts = amounts.float()
    smooth = _filtered(amounts).clamp_min(0)
    total, left = amounts.sum(dim=(2, 3), keepdim=True), smooth.sum(dim=(2, 3), keepdim=True)
    return torch.where(left > 0, smooth * (total / left.clamp_min(torch.finfo(torch.float32).tiny)), amounts)


def without_lattice_signed(amounts: Tensor) -> Tensor:
    """`without_lattice` for amounts of either sign."""
    smooth = _filtered(amounts.float())
    return smooth + (amounts.float() - smooth).mean(dim=(2, 3), keepdim=True)


def _filtered(amounts: Tensor) -> Tensor:
    padded = F.pad(amounts, (2, 2, 2, 2), mode="replicate")
    for axis in (2, 3):  # sums, no convolution: GPUs and autocast would compute that in less than float32
        extent = amounts.shape[axis]
        first, second, here, fourth, fifth = (padded.narrow(axis, start, extent) for start in range(5))
        padded = (10 * here + 4 * (second + fourth) - (first + fifth)) / 16
    return padded


def pixel_order(maps: Tensor) -> Tensor:
    """Pixels by falling value, ties by pixel index: (B, H, W) -> (B, H*W) int64, the same on every device."""
    return torch.argsort(maps.flatten(1), dim=1, descending=True, stable=True)
