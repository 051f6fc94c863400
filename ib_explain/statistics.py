"""Streaming mean and standard deviation of features: batched, mergeable, numerically stable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "RunningMean", "RunningMoments"]

ROUNDING = 1e-6  # of float32 sums, relative
STD_FLOOR = 1e-2  # of the mean standard deviation over channels: a dead channel must not look infinitely surprising


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of features, (1, C, 1, 1) per channel or (1, C, h, w) per element, float32.

    Attributes:
        mean: mean over images (and positions).
        std: standard deviation, floored at 1 % of its own mean so that it is never zero.
        count: images seen.
    """

    mean: Tensor
    std: Tensor
    count: int

    def to(self, device: torch.device) -> Moments:
        return Moments(self.mean.to(device), self.std.to(device), self.count)

    def restore(self, normalised: Tensor) -> Tensor:
        """Normalised features r back to the host's: mean + std * r."""
        return torch.addcmul(self.mean, self.std, normalised)


class RunningMoments:
    """Mean and variance of (B, C, h, w) features over any number of batches.

    A batch is reduced on its device in float32, around its own mean; batches are joined in float64 by the pairwise
    update of Chan, Golub and LeVeque (1979), so that splitting the data in any way gives the same figures.

    Args:
        per_element: keep (C, h, w) statistics instead of one mean and variance a channel.
    """

    def __init__(self, *, per_element: bool = False) -> None:
        self.per_element = per_element
        self.images = 0
        self.count = 0  # values behind each mean
        self.mean = torch.zeros((), device="cpu")
        self.squares = torch.zeros((), device="cpu")  # sum of squared deviations from the mean

    def update(self, features: Tensor) -> None:
        """Add a batch (B, C, h, w)."""
        values = features.detach().float()
        axes = (0,) if self.per_element else (0, 2, 3)
        mean = values.mean(dim=axes, keepdim=True)
        squares = (values - mean).square().sum(dim=axes, keepdim=True)
        self._join(len(values), values.numel() // mean.numel(), mean.cpu().double(), squares.cpu().double())

    def merge(self, other: RunningMoments) -> None:
        """Add what another estimate has seen."""
        if other.count:
            self._join(other.images, other.count, other.mean, other.squares)

    @property
    def varies(self) -> bool:
        """Whether any value differs from its mean by more than rounding."""
        deviation = (self.squares / max(self.count, 1)).sqrt()
        return bool((deviation > ROUNDING * self.mean.abs()).any())

    def result(self) -> Moments:
        """The estimate so far.

        Raises:
            ValueError: before the first batch.
        """
        if self.count == 0:
            raise ValueError("no features seen: statistics need at least one image")
        std = (self.squares / max(self.count - 1, 1)).sqrt()
        floor = STD_FLOOR * std.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return Moments(self.mean.float(), std.clamp_min(float(floor)).float(), self.images)

    def _join(self, images: int, count: int, mean: Tensor, squares: Tensor) -> None:
        if self.count and mean.shape != self.mean.shape:
            raise ValueError(f"features changed their shape from {tuple(self.mean.shape)} to {tuple(mean.shape)}")
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.images, self.count = self.images + images, total


class RunningMean:
    """Mean over images of several tensors (B, ...) at once: what stands beside a grid."""

    def __init__(self) -> None:
        self.images = 0
        self.sums: list[Tensor] = []

    def update(self, tensors: list[Tensor]) -> None:
        """Add a batch of each tensor."""
        if not tensors:
            return
        sums = [t.detach().cpu().double().sum(dim=0, keepdim=True) for t in tensors]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.images += len(tensors[0])

    def merge(self, other: RunningMean) -> None:
        """Add what another estimate has seen."""
        if other.sums:
            self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)] if self.sums else other.sums
            self.images += other.images

    def result(self) -> list[Tensor]:
        """The means, each (1, ...) float32; an empty list if there was nothing beside the grid."""
        return [(total / self.images).float() for total in self.sums]
