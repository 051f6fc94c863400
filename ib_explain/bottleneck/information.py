"""Information that a gate lets pass, in bits: closed forms of Gaussian KL divergences, summed over channels.

Features are normalised, r = (R - mean) / std, and noise is N(0, 1). All functions are pure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MOST_ATTENTION", "energy", "gaussian_bits", "noise_bits"]

MOST_ATTENTION = 0.999  # A = 1 passes infinitely many bits; .999 is 4.5 bits a channel and carries the features intact


def energy(normalised: Tensor) -> Tensor:
    """Sum of r^2 over channels: (B, C, h, w) -> (B, 1, h, w)."""
    return normalised.float().square().sum(dim=1, keepdim=True)


def gaussian_bits(attention: Tensor, r_energy: Tensor, channels: int) -> Tensor:
    """KL( N(A r, 1 - A^2) || N(0, 1) ) summed over channels, in bits.

    Per channel 1/2 [A^2 (r^2 - 1) - ln(1 - A^2)] nats: never negative, 0 at A = 0. For Gaussian r its mean over data is
    -1/2 ln(1 - A^2), the mutual information itself, since the gate keeps the variance.

    Args:
        attention: A in [0, 1], broadcastable to (B, 1, h, w).
        r_energy: sum of r^2 over channels, (B, 1, h, w).
        channels: C.
    """
    squared = attention.float().clamp(0, MOST_ATTENTION).square()
    return 0.5 * (squared * (r_energy - channels) - channels * torch.log1p(-squared)) / math.log(2)


def noise_bits(attention: Tensor, r_energy: Tensor, channels: int) -> Tensor:
    """KL( N(A r, (1 - A)^2) || N(0, 1) ) summed over channels, in bits (Schulz et al. 2020, arXiv 2001.00396, eq. 5-6).

    Per channel 1/2 [A^2 r^2 + (1 - A)^2 - 1] - ln(1 - A) nats. Its mean bounds the mutual information from above,
    loosely at small A, since the mix's variance falls to 1/2 at A = 1/2.

    Args:
        attention: A in [0, 1], broadcastable to (B, 1, h, w).
        r_energy: sum of r^2 over channels, (B, 1, h, w).
        channels: C.
    """
    a = attention.float().clamp(0, MOST_ATTENTION)
    rest = 1 - a
    return (0.5 * (a.square() * r_energy + channels * (rest.square() - 1)) - channels * torch.log(rest)) / math.log(2)
