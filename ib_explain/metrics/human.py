"""Human attention: do people look where the map is? Scores of maps against gaze, each (B,) float32.

Agreement with gaze describes a map, it does not test its faithfulness; people look at the middle of photographs, so
read every score beside that of the centre prior (`ground_truth.centred_gaussian`).

Points or maps: `nss`, `auc`, `auc_judd`, `auc_shuffled` and `information_gain` take fixations, B tensors (n_i, 2) of
(x, y) with 0 at the centre of the first pixel; `cc`, `sim` and `kld` take fixation densities (B, 1, H, W) of any
scale. A density made from dwell times and a list of points hold different things: do not make one from the other.
Maps, densities and points must be on one grid. Resize maps to it bilinearly; never move fixations to a coarser grid.

The definitions are those of the MIT/Tuebingen benchmark (Kuemmerer, Wallis, Bethge, "Saliency Benchmarking Made Easy",
ECCV 2018, and its library pysaliency) and of the older Matlab code (Bylinskii et al., arXiv 1604.03605); where the two
differ, each function says which is meant, and `CONVENTIONS` says it for machines: store it with results.

NaN: an image without fixations, a density of zeros, a map that is constant (up to float32 rounding) where the score
divides by its spread, a map without positive part where the score takes it as a density. pysaliency gives 0 to constant
maps (CC, NSS) and takes an all-zero map as uniform (SIM), which beats many real maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ib_explain.checks import did_you_mean
from ib_explain.metrics.base import register_function
from ib_explain.metrics.ground_truth import centred_gaussian, check_listed, fixation_pixels
from ib_explain.metrics.values import evened, flat_heat, flat_values, is_constant, undefined_where

__all__ = [
    "CONVENTIONS",
    "auc",
    "auc_judd",
    "auc_shuffled",
    "cc",
    "information_gain",
    "kld",
    "nss",
    "sim",
]

EPSILON = 2.2204e-16
"""The benchmark's guard against log 0, in `kld` and `information_gain`."""

CONVENTIONS: dict[str, dict[str, str | float]] = {
    "cc": {"truth": "density", "signed maps": "positive part", "constant map": "nan"},
    "sim": {"truth": "density", "signed maps": "positive part", "normalised by": "sum", "all-zero map": "nan"},
    "kld": {
        "truth": "density",
        "signed maps": "positive part",
        "normalised by": "sum",
        "direction": "truth to map",
        "unit": "nats",
        "epsilon": EPSILON,
        "all-zero map": "nan",
    },
    "nss": {"truth": "points", "signed maps": "as they are", "std": "population", "constant map": "nan"},
    "auc": {
        "truth": "points",
        "signed maps": "as they are",
        "negatives": "all pixels",
        "repeated fixations": "each counts",
        "ties": "half",
        "constant map": 0.5,
    },
    "auc_judd": {
        "truth": "points",
        "signed maps": "as they are",
        "negatives": "all pixels without fixation",
        "repeated fixations": "count once",
        "thresholds": "values at fixations, linear in between",
        "jitter": "none",
        "constant map": 0.5,
    },
    "auc_shuffled": {
        "truth": "points",
        "signed maps": "as they are",
        "negatives": "fixations of other images, repeated ones kept",
        "repeated fixations": "each counts",
        "ties": "half",
        "constant map": 0.5,
    },
    "information_gain": {
        "truth": "points",
        "signed maps": "positive part",
        "normalised by": "sum",
        "unit": "bits per fixation",
        "epsilon": EPSILON,
        "all-zero map": "nan",
        "default baseline": "centred Gaussian, sigma 0.2 of each side",
    },
}
"""How each score treats what papers treat differently; plain strings and numbers, ready for JSON."""


def cc(maps: Tensor, density: Tensor) -> Tensor:
    """Pearson correlation of map and fixation density over pixels, in [-1, 1].

    The map's positive part counts. For the correlation of signed values, shift them first:
    `cc(maps - maps.amin(dim=(-2, -1), keepdim=True), density)`.
    """
    heat, truth = flat_heat(maps), _flat_density(density, maps)
    heat_around, truth_around = _centred(heat), _centred(truth)
    scale = heat_around.norm(dim=1) * truth_around.norm(dim=1)
    score = ((heat_around * truth_around).sum(dim=1) / scale).clamp(-1, 1)
    return undefined_where(is_constant(heat) | is_constant(truth), score)


def sim(maps: Tensor, density: Tensor) -> Tensor:
    """Histogram intersection of map and fixation density, each divided by its sum: 0 apart, 1 equal.

    As in pysaliency; the Matlab code stretches both to [0, 1] before it divides by the sum, another number.
    """
    heat, truth = flat_heat(maps), _flat_density(density, maps)
    score = torch.minimum(_normalised(heat), _normalised(truth)).sum(dim=1)
    return undefined_where(_empty(heat) | _empty(truth), score)


def kld(maps: Tensor, density: Tensor, *, epsilon: float = EPSILON) -> Tensor:
    """Kullback-Leibler divergence from the fixation density g to the map s, in nats: sum g log(eps + g / (s + eps)).

    0 if equal, unbounded: a zero of the map where people looked costs about 36 nats times the density there, so epsilon
    decides between maps with exact zeros. The benchmark's variant (`MIT_KLDiv` of pysaliency); pysaliency's own default
    adds 1e-20 to both maps instead.

    Args:
        maps: (B, 1, H, W) or (B, H, W), the prediction; its positive part divided by its sum.
        density: (B, 1, H, W) or (B, H, W), the truth, whose mass weighs the sum.
        epsilon: > 0.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    heat, truth = flat_heat(maps), _flat_density(density, maps)
    predicted, expected = _normalised(heat), _normalised(truth)
    score = (expected * (epsilon + expected / (predicted + epsilon)).log()).sum(dim=1)
    return undefined_where(_empty(heat) | _empty(truth), score)


def nss(maps: Tensor, fixations: Sequence[Tensor]) -> Tensor:
    """Normalised scanpath saliency: mean value at the fixations, in standard deviations from the map's mean.

    Chance is 0. Standard deviation over all pixels (divisor M, as in pysaliency; Matlab divides by M - 1).
    """
    values = flat_values(maps)
    at, valid = _at_fixations(values, maps, fixations)
    around = at - values.mean(dim=1, keepdim=True)
    score = _mean(around, valid) / values.std(dim=1, correction=0)
    return undefined_where(is_constant(values), score)


def auc(maps: Tensor, fixations: Sequence[Tensor]) -> Tensor:
    """Probability that the map is higher at a fixation than at a pixel drawn from the whole image, ties one half.

    Exact, the "uniform" AUC of the benchmark: all pixels are negatives, the fixated ones too, so the maximum is below
    1. Unchanged by any strictly monotone change of the map. Chance and constant maps 0.5.
    """
    values = evened(flat_values(maps))
    at, valid = _at_fixations(values, maps, fixations)
    everywhere = values.new_full((len(values), 1), values.shape[1])
    return _mean(_wins(at, values, everywhere), valid).float()


def auc_shuffled(maps: Tensor, fixations: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """AUC with the fixations of other images as negatives: a centre prior gets about 0.5.

    As in the benchmark: exact, with all of the others' fixations and repeated ones kept. (The Matlab code draws 100
    random subsets from ten images and steps its thresholds by 0.1.) It punishes a true bias to the centre.

    Args:
        maps: (B, 1, H, W) or (B, H, W).
        fixations: B tensors (n_i, 2) of (x, y).
        other: B tensors (m_i, 2), the negatives in the coordinates of each image: `ground_truth.other_fixations` makes
            them from all fixations of a data set.
    """
    values = evened(flat_values(maps))
    at, valid = _at_fixations(values, maps, fixations)
    check_listed(other, "other")
    if len(other) != len(values):
        raise ValueError(f"other must hold one tensor for each of the {len(values)} maps, got {len(other)}")
    wins = []
    for i, row in enumerate(values):  # one by one: the others of a data set are many, and the same for most images
        negatives, are_there = _at_fixations(row[None], maps[i : i + 1], [other[i]], "other")
        wins.append(_wins(at[i : i + 1], negatives, are_there.sum(dim=1, keepdim=True)))
    return _mean(torch.cat(wins), valid).float()


def auc_judd(maps: Tensor, fixations: Sequence[Tensor]) -> Tensor:
    """Area under the ROC curve of the older benchmark, AUC-Judd.

    Negatives are the pixels without fixation, thresholds only the values at fixations, and the curve is linear between
    them and the end points: with few fixations it lies above the exact probability. Repeated fixations count once.
    Equal values are taken together; the Matlab code and pysaliency break them by noise of 1e-7 instead, and agree
    where no fixated value occurs twice. NaN also where every pixel is fixated.
    """
    values = evened(flat_values(maps))
    index, valid = _pixels(values, maps, fixations)
    index = index.masked_fill(~valid, values.shape[1]).sort(dim=1).values  # padding last
    fresh = torch.ones_like(valid)
    fresh[:, 1:] = index[:, 1:] != index[:, :-1]
    fresh &= index < values.shape[1]
    fixated = values.gather(1, index.clamp_max(values.shape[1] - 1)).masked_fill(~fresh, -torch.inf)
    # A last threshold below all values closes the curve at (1, 1); padding does the same once more, without area.
    thresholds = torch.nn.functional.pad(fixated.sort(dim=1, descending=True).values, (0, 1), value=-torch.inf)

    count = fresh.sum(dim=1, keepdim=True)
    above = torch.searchsorted(-values.sort(dim=1, descending=True).values, -thresholds, right=True)
    hits = torch.searchsorted(-thresholds, -thresholds, right=True).minimum(count)
    hit_rate = torch.nn.functional.pad(hits / count.double(), (1, 0))
    false_rate = torch.nn.functional.pad((above - hits) / (values.shape[1] - count).double(), (1, 0))
    return torch.trapezoid(hit_rate, false_rate, dim=1).float()


def information_gain(
    maps: Tensor, fixations: Sequence[Tensor], baseline: Tensor | Literal["centre", "uniform"] = "centre"
) -> Tensor:
    """Mean over fixations of log2 map - log2 baseline, both as densities, in bits per fixation; 0 is no gain.

    Kuemmerer, Wallis, Bethge, PNAS 2015 (doi 10.1073/pnas.1510393112). Meant for densities: an attribution map is made
    one by its positive part and its sum alone, and one zero at a fixation costs about 50 bits / n (epsilon 2.2204e-16
    inside both logarithms). pysaliency takes log densities and adds no epsilon.

    Args:
        maps: (B, 1, H, W) or (B, H, W).
        fixations: B tensors (n_i, 2) of (x, y).
        baseline: density of any scale, (B, 1, H, W) or (1, 1, H, W) or without the second axis; "centre" for the
            centred Gaussian with sigma 0.2 of each side, "uniform" for equal weights.
    """
    heat = flat_heat(maps)
    if isinstance(baseline, str):
        if baseline not in ("centre", "uniform"):
            hint = did_you_mean(baseline, ("centre", "uniform"))
            raise ValueError(f"baseline must be a density, 'centre' or 'uniform', got {baseline!r}{hint}")
        prior = centred_gaussian(_size(maps), device=heat.device)
        baseline = prior if baseline == "centre" else torch.ones_like(prior)
    reference = _flat_density(baseline, maps, name="baseline", may_share=True)
    gain = (_normalised(heat) + EPSILON).log2() - (_normalised(reference) + EPSILON).log2()
    at, valid = _at_fixations(gain, maps, fixations)
    return undefined_where(_empty(heat) | _empty(reference), _mean(at, valid))


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _flat_density(density: Tensor, maps: Tensor, *, name: str = "density", may_share: bool = False) -> Tensor:
    """A truth's density checked against the maps, (B, N) float64 on their device (B = 1 if it may be shared)."""
    truth = flat_values(density, name=name)
    if _size(density) != _size(maps):
        raise ValueError(f"{name} must have the maps' size {_size(maps)}, got {_size(density)}; resize the maps to it")
    if len(density) != len(maps) and not (may_share and len(density) == 1):
        raise ValueError(f"{name} must hold one density for each of the {len(maps)} maps, got {len(density)}")
    if (truth < 0).any():
        raise ValueError(f"{name} must be >= 0 everywhere, got a minimum of {truth.min().item():g}")
    return truth.to(maps.device)


def _at_fixations(
    values: Tensor, maps: Tensor, fixations: Sequence[Tensor], name: str = "fixations"
) -> tuple[Tensor, Tensor]:
    """Values (B, N) at each fixation's pixel, (B, n), and which of them are no padding, (B, n) bool."""
    index, valid = _pixels(values, maps, fixations, name)
    return values.gather(1, index), valid


def _pixels(
    values: Tensor, maps: Tensor, fixations: Sequence[Tensor], name: str = "fixations"
) -> tuple[Tensor, Tensor]:
    """Index of each fixation's pixel among the N of a row of `values`, (B, n), and which are no padding, (B, n)."""
    check_listed(fixations, name)
    if len(fixations) != len(values):
        raise ValueError(f"{name} must hold one tensor for each of the {len(values)} maps, got {len(fixations)}")
    index, valid = fixation_pixels(fixations, _size(maps))
    return index.to(values.device), valid.to(values.device)


def _wins(at: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
    """Share of each image's `count` negatives (B, m) that a value (B, n) beats, ties one half: (B, n)."""
    ranked = negatives.sort(dim=1).values
    lower = torch.searchsorted(ranked, at)
    not_higher = torch.searchsorted(ranked, at, right=True)
    return (lower + not_higher) / (2.0 * count)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid places of each row, NaN if there is none."""
    return values.where(valid, 0.0).sum(dim=1) / valid.sum(dim=1)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=1, keepdim=True)


def _normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(dim=1, keepdim=True)


def _empty(mass: Tensor) -> Tensor:
    return mass.sum(dim=1) == 0


for _score, _unit, _truth in (
    (cc, "correlation", ("density",)),
    (sim, "shared mass", ("density",)),
    (kld, "nats", ("density",)),
    (nss, "standard deviations", ("fixations",)),
    (auc, "probability", ("fixations",)),
    (auc_judd, "area", ("fixations",)),
    (auc_shuffled, "probability", ("fixations", "other")),
    (information_gain, "bits per fixation", ("fixations", "baseline")),
):
    register_function(_score, family="human", unit=_unit, needs=("maps", *_truth), higher_is_better=_score is not kld)
