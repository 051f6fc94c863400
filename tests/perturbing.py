"""A host whose score is a weighted sum, and a small network with its images: for measures that take images apart."""

from __future__ import annotations

import torch
from torch import nn


class Weighted(nn.Module):
    """Logit 0 is `bias` plus the sum of weights times the first channel, logit 1 is 0."""

    def __init__(self, weights, bias=0.0):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))
        self.bias = bias
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        score = (x[:, 0] * self.weights).sum((1, 2)) + self.bias
        return torch.stack([score, torch.zeros_like(score)], dim=1)


def ones(*weights):
    return torch.ones(1, 3, 1, len(weights)), torch.tensor([[list(weights)]], dtype=torch.float32)


def small_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5)
    return nn.Sequential(*layers).eval()


def noise_and_maps():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 24, 24, generator=generator), torch.rand(3, 1, 24, 24, generator=generator)
