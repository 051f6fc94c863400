"""Controls: maps that know nothing of the decision. A method that does not beat them has shown nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ib_explain.checks import check_number
from ib_explain.maps import resize
from ib_explain.methods.base import Call, check_reference, default_site, register_method
from ib_explain.methods.cam import grid_features
from ib_explain.randomness import generator_of, uniform
from ib_explain.reference import reference_statistics
from ib_explain.sites import resolve_site

__all__ = ["ActivationEnergy", "CenterGaussian", "Constant", "Edges", "Random", "sobel_magnitude"]


@register_method("random")
@dataclass(frozen=True)
class Random:
    """Control: uniform noise in [0, 1), one value a pixel, drawn from the seed and the image itself."""

    unit: ClassVar[str] = "none"

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("random")
        maps = []
        for own in _fingerprints(call.x).tolist():  # the same image has the same map in any batch
            generator = generator_of(own + call.seed * 0x9E3779B1)
            maps.append(uniform(generator, 1, *call.size))
        return torch.stack(maps).to(call.x.device)


@register_method("constant")
@dataclass(frozen=True)
class Constant:
    """Control: 1 everywhere; what ties and map-free effects alone score."""

    unit: ClassVar[str] = "none"

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("constant")
        return call.x.new_ones((len(call.x), 1, *call.size), dtype=torch.float32)


@register_method("center_gaussian")
@dataclass(frozen=True)
class CenterGaussian:
    """Control: a Gaussian on the middle of the image, 1 at its peak; objects are mostly in the middle.

    Attributes:
        sigma: standard deviation as a share of each side.
    """

    unit: ClassVar[str] = "none"
    sigma: float = 0.2

    def __post_init__(self) -> None:
        check_number(self.sigma, "sigma (a share of each side)", above=0)

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("center_gaussian")
        device = call.x.device
        along, across = (
            torch.exp(-0.5 * ((torch.arange(n, device=device) - (n - 1) / 2) / (self.sigma * n)).square())
            for n in call.size
        )
        return (along[:, None] * across).expand(len(call.x), 1, -1, -1).float().contiguous()


@register_method("edges")
@dataclass(frozen=True)
class Edges:
    """Control: Sobel gradient magnitude of the image's mean over channels; an edge detector knows no class."""

    unit: ClassVar[str] = "input / pixel"

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("edges")
        return sobel_magnitude(call.x.detach().float().mean(dim=1, keepdim=True))


@register_method("activation_energy")
@dataclass(frozen=True)
class ActivationEnergy:
    """Control: energy of the normalised features, sum over channels of ((R - mean) / std)^2, at `ib`'s default layer.

    Non-negative. At most one forward pass, besides the statistics.

    Attributes:
        reference: images (N, 3, H, W) for each channel's mean and standard deviation, best training images; None
            takes 32 images of smooth noise.
    """

    unit: ClassVar[str] = "r^2"
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        check_reference(self.reference)

    def __call__(self, call: Call) -> Tensor:
        if call.layer is None:
            site = default_site(call.model, call.input_size)
        else:
            site = resolve_site(call.model, call.layer, call.input_size)
        known = reference_statistics(call.model, site, self.reference, per_element=False, rows=call.batch_size)
        normalised = (grid_features(call, site) - known.moments.mean) / known.moments.std
        return resize(normalised.square().sum(dim=1, keepdim=True), call.size)


def sobel_magnitude(grey: Tensor) -> Tensor:
    """Length of the Sobel gradient per pixel, borders replicated: (B, 1, H, W) -> (B, 1, H, W)."""
    smooth = torch.tensor([1.0, 2.0, 1.0], device=grey.device) / 4
    slope = torch.tensor([-1.0, 0.0, 1.0], device=grey.device) / 2
    kernels = torch.stack([slope[:, None] * smooth, smooth[:, None] * slope])[:, None]  # (2, 1, 3, 3): along y, x
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1, keepdim=True)


def _fingerprints(x: Tensor) -> Tensor:
    """A number for each image that depends on its values alone, (B,) int64; integer sums have no order."""
    bits = x.detach().float().contiguous().flatten(1).view(torch.int32).long()
    places = torch.arange(bits.shape[1], device=x.device) * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01
    return (bits * (places | 1)).sum(dim=1) % 2**62
