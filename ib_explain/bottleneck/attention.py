"""The networks of a bottleneck: what a clean pass showed -> attention, or relevance, at every position of the grid.

About 64 channels of 1x1 and 3x3 convolutions on the site's grid. It reads the site's normalised features, deeper
features of the same pass, and either the target's gradient with the class evidence that follows from it, or, without a
gradient, the classifier's row of the target class: a query made from it and, where the row is as wide as the deepest
features that are read, their class activation map.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionNetwork", "NetworkInputs", "RelevanceNetwork", "class_evidence", "unit_scale"]

WIDTH = 64
LEAST_GRADIENT = 1e-30
START = 1.0  # logit of the attention before training: open at .73, so that the first predictions are nearly the host's


class NetworkInputs(NamedTuple):
    """What the networks read of a clean pass, normalised. Either the gradients are there, or the query."""

    features: Tensor
    """Of the site, (B, C, h, w)."""
    deep: list[Tensor]
    """Of deeper layers, each (B, C', h', w')."""
    gradient: Tensor | None
    """Of the target's log-odds with respect to `features`, (B, C, h, w)."""
    deep_gradients: list[Tensor]
    """The same with respect to `deep`."""
    query: Tensor | None
    """Of the target class, (B, Q)."""


class _GridNetwork(nn.Module):
    """Evidence on a grid -> hidden values at each position.

    Args:
        channels: C of the site.
        deep_channels: C' of each deeper layer that is read.
        gradient: reads the target's gradient; otherwise a query of the class.
        query_width: length of the class query, 0 with `gradient`.
    """

    def __init__(self, channels: int, deep_channels: list[int], *, gradient: bool, query_width: int) -> None:
        super().__init__()
        self.site = nn.Conv2d(channels, WIDTH, 1)
        self.deep = nn.ModuleList(nn.Conv2d(c, WIDTH, 1, bias=False) for c in deep_channels)
        self.gradient = nn.Conv2d(channels, WIDTH, 1, bias=False) if gradient else None
        self.query = None if gradient else nn.Linear(query_width, 2 * WIDTH)
        self.row_fits = not gradient and query_width == [channels, *deep_channels][-1]
        evidence = 2 + 2 * len(deep_channels) if gradient else 1 + len(deep_channels) + self.row_fits
        self.evidence = nn.Conv2d(evidence, WIDTH, 1, bias=False)
        self.near = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="replicate")
        self.far = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="replicate")

    def hidden(self, inputs: NetworkInputs) -> Tensor:
        """What a head turns into values, (B, WIDTH, h, w)."""
        features, deep, gradient, deep_gradients, query = inputs
        grid = features.shape[-2:]
        hidden = self.site(features)
        read = [conv(d) for conv, d in zip(self.deep, deep, strict=True)]
        for part in read:
            hidden = hidden + _onto(part, grid)
        if self.gradient is not None and gradient is not None:
            hidden = hidden + self.gradient(unit_scale(gradient))
            pairs = [(features, gradient), *zip(deep, deep_gradients, strict=True)]
            evidence = [_onto(class_evidence(f, g), grid) for f, g in pairs]
        elif self.query is not None and query is not None:
            weight, shift = self.query(query)[:, :, None, None].chunk(2, dim=1)  # each (B, WIDTH, 1, 1)
            evidence = [unit_scale(_onto((weight * part).mean(dim=1, keepdim=True), grid)) for part in (hidden, *read)]
            if self.row_fits:
                evidence.append(unit_scale(_onto(_class_activation([features, *deep][-1], query), grid)))
            hidden = hidden * (1 + weight) + shift
        else:
            raise ValueError("the network needs the target's gradient or a query of the class, got neither")
        hidden = _gelu(hidden + self.evidence(torch.cat(evidence, dim=1)))
        hidden = hidden + _gelu(self.near(hidden))
        return hidden + _gelu(self.far(hidden))


class AttentionNetwork(_GridNetwork):
    """Evidence on a grid -> attention, a Gaussian per position."""

    def __init__(self, channels: int, deep_channels: list[int], *, gradient: bool, query_width: int) -> None:
        super().__init__(channels, deep_channels, gradient=gradient, query_width=query_width)
        self.head = nn.Conv2d(WIDTH, 2, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        self.head.bias = nn.Parameter(torch.tensor([START, -3.0]))

    def forward(self, inputs: NetworkInputs) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of A, each (B, 1, h, w)."""
        logit, spread = self.head(self.hidden(inputs)).chunk(2, dim=1)
        return logit.sigmoid(), F.softplus(spread)


class RelevanceNetwork(_GridNetwork):
    """Evidence on a grid -> signed shares of the label's information, at first none: evenly spread."""

    def __init__(self, channels: int, deep_channels: list[int], *, gradient: bool, query_width: int) -> None:
        super().__init__(channels, deep_channels, gradient=gradient, query_width=query_width)
        self.head = nn.Conv2d(WIDTH, 1, 1, bias=False)  # only differences between positions count
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """(B, 1, h, w), of order 1."""
        return self.head(self.hidden(inputs))


def unit_scale(values: Tensor) -> Tensor:
    """Divide each image's values by their root mean square: only the pattern counts, not the scale of logits."""
    values = values.float()  # squares leave the range of half precision
    scale = values.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return values / scale.clamp_min(1e-12)


def class_evidence(features: Tensor, gradient: Tensor) -> Tensor:
    """Two maps of evidence for the class, each at unit scale: (B, C, h, w) twice -> (B, 2, h, w).

    The sum over channels of gradient * features (HiResCAM, Draelos and Carin 2020, arXiv 2011.08891), and of the
    gradient's spatial mean * features (Grad-CAM without the ReLU, Selvaraju et al. 2017, arXiv 1610.02391).
    """
    local = (gradient * features).sum(dim=1, keepdim=True)
    pooled = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1, keepdim=True)
    return torch.cat([unit_scale(local), unit_scale(pooled)], dim=1)


def _gelu(values: Tensor) -> Tensor:
    """GELU without the gradients of which nothing is left: far below zero its slope is under `LEAST_GRADIENT`.

    Numbers under 1e-38 have no full digits, and CPUs take many times as long for them, a good part of a fit to a small
    host. Sums of gradients do not see what is left out here.
    """
    if values.requires_grad:
        values.register_hook(functools.partial(F.hardshrink, lambd=LEAST_GRADIENT))
    return F.gelu(values)


def _class_activation(features: Tensor, row: Tensor) -> Tensor:
    """Sum over channels of the classifier's row (B, C) * features, (B, 1, h, w) (CAM, Zhou et al. 2016)."""
    return (row[:, :, None, None] * features).sum(dim=1, keepdim=True)


def _onto(values: Tensor, grid: torch.Size) -> Tensor:
    if values.shape[-2:] == grid:
        return values
    return F.interpolate(values, size=tuple(grid), mode="bilinear", align_corners=False)
