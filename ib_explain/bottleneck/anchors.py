"""Learnable anchor values for attention: scalar vector quantisation (Lai et al. 2021, arXiv 2108.03418, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Anchors"]

CODEBOOK_WEIGHT, COMMITMENT_WEIGHT = 0.4, 0.1  # the released code's


class Anchors(nn.Module):
    """Q scalar anchors shared by all positions and images; attention is replaced by the nearest one.

    The gradient passes straight through to the attention. It cannot move the anchors, the codebook loss does: the
    anchors get a learning rate of their own (`LEARNING_RATE`), since at the released code's they stay where they start.

    Args:
        count: Q >= 2, evenly spaced on [0, 1] at the start.
    """

    LEARNING_RATE = 2e-2

    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(0, 1, count))

    def forward(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise attention of any shape.

        Returns:
            The quantised attention, and the loss 0.4 (sg(a) - v)^2 + 0.1 (a - sg(v))^2, a mean over positions.
        """
        edges = self.values.detach().sort()
        nearest = torch.bucketize(attention.detach(), (edges.values[1:] + edges.values[:-1]) / 2)
        value = self.values[edges.indices[nearest]]
        loss = CODEBOOK_WEIGHT * (attention.detach() - value).square().mean()
        loss = loss + COMMITMENT_WEIGHT * (attention - value.detach()).square().mean()
        return value.detach() + (attention - attention.detach()), loss  # in this order: exactly an anchor
