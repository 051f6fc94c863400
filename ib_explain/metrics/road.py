"""ROAD (remove and debias): removed pixels are imputed from their neighbours, so that a hole does not show.

Rong et al. 2022 (arXiv 2202.00449). The imputation is in `ib_explain.metrics.imputation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ib_explain.checks import check_shares
from ib_explain.metrics.base import Case, Curve, register_metric
from ib_explain.metrics.imputation import Imputer
from ib_explain.metrics.perturbation import most_relevant_first
from ib_explain.metrics.probe import Probe
from ib_explain.perturb import pixel_ranks, tied_share
from ib_explain.targets import Target

__all__ = ["ROAD_FRACTIONS", "road", "road_combined"]

ROAD_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def road(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    order: str = "morf",
    fractions: Sequence[float] = ROAD_FRACTIONS,
    noise: float = 0.01,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> Curve:
    """Score while the most ("morf") or least ("lerf") relevant pixels are imputed from those that are left.

    Rong et al. 2022 (arXiv 2202.00449), noisy linear imputation. Exactly the given share of pixels is removed, by rank
    with ties by pixel index; thresholding the map, as released code does, removes whole plateaus at once.

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        maps: (B, 1, H, W) or (B, H, W).
        target: the explained classes; None is the host's top-1.
        order: "morf" (lower scores are better) or "lerf" (higher are better).
        fractions: rising shares of pixels to remove, in (0, 1).
        noise: standard deviation of what is added to imputed pixels, in normalised units.
        score: "probability" or "logit" of the target. The paper reports accuracy over a data set instead.
        seed: of the noise, which is one field for all images and shares.
        batch_size: imputed images in one forward pass, see `Probe`; images that are imputed together stop together, so
            that scores move within the solver's tolerance, far below the noise.

    Returns:
        Curve; fractions start with 0 (the intact image), auc is the mean score over the given shares, without the
        intact image.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    return _road(probe, maps, order, check_shares(fractions, "fractions"), noise, score, seed)


def road_combined(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    fractions: Sequence[float] = ROAD_FRACTIONS,
    noise: float = 0.01,
    score: str = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Half the mean difference between the LeRF and the MoRF scores of `road`, (B,) in [-1/2, 1/2]. Higher is better.

    The `ROADCombined` of pytorch-grad-cam, with ranks in place of thresholds. Arguments are those of `road`.
    """
    probe, shares = Probe(model, x, target, batch_size=batch_size), check_shares(fractions, "fractions")
    lerf, morf = (_road(probe, maps, order, shares, noise, score, seed) for order in ("lerf", "morf"))
    return (lerf.auc - morf.auc) / 2


def _road(
    probe: Probe, maps: Tensor, order: str, fractions: tuple[float, ...], noise: float, score: str, seed: int
) -> Curve:
    maps = probe.check_maps(maps)
    ranks = pixel_ranks(maps, descending=most_relevant_first(order))
    pixels, size = ranks.shape[1], probe.x.shape[2:]
    counts = [round(fraction * pixels) for fraction in fractions]
    if any(low >= high for low, high in zip([0, *counts], [*counts, pixels], strict=True)):
        raise ValueError(f"fractions must rise within (0, 1) and differ by a pixel or more, got {fractions}")
    limits = torch.tensor(counts, dtype=ranks.dtype, device=ranks.device)

    impute = Imputer(noise, seed)

    def perturb(image: Tensor, setting: Tensor) -> Tensor:
        removed = (ranks[image] < limits[setting, None]).view(-1, *size)
        return impute(probe.x[image], removed)

    scores = probe.scores(len(counts), perturb, score)
    shares = torch.tensor([0, *counts], device=ranks.device) / pixels
    return Curve(shares, torch.cat([probe.intact(score)[:, None], scores], dim=1), scores.mean(1), tied_share(maps))


@register_metric("road", family="perturbation", unit="probability", higher_is_better=True)
def _road_score(case: Case) -> Tensor:
    """ROAD: half the gap between imputing the least and the most relevant pixels first, mean of 10 to 90 %."""
    settings = {"fractions": ROAD_FRACTIONS, "noise": 0.01, "score": "probability", "seed": case.seed}
    lerf, morf = (case.once(_road, order=order, **settings) for order in ("lerf", "morf"))
    return (lerf.auc - morf.auc) / 2
