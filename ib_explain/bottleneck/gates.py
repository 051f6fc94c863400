"""How attention restricts the grid: gates on normalised features, each with its rate. Add one with the decorator."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from ib_explain.bottleneck.information import MOST_ATTENTION, gaussian_bits, noise_bits
from ib_explain.registry import Registry

__all__ = ["GATES", "Gate"]


class Gate(Protocol):
    """A gate mixes features with noise and knows the information that passes."""

    measures_bits: bool
    "Whether `bits` is an amount of information; if not, it is only the penalty that trains the attention."

    def mix(self, normalised: Tensor, attention: Tensor, noise: Tensor) -> Tensor:
        """r (B, C, h, w), A (B, 1, h, w), e ~ N(0, 1) -> restricted r (B, C, h, w)."""

    def bits(self, attention: Tensor, r_energy: Tensor, channels: int) -> Tensor:
        """Bits per position, (B, 1, h, w)."""


GATES: Registry[type[Gate]] = Registry("gate")


@GATES.register("gaussian")
class GaussianGate:
    """A r + sqrt(1 - A^2) e: keeps the variance; the mean rate is the true information of Gaussian features."""

    measures_bits = True

    def mix(self, normalised: Tensor, attention: Tensor, noise: Tensor) -> Tensor:
        a = attention.clamp(0, MOST_ATTENTION)
        return a * normalised + (1 - a.square()).sqrt() * noise

    def bits(self, attention: Tensor, r_energy: Tensor, channels: int) -> Tensor:
        return gaussian_bits(attention, r_energy, channels)


@GATES.register("noise")
class NoiseGate:
    """A r + (1 - A) e: the mix of Schulz et al. 2020 (IBA); the rate is an upper bound."""

    measures_bits = True

    def mix(self, normalised: Tensor, attention: Tensor, noise: Tensor) -> Tensor:
        a = attention.clamp(0, MOST_ATTENTION)
        return a * normalised + (1 - a) * noise

    def bits(self, attention: Tensor, r_energy: Tensor, channels: int) -> Tensor:
        return noise_bits(attention, r_energy, channels)


@GATES.register("residual")
class ResidualGate:
    """R (1 + A): Lai et al. 2021 (arXiv 2108.03418), for studies; no cut and no noise, so no bits of information.

    Everything passes at least at weight 1. The rate of the paper is measured on a latent vector behind the host's tail
    and acts as an L2 penalty; here it is 1/2 A^2 r^2 nats, the KL of N(A r, 1) from N(0, 1).
    """

    measures_bits = False

    def mix(self, normalised: Tensor, attention: Tensor, noise: Tensor) -> Tensor:
        return normalised * (1 + attention)

    def bits(self, attention: Tensor, r_energy: Tensor, channels: int) -> Tensor:
        return 0.5 * attention.square() * r_energy / math.log(2)
