"""Relevance: what the host knows of a class, in bits, distributed over the positions of the site.

The bottleneck's bits count what passes; these say what it is worth. With the positions S let through and the
bottleneck's noise in place of all others, the host knows v(S) = log2 p(t | S) - E log2 p(t | nothing) bits of the class
t; v(all) is the label information of the image. Relevance is the Shapley value of each position in this game: signed
(a position may speak against the class), additive (the sum is v(all)), and for the class asked for (negative in all
where the host sees less of it than in average content).

A network learns the values from random sets by the regression whose minimum they are (Jethani et al. 2022, FastSHAP,
arXiv 2107.07436, eq. 5; Charnes et al. 1988): the squared error of the sum over S, with set sizes drawn from the
Shapley kernel, each set beside its complement. Only the part of the host behind the site runs for it, without gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ib_explain.targets import target_scores

__all__ = ["LEAST_TYPICAL_BITS", "coalitions", "label_information", "regression_loss"]

LEAST_TYPICAL_BITS = 0.1  # of a host that gives every image the same prediction


def label_information(logits: Tensor, closed: Tensor, target: Tensor) -> Tensor:
    """log2 p(target) - E log2 p(target | nothing), (B,), in bits.

    Args:
        logits: (B, K).
        closed: mean of ln p with nothing let through, (1, K).
        target: classes (B,).
    """
    ahead = logits.float().log_softmax(dim=1) - closed
    return target_scores(ahead, target) / math.log(2)


def coalitions(uniform: Tensor, order: Tensor) -> Tensor:
    """A random set of positions for each image, its size from the Shapley kernel: 1 or 0, (B, 1, h, w).

    Of P positions a size s has probability proportional to 1 / (s (P - s)), and all sets of one size are alike.

    Args:
        uniform: one random number in [0, 1) an image, (B, 1).
        order: continuous random numbers (B, 1, h, w) whose order decides who is in.
    """
    count = order[0].numel()
    sizes = torch.arange(1, count, device=order.device, dtype=torch.float32)
    kernel = (1 / (sizes * (count - sizes))).cumsum(dim=0)
    size = 1 + torch.searchsorted(kernel / kernel[-1], uniform).clamp_max(count - 2)  # (B, 1)
    rank = order.flatten(1).argsort(dim=1).argsort(dim=1)
    return (rank < size).float().view_as(order)


def regression_loss(relevance: Tensor, chosen: Tensor, worth: Tensor) -> Tensor:
    """Squared error of the sum over the set, (B,).

    Args:
        relevance: of each position, (B, 1, h, w).
        chosen: sets, 1 or 0, (B, 1, h, w).
        worth: v(S) in the same unit, (B,).
    """
    return ((relevance * chosen).sum(dim=(1, 2, 3)) - worth).square()
