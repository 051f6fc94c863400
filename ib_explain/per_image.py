"""Attention optimised for these very images: all images of a batch at once, features cached at the site.

The loss is summed over images and every image sees the same noise, so a batch gives the maps that one image at a time
would give; only the part of the host behind the site runs.

A fit learns what holds for all images. Where the evidence in these very ones is, a few passes over the partly hidden
pictures tell (`ib_explain.masked_evidence`). Refining goes by it: it prices the places along with the deeper layers,
and the attention starts moved towards it, since few small steps would not get there. An optimisation from scratch does
not: without a fit that knows better, the noise of few masks does harm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ib_explain.bottleneck.information import MOST_ATTENTION
from ib_explain.bottleneck.module import Restriction
from ib_explain.checks import check_number, check_positive_int
from ib_explain.layouts import Layout
from ib_explain.objective import BETA_PER_STAKE, location_price, nats_at_stake, rate, standardised
from ib_explain.observation import Observation
from ib_explain.randomness import generator_of, normal

__all__ = ["REFINING_LR", "PerImageSettings", "mask_pairs", "optimise"]

REFINING_LR = 0.15  # from a fitted attention, which is nearly right: larger steps follow the noise of the few samples
START = 0.73  # open enough that the first predictions are nearly the host's
STEPS_A_PAIR = 5  # of masks
MOVE = 1.5  # of the start, in logits for a standard deviation of the evidence
LEAST, MOST = -2.0, 0.5  # standard deviations that count: up, a few masks of noise would make the brightest place


@dataclass(frozen=True)
class PerImageSettings:
    """How attention is optimised per image.

    Attributes:
        steps: Adam steps.
        lr: learning rate on the logit of A.
        beta: weight of the rate (`ib_explain.objective.rate`) against the loss of the target in nats; None for
            `BETA_PER_STAKE` times what is at stake in each image.
        copies: noise samples a step; they come in antithetic pairs.
        seed: of the noise.
    """

    steps: int = 20
    lr: float = 0.5
    beta: float | None = None
    copies: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not hasattr(self.steps, "__index__") or self.steps < 0:
            raise ValueError(f"steps must be an integer >= 0, got {self.steps!r}")
        check_positive_int(self.copies, "copies")
        check_number(self.lr, "lr", above=0)
        if self.beta is not None:
            check_number(self.beta, "beta", above=0)


def optimise(
    restriction: Restriction,
    seen: Observation,
    layout: Layout,
    settings: PerImageSettings,
    start: Tensor | None = None,
    evidence: Tensor | None = None,
) -> Tensor:
    """Minimise -ln p(target | restricted grid) + beta * rate over the attention of each image, by Adam.

    Args:
        restriction: gate and statistics of the site.
        seen: a clean pass over the images; with gradients, they price the places, without, all places cost the same.
        layout: of the site.
        settings: see there.
        start: attention to start from, (B, 1, h, w); by default .73 everywhere.
        evidence: of the partly hidden pictures for their targets, (B, 1, h, w), at any scale.

    Returns:
        Attention (B, 1, h, w), detached: the mean over the last quarter of the steps.
    """
    features = seen.features
    shape = (features.shape[0], 1, *features.shape[-2:])
    if settings.steps == 0:
        return torch.full(shape, START, device=features.device) if start is None else start.detach()
    first = torch.full(shape, math.log(START / (1 - START)), device=features.device) if start is None else _logit(start)
    if evidence is not None:
        first = first + _towards(evidence, first.sigmoid())
    logit = first.detach().float().clone().requires_grad_()
    optimiser = torch.optim.Adam([logit], lr=settings.lr)
    generator = generator_of(settings.seed, features.device)
    price = location_price(seen, evidence)
    beta = _beta(restriction, seen, layout, settings, generator)  # (B,)
    kept, averaged = torch.zeros(shape, device=features.device), max(1, settings.steps // 4)
    with torch.enable_grad():
        for step in range(settings.steps):
            total = torch.zeros_like(logit)
            noise = torch.zeros(0)
            for copy in range(settings.copies):
                if copy % 2 == 0:
                    noise = normal(generator, 1, *features.shape[1:])
                attention = logit.sigmoid()
                restricted = restriction.apply_to(seen, layout, attention, noise if copy % 2 == 0 else -noise)
                loss = F.cross_entropy(seen.tail(restricted).float(), seen.target, reduction="sum")
                bits = restriction.bits(seen, attention)
                loss = loss + (beta * rate(bits, price, features.shape[1])).sum()
                total = total + torch.autograd.grad(loss, logit)[0]
            logit.grad = total / settings.copies
            optimiser.step()
            if step >= settings.steps - averaged:
                kept += logit.detach().sigmoid() / averaged
    return kept


def mask_pairs(steps: int) -> int:
    """How many pairs of masks the evidence for so many steps is taken from: the more there are, the less is noise."""
    return math.ceil(steps / STEPS_A_PAIR)


def _towards(evidence: Tensor, attention: Tensor) -> Tensor:
    """By how much the logits start nearer to the evidence: by its standard deviations above or below what is open."""
    deviations = standardised(evidence.float())
    of_open = (deviations * attention).sum(dim=(2, 3), keepdim=True) / attention.sum(dim=(2, 3), keepdim=True)
    return MOVE * (deviations - of_open).clamp(LEAST, MOST)


def _beta(
    restriction: Restriction, seen: Observation, layout: Layout, settings: PerImageSettings, generator: torch.Generator
) -> Tensor:
    if settings.beta is not None:
        return torch.full((len(seen.features),), settings.beta, device=seen.features.device)
    noise = normal(generator, 1, *seen.features.shape[1:])
    with torch.no_grad():
        closed = seen.tail(restriction.apply_to(seen, layout, torch.zeros((), device=noise.device), noise))
    return BETA_PER_STAKE * nats_at_stake(seen.logits, closed)


def _logit(attention: Tensor) -> Tensor:
    return torch.logit(attention.float().clamp(1e-3, MOST_ATTENTION))
