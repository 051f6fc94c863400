"""Faithfulness by taking an image apart in the order of the map: insertion, deletion, degradation.

The host's score of the target class is read while pixels are replaced. Arguments that all functions share are told in
`insertion`. They raise a ValueError or TypeError for maps with NaN or of another size than x, and for unknown names; a
constant map is valid, all its pixels are tied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.checks import check_positive_int, did_you_mean
from ib_explain.metrics.base import Case, Curve, register_metric
from ib_explain.metrics.probe import Probe
from ib_explain.perturb import pixel_ranks, step_counts, tied_share
from ib_explain.targets import Target

__all__ = ["degradation", "degradation_area", "deletion", "insertion", "insertion_deletion"]


def insertion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    fill: str | Tensor = "blur",
    steps: int | None = None,
    pixels_per_step: int | None = None,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> Curve:
    """Score while the blurred image becomes the intact one, most relevant pixels first. Higher is better.

    RISE's protocol (Petsiuk et al. 2018, arXiv 1806.07421, sec. 4.3 and the released `evaluation.py`): its near-box
    blur, both end points scored, softmax probability of the class that is top-1 on the intact image. Their sort is
    unstable; here ties go by pixel index.

    Args:
        model: the host, (B, C, H, W) -> (B, K) logits.
        x: images (B, C, H, W), normalised.
        maps: (B, 1, H, W) or (B, H, W).
        target: the explained classes (an int, a list, a tensor (B,)); None is the host's top-1 on the intact images.
        fill: what the image begins as: "blur" (RISE's), "gaussian" (a true Gaussian blur), "mean" (of each image and
            channel), "zero" (in normalised space: the mean colour), "noise", or a tensor that broadcasts to x.
        steps: number of equal steps, or
        pixels_per_step: pixels a step, the last one takes the rest. Neither given: 8 rows of pixels, which at
            224 x 224 are the 1792 pixels and 28 steps of the paper's averages (its single pictures use one row).
        score: "probability" (softmax) or "logit" of the target class.
        seed: of the fill "noise".
        batch_size: perturbed images in one forward pass; bounds the memory, changes no result. None is B, at least 32.

    Returns:
        Curve; fractions are the share of pixels inserted, auc is RISE's (sum - first/2 - last/2) / S.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return ranked_curve(probe, maps, fill, steps, pixels_per_step, score, seed, insert=True)


def deletion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    fill: str | Tensor = "zero",
    steps: int | None = None,
    pixels_per_step: int | None = None,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> Curve:
    """Score while the intact image is replaced, most relevant pixels first. Lower is better.

    RISE's protocol and arguments, as for `insertion`; `fill`, here what removed pixels become, is 0 in normalised space
    (the mean colour, not black).

    Returns:
        Curve; fractions are the share of pixels removed, auc is RISE's (sum - first/2 - last/2) / S.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return ranked_curve(probe, maps, fill, steps, pixels_per_step, score, seed, insert=False)


def insertion_deletion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    fill: str | Tensor = "zero",
    steps: int | None = None,
    pixels_per_step: int | None = None,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[Curve, Curve]:
    """Both curves with one fill, as `insertion` and `deletion` give them; their common end points are scored once.

    Arguments are those of `insertion`.

    Returns:
        The curve of insertion and that of deletion.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    inserted = ranked_curve(probe, maps, fill, steps, pixels_per_step, score, seed, insert=True)
    return inserted, ranked_curve(probe, maps, fill, steps, pixels_per_step, score, seed, insert=False)


def degradation(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    order: str = "morf",
    tile: int = 8,
    fill: str | Tensor = "mean",
    steps: int | None = None,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> Curve:
    """Score while tiles of the image are replaced, most ("morf") or least ("lerf") relevant tiles first.

    Schulz et al. 2020 (arXiv 2001.00396, sec. 4.3, after Ancona et al.): square tiles ranked by the mean of the map,
    replaced by the image's mean of each channel, about 100 points. Arguments that are not listed are those of
    `insertion`.

    Args:
        order: "morf" or "lerf".
        tile: side in pixels, 8 and 14 in the paper. Tiles at the right and lower edge are cut by the image.
        steps: equal steps in tiles; None is 100, or the number of tiles if there are fewer.

    Returns:
        Curve; fractions are the share of tiles replaced, scores are not normalised (see `degradation_area`), auc is
        the trapezoid over equal steps: lower is better for "morf", higher for "lerf".
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return _degradation(probe, maps, order, tile, fill, steps, score, seed)


def degradation_area(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    tile: int = 8,
    fill: str | Tensor = "mean",
    steps: int | None = None,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Area between the LeRF and the MoRF curve of `degradation`. Higher is better; 0 for a map without order.

    Both curves are normalised so that the intact image scores 1 and the fully degraded one 0 (Schulz et al. 2020,
    arXiv 2001.00396, sec. 4.3), here image by image, so that every image has its own score. Arguments are those of
    `degradation`.

    Returns:
        (B,) float32; NaN where the intact image does not score above the fully degraded one.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    morf, lerf = (_degradation(probe, maps, order, tile, fill, steps, score, seed) for order in ("morf", "lerf"))
    return _area_between(morf, lerf)


def ranked_curve(
    probe: Probe,
    maps: Tensor,
    fill: str | Tensor,
    steps: int | None = None,
    pixels_per_step: int | None = None,
    score: str = "probability",
    seed: int = 0,
    *,
    insert: bool,
) -> Curve:
    """`insertion` or `deletion` for images that a probe holds."""
    maps = probe.check_maps(maps)
    if steps is None and pixels_per_step is None:
        pixels_per_step = 8 * maps.shape[2]
    counts = step_counts(maps[0].numel(), steps=steps, per_step=pixels_per_step)
    intact = probe.x, probe.intact(score)
    filled = probe.filled(fill, score, seed=seed)
    ends = (filled, intact) if insert else (intact, filled)
    return _curve(probe, maps, pixel_ranks(maps), counts, *ends, score)


def _degradation(
    probe: Probe,
    maps: Tensor,
    order: str,
    tile: int,
    fill: str | Tensor = "mean",
    steps: int | None = None,
    score: str = "probability",
    seed: int = 0,
) -> Curve:
    maps = probe.check_maps(maps)
    descending = most_relevant_first(order)
    tile = check_positive_int(tile, "tile")
    # In float64, where sums of equal values round to nothing: float32 would order the tiles of a constant map.
    means = F.avg_pool2d(maps[:, None].double(), tile, ceil_mode=True, count_include_pad=False)[:, 0].float()
    tiles = means[0].numel()
    counts = step_counts(tiles, steps=min(100, tiles) if steps is None else steps)
    ranks = pixel_ranks(means, descending=descending).view_as(means)
    ranks = ranks.repeat_interleave(tile, 1).repeat_interleave(tile, 2)[:, : maps.shape[1], : maps.shape[2]].flatten(1)
    filled = probe.filled(fill, score, seed=seed)
    return _curve(probe, means, ranks, counts, (probe.x, probe.intact(score)), filled, score)


def _curve(
    probe: Probe,
    units: Tensor,
    ranks: Tensor,
    counts: Tensor,
    start: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
    score: str,
) -> Curve:
    """Go from the `start` to the `end` images; ranks (B, H*W) tell which pixels have changed at each count."""
    limits = counts[1:-1].to(ranks)
    size = probe.x.shape[2:]

    def perturb(image: Tensor, setting: Tensor) -> Tensor:
        changed = ranks.index_select(0, image) < limits[setting, None]  # [b, H*W]
        after, before = end[0].index_select(0, image), start[0].index_select(0, image)
        return torch.where(changed.view(-1, 1, *size), after, before)

    between = probe.scores(len(limits), perturb, score)
    scores = torch.cat([start[1][:, None], between, end[1][:, None]], dim=1)
    fractions = (counts / counts[-1]).to(scores)
    return Curve(fractions, scores, _equal_steps_area(scores), tied_share(units))


def _equal_steps_area(scores: Tensor) -> Tensor:
    """RISE's rule: trapezoids of equal width, also for a last step that is shorter."""
    return (scores.sum(1) - scores[:, 0] / 2 - scores[:, -1] / 2) / (scores.shape[1] - 1)


def _area_between(morf: Curve, lerf: Curve) -> Tensor:
    span = morf.scores[:, 0] - morf.scores[:, -1]
    return torch.where(span > rounding_error(morf.scores), (lerf.auc - morf.auc) / span, torch.nan)


def rounding_error(scores: Tensor) -> Tensor:
    """Size of the rounding errors in differences of an image's scores: (B, S) -> (B,)."""
    return 4 * torch.finfo(torch.float32).eps * scores.abs().amax(1)


def most_relevant_first(order: str) -> bool:
    """True for "morf", False for "lerf"; anything else is a ValueError."""
    if order not in ("morf", "lerf"):
        raise ValueError(f"unknown order {order!r}{did_you_mean(str(order), ('morf', 'lerf'))}")
    return order == "morf"


@register_metric("insertion", family="perturbation", unit="probability", higher_is_better=True)
def _insertion_score(case: Case) -> Tensor:
    """Area under RISE's insertion curve: blurred image to intact image, most relevant pixels first."""
    return insertion_curve(case).auc


@register_metric("deletion", family="perturbation", unit="probability", higher_is_better=False)
def _deletion_score(case: Case) -> Tensor:
    """Area under RISE's deletion curve: intact image to mean colour, most relevant pixels first."""
    return deletion_curve(case).auc


@register_metric("degradation_8", family="perturbation", unit="normalised probability", higher_is_better=True)
def _degradation_8(case: Case) -> Tensor:
    """Area between the LeRF and MoRF degradation curves on tiles of 8 x 8 pixels."""
    return _area_between(*(_degradation_curve(case, order, 8) for order in ("morf", "lerf")))


@register_metric("degradation_14", family="perturbation", unit="normalised probability", higher_is_better=True)
def _degradation_14(case: Case) -> Tensor:
    """Area between the LeRF and MoRF degradation curves on tiles of 14 x 14 pixels."""
    return _area_between(*(_degradation_curve(case, order, 14) for order in ("morf", "lerf")))


def insertion_curve(case: Case) -> Curve:
    """The curve of the registered insertion metrics, computed once for a case."""
    return case.once(ranked_curve, insert=True, fill="blur", seed=case.seed)


def deletion_curve(case: Case) -> Curve:
    """The curve of the registered deletion metrics, computed once for a case."""
    return case.once(ranked_curve, insert=False, fill="zero", seed=case.seed)


def _degradation_curve(case: Case, order: str, tile: int) -> Curve:
    return case.once(_degradation, order=order, tile=tile, seed=case.seed)
