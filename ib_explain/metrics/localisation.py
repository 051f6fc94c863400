"""Localisation: does the map stay on the object? Scores of maps against masks, (B,) float32 in [0, 1], or a ratio.

Shared conventions:

- Maps are (B, 1, H, W) or (B, H, W), masks bool of the same size; several boxes of an image are one mask (their union).
- Signed maps: `pointing_game`, `top_share` and `best_iou` only rank pixels and take the values as they are, negative
  evidence last. `energy_inside` and `effective_heat_ratio` add heat up and take its positive part.
- NaN: an empty mask, everywhere; a constant map (up to float32 rounding) where pixels are ranked; a map without
  positive heat where heat is added up. A constant positive map shares its heat evenly, so these two are defined for it.
- A full mask is defined but says nothing about where the map is: leave such images out.
- Large boxes are hit by chance and photographs put objects in the middle: read each score beside what a centred
  Gaussian gets, `relative_to_centre`.

A high score says that the map lies on what people labelled, not that the model used it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ib_explain.checks import check_number
from ib_explain.metrics.base import register_function
from ib_explain.metrics.ground_truth import centred_gaussian
from ib_explain.metrics.values import flat_heat, flat_values, is_constant, undefined_where

__all__ = [
    "best_iou",
    "effective_heat_ratio",
    "energy_inside",
    "pointing_game",
    "relative_to_centre",
    "top_share",
]


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Does the map's maximum lie on the object? 1 for a hit, 0 for a miss.

    Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018 (arXiv 1608.00507), section 4.1. Of
    several maxima the first in pixel order points.

    Args:
        maps: (B, 1, H, W) or (B, H, W).
        masks: (B, 1, H, W) or (B, H, W) bool.
        tolerance: pixels by which the point may miss the mask (Euclidean), >= 0. The paper grants 15 on images of about
            500 pixels a side; the default grants none, since 15 pixels of a small input are a large part of it.
    """
    tolerance = check_number(tolerance, "tolerance (in pixels)", at_least=0)
    values = flat_values(maps)
    inside = _flat_masks(masks, maps)
    width = maps.shape[-1]
    # argmax promises no order among equal values, the first index that attains the maximum does.
    attains = values == values.amax(dim=1, keepdim=True)
    index = torch.arange(values.shape[1], device=values.device)
    peak = index.where(attains, values.shape[1]).amin(dim=1, keepdim=True)  # (B, 1)
    squared = (index % width - peak % width) ** 2 + (index // width - peak // width) ** 2  # (B, H*W)
    hit = (inside & (squared <= tolerance**2)).any(dim=1)
    return undefined_where(is_constant(values) | ~inside.any(dim=1), hit.double())


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's positive heat that lies inside of the mask.

    The energy-based pointing game of Wang et al., "Score-CAM", CVPR workshops 2020 (arXiv 1910.01279), section 4.3.
    An even map gets the mask's share of the image.
    """
    heat = flat_heat(maps)
    inside = _flat_masks(masks, maps)
    total = heat.sum(dim=1)
    return undefined_where((total == 0) | ~inside.any(dim=1), (heat * inside).sum(dim=1) / total)


def top_share(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the n top-ranked pixels that lie inside of the mask, n being the mask's own number of pixels.

    The bounding-box measure of Schulz et al., "Restricting the Flow", ICLR 2020 (arXiv 2001.00396), section 4.4, who
    keep images whose box covers at most 33 % of the image. Pixels that tie at the n-th place count by their share
    inside, the mean over all orders of them: the zeros of a rectified map then favour no corner of the image.
    """
    values = flat_values(maps)
    inside = _flat_masks(masks, maps)
    area = inside.sum(dim=1)
    ranked = values.sort(dim=1, descending=True).values
    cut = ranked.gather(1, (area - 1).clamp_min(0)[:, None])  # (B, 1), the n-th largest value
    above, ties = values > cut, values == cut
    places_left = area - above.sum(dim=1)
    found = (above & inside).sum(dim=1) + places_left * (ties & inside).sum(dim=1) / ties.sum(dim=1).double()
    return undefined_where(is_constant(values) | (area == 0), found / area)


def effective_heat_ratio(maps: Tensor, masks: Tensor, *, floor: float = 0.1) -> Tensor:
    """Heat inside of the mask by the number of pixels kept, over rising thresholds, as the area under that curve.

    Zhang et al., "Fine-Grained Neural Network Explanation by Identifying Input Features with Predictive Information",
    NeurIPS 2021 (arXiv 2110.01471), with the settings of the released code: positive heat scaled to a maximum of 1;
    values below `floor` dropped; thresholds at the quantiles 0, 0.1, ..., 1 of the values that are left, at most 0.99;
    at each the heat inside divided by the number of pixels (inside or not) at or above the threshold; trapezoids. Even
    with a full mask it is 1 only for a map of one level: it also rewards heat of even strength.

    Args:
        maps: (B, 1, H, W) or (B, H, W).
        masks: (B, 1, H, W) or (B, H, W) bool.
        floor: values below this share of the maximum are dropped, in [0, 1).
    """
    if not check_number(floor, "floor (a share of the maximum)", at_least=0) < 1:
        raise ValueError(f"floor must be a share of the maximum in [0, 1), got {floor}")
    heat = flat_heat(maps)
    inside = _flat_masks(masks, maps)
    peak = heat.amax(dim=1, keepdim=True)
    heat = heat / torch.where(peak > 0, peak, 1.0)
    ranked, order = heat.sort(dim=1, descending=True)  # (B, N)
    heat_inside = (ranked * inside.gather(1, order)).cumsum(dim=1)
    kept = (ranked >= floor).sum(dim=1, keepdim=True)  # (B, 1); those are the first `kept` of the ranked values

    # Places of the quantiles among the kept values, from the largest down; whole numbers stay exact in integers.
    tenths = torch.arange(11, device=heat.device)
    place = (10 - tenths) * (kept - 1).clamp_min(0)  # (B, 11), in tenths of a pixel
    upper, lower = place // 10, (place + 9) // 10
    between = (place % 10).double() / 10
    thresholds = torch.lerp(ranked.gather(1, upper), ranked.gather(1, lower), between).clamp_max(0.99)

    passed = torch.searchsorted(-ranked, -thresholds, right=True)  # (B, 11), number of values >= threshold
    ratios = heat_inside.gather(1, (passed - 1).clamp_min(0)) / passed
    curve = torch.trapezoid(ratios, dx=0.1, dim=1)
    return undefined_where((peak[:, 0] == 0) | ~inside.any(dim=1), curve)


def best_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of mask and thresholded map (values at or above it) at the best of all thresholds.

    The best threshold is chosen with the mask in hand: an upper bound that frees the score from the map's scale.
    """
    values = flat_values(maps)
    inside = _flat_masks(masks, maps)
    area = inside.sum(dim=1, keepdim=True)
    ranked, order = values.sort(dim=1, descending=True)
    common = inside.gather(1, order).cumsum(dim=1)
    taken = torch.arange(1, values.shape[1] + 1, device=values.device)
    iou = common / (taken + area - common).double()
    # A threshold takes all pixels of its value or none: only the last of equal values is a cut.
    inner = torch.nn.functional.pad(ranked[:, 1:] == ranked[:, :-1], (0, 1))
    return undefined_where(is_constant(values) | (area[:, 0] == 0), iou.masked_fill(inner, 0).amax(dim=1))


def relative_to_centre(
    measure: Callable[[Tensor, Tensor], Tensor], maps: Tensor, masks: Tensor, *, sigma: float = 0.2
) -> Tensor:
    """A localisation score divided by what a centred Gaussian gets on the same mask: above 1 beats the centre.

    Options of the measure go in by `functools.partial`. Of `pointing_game`, whose score is 0 or 1 for an image, only
    those images are left whose centre is on the object; to count all of them divide the two averages instead, that of
    the method and that of `center_gaussian`.

    Args:
        measure: one of this file's scores, or any `f(maps, masks) -> (B,)`.
        maps: (B, 1, H, W) or (B, H, W).
        masks: (B, 1, H, W) or (B, H, W) bool.
        sigma: standard deviation of the Gaussian as a share of each side.

    Returns:
        (B,) float32 >= 0, NaN where either score is undefined or the Gaussian's is 0.
    """
    score = measure(maps, masks)
    centre = centred_gaussian((maps.shape[-2], maps.shape[-1]), sigma, device=maps.device)
    reference = measure(centre[:, 0].expand(maps.shape[0], -1, -1), masks)
    return undefined_where(reference == 0, score.double() / reference.double())


def _flat_masks(masks: Tensor, maps: Tensor) -> Tensor:
    """Masks of these maps, checked: (B, N) bool on their device."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        came = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a bool tensor of shape (B, 1, H, W) or (B, H, W), got {came}")
    expected = (maps.shape[0], *maps.shape[-2:])
    flat = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if tuple(flat.shape) != expected:
        raise ValueError(f"masks must have the maps' batch and size {expected}, got shape {tuple(masks.shape)}")
    return flat.to(maps.device).flatten(1)


def _against_centre(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    @functools.wraps(measure)
    def score(maps: Tensor, masks: Tensor) -> Tensor:
        return relative_to_centre(measure, maps, masks)

    score.__doc__ = f"`{measure.__name__}` divided by what a centred Gaussian (sigma 0.2 of each side) gets."
    return score


for _measure, _unit in (
    (pointing_game, "hits"),
    (energy_inside, "share"),
    (top_share, "share"),
    (effective_heat_ratio, "heat per pixel"),
    (best_iou, "intersection over union"),
):
    register_function(_measure, family="localisation", unit=_unit, needs=("maps", "masks"))
    register_function(
        _against_centre(_measure),
        family="localisation",
        unit="times the centre prior",
        needs=("maps", "masks"),
        suffix="_relative",
        derived=True,
    )
