"""What the host says about the image times its map, and how sparse a map is.

Maps are min-max normalised image by image, so that the map is a mask in [0, 1]; what is masked out becomes 0 in
normalised space (the mean colour). These measures see the map's values, not only their order, and judge images that
no training data looks like: read them beside insertion and deletion.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ib_explain.checks import check_maps
from ib_explain.metrics.base import Case, register_metric
from ib_explain.metrics.probe import Probe
from ib_explain.metrics.values import is_constant
from ib_explain.perturb import tied_share
from ib_explain.targets import Target

__all__ = ["add", "average_drop", "increase_in_confidence", "sparsity", "sparsity_max_over_mean"]
__all__ += ["sparsity_mean_over_max"]


def average_drop(
    model: nn.Module, x: Tensor, maps: Tensor, target: Target = None, *, batch_size: int | None = None
) -> Tensor:
    """Share of the target's probability that is lost when the map masks the image. Lower is better.

    max(0, c(x) - c(x * m)) / c(x) with the min-max normalised map m (Chattopadhay et al. 2018, Grad-CAM++,
    arXiv 1710.11063, sec. 4.1, who give its mean in per cent). Rewards maps that mask nothing.

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        maps: (B, 1, H, W) or (B, H, W).
        target: the explained classes; None is the host's top-1 on the intact images.
        batch_size: images in one forward pass, see `Probe`.

    Returns:
        (B,) float32 in [0, 1]; NaN for a constant map, which has no normalised form, or a probability of 0.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return _relative_fall(probe, _masked(probe, maps, inverted=False)).clamp_min(0)


def increase_in_confidence(
    model: nn.Module, x: Tensor, maps: Tensor, target: Target = None, *, batch_size: int | None = None
) -> Tensor:
    """1 where the masked image is scored higher than the intact one, else 0. Higher is better.

    1[c(x * m) > c(x)], arguments as for `average_drop` (Chattopadhay et al. 2018, arXiv 1710.11063, sec. 4.1).

    Returns:
        (B,) float32, 0 or 1; NaN for a constant map.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return _increase(probe, _masked(probe, maps, inverted=False))


def add(model: nn.Module, x: Tensor, maps: Tensor, target: Target = None, *, batch_size: int | None = None) -> Tensor:
    """Average drop in deletion: share of the probability lost when what the map shows is hidden. Higher is better.

    (c(x) - c(x * (1 - m))) / c(x), not clamped; arguments as for `average_drop` (Jung and Oh 2021, LIFT-CAM,
    arXiv 2102.05228).

    Returns:
        (B,) float32, at most 1; NaN for a constant map or a probability of 0.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return _relative_fall(probe, _masked(probe, maps, inverted=True))


def sparsity_max_over_mean(maps: Tensor) -> Tensor:
    """Maximum over mean of the map: 1 for an even map, H*W for a single pixel. Higher is sparser.

    The form of Gomez et al. 2022 (arXiv 2201.13291). It is not the Gini index that others call sparseness.

    Args:
        maps: (B, 1, H, W) or (B, H, W), non-negative.

    Returns:
        (B,) float32; NaN for an all-zero map and for one with negative values.
    """
    return 1 / sparsity_mean_over_max(maps)


def sparsity_mean_over_max(maps: Tensor) -> Tensor:
    """Mean over maximum of the map: 1 for an even map, 1 / (H*W) for a single pixel. Lower is sparser.

    The inverse of `sparsity_max_over_mean`, the form of the released code of BR-NPA (Gomez et al., arXiv 2106.02566).

    Args:
        maps: (B, 1, H, W) or (B, H, W), non-negative.

    Returns:
        (B,) float32 in (0, 1]; NaN for an all-zero map and for one with negative values.
    """
    values = check_maps(maps).flatten(1).double()
    low, high = values.aminmax(dim=1)
    return torch.where((low >= 0) & (high > 0), values.mean(1) / high, torch.nan).float()


sparsity = sparsity_max_over_mean
"""The published convention, higher is sparser."""


def _masked(probe: Probe, maps: Tensor | None, *, inverted: bool) -> Tensor:
    """Probability of the image under its normalised map, or under one minus it: (B,), NaN for a constant map."""
    maps = probe.check_maps(maps)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    constant = is_constant(maps.flatten(1).double())
    mask = (maps - low) / torch.where(constant[:, None, None], 1, high - low)
    mask = (1 - mask if inverted else mask)[:, None]
    scores = probe.scores(1, lambda image, _: (probe.x[image] * mask[image]).to(probe.x.dtype))[:, 0]
    return scores.masked_fill(constant, torch.nan)


def _relative_fall(probe: Probe, masked: Tensor) -> Tensor:
    intact = probe.intact()
    return torch.where(intact > 0, (intact - masked) / intact, torch.nan)


def _increase(probe: Probe, masked: Tensor) -> Tensor:
    return torch.where(masked.isnan(), masked, (masked > probe.intact()).float())


@register_metric("average_drop", family="perturbation", unit="share", higher_is_better=False)
def _average_drop_score(case: Case) -> Tensor:
    """Average drop: share of the probability lost when the image is multiplied by its map."""
    return _relative_fall(case.probe, case.once(_masked, inverted=False)).clamp_min(0)


@register_metric("increase_in_confidence", family="perturbation", unit="share", higher_is_better=True)
def _increase_score(case: Case) -> Tensor:
    """Increase in confidence: 1 where the image times its map is scored higher than the image."""
    return _increase(case.probe, case.once(_masked, inverted=False))


@register_metric("add", family="perturbation", unit="share", higher_is_better=True)
def _add_score(case: Case) -> Tensor:
    """Average drop in deletion: share of the probability lost when what the map shows is hidden."""
    return _relative_fall(case.probe, case.once(_masked, inverted=True))


@register_metric("tied_share", family="complexity", unit="share", higher_is_better=False, needs=("maps",))
def _tied_share_score(case: Case) -> Tensor:
    """Share of the map's pixels whose value another pixel has too: perturbation metrics order them by pixel index."""
    return tied_share(check_maps(case.maps))


@register_metric("sparsity_max_over_mean", family="complexity", unit="ratio", higher_is_better=True, needs=("maps",))
def _sparsity_score(case: Case) -> Tensor:
    """Sparsity as maximum over mean of the map: 1 for an even map, the number of pixels for a single one."""
    return sparsity_max_over_mean(check_maps(case.maps))


@register_metric("sparsity_mean_over_max", family="complexity", unit="ratio", higher_is_better=False, needs=("maps",))
def _inverse_sparsity_score(case: Case) -> Tensor:
    """Sparsity as mean over maximum of the map: 1 for an even map, towards 0 for a sparse one."""
    return sparsity_mean_over_max(check_maps(case.maps))
