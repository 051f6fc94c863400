"""What the bottleneck trades: nats about the target against the rate, and the price between them.

The rate is not the plain sum of the nats that pass. Two things make it an explanation's rate:

- A place is dear where the host's own deep layers hold no evidence for the class, and cheap where they do
  (`location_price`). The fine grid alone cannot tell an object's edge from the same edge elsewhere.
- The root is taken over coarse blocks (`rate`), as in the group lasso (Yuan and Lin 2006): the first nat in a block
  costs most, so that blocks without evidence close altogether rather than each keeping a little.

Both only steer which information passes. Bits are counted as they are, whatever they cost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ib_explain.maps import resize
from ib_explain.observation import Observation
from ib_explain.targets import target_scores

__all__ = ["BETA_PER_STAKE", "location_price", "nats_at_stake", "rate", "standardised", "worth_fitting"]

BETA_PER_STAKE = 2.0  # the rate's weight beta, in units of the nats that are at stake in the image
LEAST_AT_STAKE = 0.1  # nats
CONTRAST = 3.0  # the log of a place's price falls by this for one standard deviation more of evidence
BLOCKS = 4  # a side


def nats_at_stake(logits: Tensor, closed: Tensor) -> Tensor:
    """What is lost of the host's own prediction when nothing passes: KL(p || closed) in nats for each image, (B,).

    At least `LEAST_AT_STAKE`: an image that looks to the host as average content does is not squeezed to nothing.

    Args:
        logits: of the intact images, (B, K).
        closed: with nothing let through, (B, K) or (1, K).
    """
    own, without = logits.float().log_softmax(1), closed.float().log_softmax(1)
    return (own.exp() * (own - without)).sum(dim=1).clamp_min(LEAST_AT_STAKE)


def worth_fitting(logits: Tensor, closed: Tensor, target: Tensor) -> Tensor:
    """Weight of each image in a fit, (B,) in [0, 1]: nats that it puts the target ahead of average content, up to one.

    Args:
        logits: of the intact images, (B, K).
        closed: with nothing let through, (B, K) or (1, K).
        target: class of each image, (B,).
    """
    ahead = logits.float().log_softmax(1) - closed.float().log_softmax(1)
    return target_scores(ahead, target).clamp(0, 1)


def location_price(seen: Observation, masked: Tensor | None = None) -> Tensor:
    """What a nat costs at each position of the site, (B, 1, h, w), 1 on average over an image.

    exp(-3 e), where e is the evidence of the layers of a coarser grid that are read behind the site: Grad-CAM without
    its ReLU (the gradient's spatial mean times the features, Selvaraju et al. 2017, arXiv 1610.02391) at each of them,
    brought to zero mean and unit standard deviation, and so their sum. Where none is coarser, evidence of the site: in
    hosts of one grid size deeper positions have only exchanged more.

    Args:
        seen: a clean pass with gradients.
        masked: further evidence, of the partly hidden pictures, (B, 1, h, w), at any scale; it counts as much.
    """
    grid = (seen.features.shape[2], seen.features.shape[3])
    read = zip(seen.deep, seen.deep_gradients, strict=False)
    pairs = [(features, gradient) for features, gradient in read if math.prod(features.shape[2:]) < math.prod(grid)]
    if not pairs and seen.gradient is not None:
        pairs = [(seen.features, seen.gradient)]
    evidence = torch.zeros((len(seen.features), 1, *grid), device=seen.features.device)
    for features, gradient in pairs:
        weights = gradient.float().mean(dim=(2, 3), keepdim=True)
        evidence = evidence + resize(standardised((weights * features.float()).sum(dim=1, keepdim=True)), grid)
    if masked is not None:
        evidence = standardised(evidence) + standardised(masked.float())
    exponent = -CONTRAST * standardised(evidence)
    price = torch.exp(exponent - exponent.amax(dim=(2, 3), keepdim=True))  # finite also where one place stands out
    return price / price.mean(dim=(2, 3), keepdim=True)


def rate(bits: Tensor, price: Tensor, channels: int) -> Tensor:
    """Root of the priced nats a feature element, a mean over 4 x 4 blocks of the image: (B,).

    Args:
        bits: that pass at each position, summed over channels, (B, 1, h, w).
        price: of each position, broadcastable to bits.
        channels: C.
    """
    nats = bits * price * (math.log(2) / channels)
    blocks = F.adaptive_avg_pool2d(nats, (min(BLOCKS, nats.shape[2]), min(BLOCKS, nats.shape[3])))
    return (blocks.clamp_min(0) + 1e-6).sqrt().mean(dim=(1, 2, 3))


def standardised(values: Tensor) -> Tensor:
    """Zero mean and unit standard deviation in each image; a constant becomes zero, up to rounding."""
    centred = values - values.mean(dim=(2, 3), keepdim=True)
    scale = centred.square().mean(dim=(2, 3), keepdim=True).sqrt()
    rounding = 1e-5 * values.abs().amax(dim=(2, 3), keepdim=True)
    return centred / torch.maximum(scale, rounding).clamp_min(1e-20)
