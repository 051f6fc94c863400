"""Faithfulness as a correlation of the map's values with what the host's score does: ic, dc, sensitivity-n.

Arguments that all share, and errors, are those of `insertion`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.checks import check_positive_int, check_shares
from ib_explain.metrics.base import Case, Curve, register_metric
from ib_explain.metrics.perturbation import deletion_curve, insertion_curve, ranked_curve, rounding_error
from ib_explain.metrics.probe import Probe
from ib_explain.metrics.values import is_constant
from ib_explain.perturb import tied_share
from ib_explain.randomness import generator_of
from ib_explain.targets import Target

__all__ = ["SENSITIVITY_FRACTIONS", "dc", "ic", "sensitivity_n"]

SENSITIVITY_FRACTIONS = tuple(0.01 * 80 ** (k / 15) for k in range(16))
"""16 values, log-spaced from 1 to 80 % of the pixels, as in the released evaluation of IBA."""
_SETS_AT_ONCE = 100  # that a map is summed over: bounds the memory


def ic(
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
) -> Tensor:
    """Insertion correlation: does the score rise in proportion to the map? Higher is better.

    Pearson correlation, over the steps of `insertion`, of the rise of the score with the mean of the map over the
    pixels inserted in that step (Gomez et al. 2022, arXiv 2201.13291). Unlike the area it sees the map's values, not
    only their order. The published code inserts cells of the coarse map; steps here, and arguments, are those of
    `insertion`.

    Returns:
        (B,) float32 in [-1, 1]; NaN for a constant map, a constant score or a single step.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    curve = ranked_curve(probe, maps, fill, steps, pixels_per_step, score, seed, insert=True)
    return _calibration(curve, probe.check_maps(maps))


def dc(
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
) -> Tensor:
    """Deletion correlation: does the score fall in proportion to the map? Higher is better.

    As `ic`, for the fall of the score over the steps of `deletion` (Gomez et al. 2022, arXiv 2201.13291). Arguments are
    those of `insertion`.

    Returns:
        (B,) float32 in [-1, 1]; NaN for a constant map, a constant score or a single step.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    curve = ranked_curve(probe, maps, fill, steps, pixels_per_step, score, seed, insert=False)
    return -_calibration(curve, probe.check_maps(maps))


def sensitivity_n(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    fractions: Sequence[float] = SENSITIVITY_FRACTIONS,
    sets: int = 100,
    fill: str | Tensor = "zero",
    score: str = "logit",
    seed: int = 0,
    batch_size: int | None = None,
) -> Curve:
    """Correlation of what random sets of n pixels add up to with what their removal costs. Higher is better.

    Sensitivity-n (Ancona et al. 2018, arXiv 1711.06104, sec. 4): Pearson correlation, over `sets` random sets, of the
    map summed over the set with the fall of the target's logit when the set is set to 0. Computed for each image and
    then averaged; the released evaluation of IBA pools all images, which lets differences between images count.
    Arguments that are not listed are those of `insertion`.

    Args:
        fractions: n as shares of the pixels, in (0, 1).
        sets: random sets for each n, the same for all images.

    Returns:
        Curve; fractions are n / (H*W), scores the correlations (B, N) in [-1, 1], auc their mean over n. NaN for a
        constant map or score; an n whose correlation is undefined is left out of the mean.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return _sensitivity(probe, maps, check_shares(fractions, "fractions"), sets, fill, score, seed)


def _calibration(curve: Curve, maps: Tensor) -> Tensor:
    """Correlation of the change of the score at each step with the mean of the map over that step's pixels."""
    counts = (curve.fractions.double() * maps[0].numel()).round().long()
    ordered = _above_minimum(maps).sort(dim=1, descending=True).values.double()
    total = F.pad(ordered.cumsum(1), (1, 0))[:, counts]  # [B, S+1]
    return _pearson(curve.scores.diff(dim=1), total.diff(dim=1) / counts.diff(), rounding_error(curve.scores))


def _sensitivity(
    probe: Probe,
    maps: Tensor,
    fractions: tuple[float, ...] = SENSITIVITY_FRACTIONS,
    sets: int = 100,
    fill: str | Tensor = "zero",
    score: str = "logit",
    seed: int = 0,
) -> Curve:
    maps = probe.check_maps(maps)
    sets = check_positive_int(sets, "sets")
    above = _above_minimum(maps)
    pixels = above.shape[1]
    sizes = tuple(max(1, round(fraction * pixels)) for fraction in fractions)

    def asked() -> Tensor:
        return _score_sets(probe, sizes, sets, fill, score, seed)

    # The sets are the same for every map, and asking the host about them is all that takes time.
    scores = probe.keep((_score_sets, sizes, sets, fill, score, seed), asked) if isinstance(fill, str) else asked()
    sums = _sum_over_sets(above, sizes, sets, seed)
    drops = (probe.intact(score)[:, None] - scores).unflatten(1, (len(sizes), sets))
    rounding = rounding_error(torch.cat([scores, probe.intact(score)[:, None]], dim=1))
    correlations = _pearson(drops, sums, rounding[:, None])  # [B, N]
    shares = torch.tensor(sizes, device=above.device) / pixels
    return Curve(shares, correlations, correlations.nanmean(1), tied_share(maps))


def _score_sets(probe: Probe, sizes: tuple[int, ...], sets: int, fill: str | Tensor, score: str, seed: int) -> Tensor:
    """Scores of the images without each random set, by size: (B, len(sizes) * sets)."""
    filled, _ = probe.filled(fill, score, seed=seed)
    size = probe.x.shape[2:]

    def perturb(image: Tensor, setting: Tensor) -> Tensor:
        first, last = int(setting[0]), int(setting[-1])
        drawn = [_draw_set(size.numel(), sizes[s // sets], s, seed) for s in range(first, last + 1)]
        removed = torch.stack(drawn).to(filled.device)[setting - first]  # [b, H*W]
        return torch.where(removed.view(-1, 1, *size), filled[image], probe.x[image])

    return probe.scores(len(sizes) * sets, perturb, score)


def _draw_set(pixels: int, size: int, setting: int, seed: int) -> Tensor:
    """`size` random pixels, (pixels,) bool. Seeded by its number: it does not depend on how sets share a pass."""
    order = torch.randperm(pixels, generator=generator_of(seed * 1_000_003 + setting), device="cpu")
    return torch.zeros(pixels, dtype=torch.bool, device="cpu").index_fill_(0, order[:size], True)


def _sum_over_sets(values: Tensor, sizes: tuple[int, ...], sets: int, seed: int) -> Tensor:
    """Sums of (B, H*W) values over the sets that `_score_sets` takes away: (B, len(sizes), sets)."""
    sums = []
    for settings in torch.arange(len(sizes) * sets, device="cpu").split(_SETS_AT_ONCE):
        drawn = [_draw_set(values.shape[1], sizes[s // sets], s, seed) for s in settings.tolist()]
        sums.append(values.double() @ torch.stack(drawn).to(values.device, torch.float64).T)
    return torch.cat(sums, dim=1).unflatten(1, (len(sizes), sets))


def _pearson(changes: Tensor, values: Tensor, rounding: Tensor) -> Tensor:
    """Pearson correlation over the last axis, float32; NaN where one side is constant.

    Changes of a score count as constant up to `rounding`, the size of their own rounding error: otherwise a score
    that falls by the same amount at each step would correlate with noise.
    """
    changes, values = (v.double() - v.double().mean(-1, keepdim=True) for v in (changes, values))
    defined = (changes.abs().amax(-1) > rounding) & (values.abs().amax(-1) > 0)
    correlation = (changes * values).sum(-1) / (changes.norm(dim=-1) * values.norm(dim=-1))
    return torch.where(defined, correlation.clamp(-1, 1), torch.nan).float()


def _above_minimum(maps: Tensor) -> Tensor:
    """Maps less their minimum, (B, H*W): the same correlations, but exactly 0 for a constant map."""
    values = maps.flatten(1)
    return (values - values.amin(1, keepdim=True)).masked_fill(is_constant(values)[:, None], 0)


@register_metric("ic", family="perturbation", unit="correlation", higher_is_better=True)
def _ic_score(case: Case) -> Tensor:
    """Insertion correlation: the rise of the score at each insertion step against the map's values."""
    return _calibration(insertion_curve(case), case.probe.check_maps(case.maps))


@register_metric("dc", family="perturbation", unit="correlation", higher_is_better=True)
def _dc_score(case: Case) -> Tensor:
    """Deletion correlation: the fall of the score at each deletion step against the map's values."""
    return -_calibration(deletion_curve(case), case.probe.check_maps(case.maps))


@register_metric("sensitivity_n", family="perturbation", unit="correlation", higher_is_better=True)
def _sensitivity_score(case: Case) -> Tensor:
    """Sensitivity-n: correlation of the map's sum over random pixel sets with the logit lost by their removal."""
    return case.once(_sensitivity, seed=case.seed).auc
