"""Explanations that several modules share: fitted bottlenecks, and maps that know nothing."""

from __future__ import annotations

import torch

from ib_explain.ib import IBAttention
from tests.models import images, tiny


def fitted(kind="cnn", **options):
    """A bottleneck after a short fit, and its host."""
    host = tiny(kind)
    data = [images(8, seed=s) for s in range(3)]
    return IBAttention(host, **options).fit(data, steps=12, beta=0.01, show_progress=False), host


def blind(model, x, target):
    return x.abs().mean(1, keepdim=True)


def even(model, x, target):
    return torch.ones_like(x[:, :1])


def random_maps(count=3, size=16, seed=0):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
