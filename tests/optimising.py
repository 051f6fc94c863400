"""What a bottleneck optimised per image is tried on: a small host, made-up statistics, dear and cheap places."""

from __future__ import annotations

import torch

from ib_explain.bottleneck.module import Restriction
from ib_explain.statistics import Moments
from tests.models import images, tiny

LAYER, GRID, CHANNELS = "stages.1", (6, 6), 12


def setting(gate="gaussian", count=3):
    host, x = tiny(), images(count, seed=5)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(1, CHANNELS, 1, 1, generator=generator) * 0.2
    std = torch.rand(1, CHANNELS, 1, 1, generator=generator) + 0.5
    return host, x, Restriction(gate, Moments(mean, std, 1), [])


def dear_on_the_left(seen, masked=None):
    """Places on the left cost twenty times those on the right."""
    price = torch.ones(len(seen.features), 1, *seen.features.shape[-2:])
    price[..., : price.shape[-1] // 2] = 20.0
    return price / price.mean()
