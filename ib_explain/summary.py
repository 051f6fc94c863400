"""From rows to findings: means with intervals, paired differences to a reference, ranks, curves, extreme images."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ib_explain.bootstrap import (
    average_ranks,
    mean_without_nan,
    pairwise_ranks,
    percentile_interval,
    resampled_means,
)
from ib_explain.checks import did_you_mean
from ib_explain.rows import CurveBatch, Row

__all__ = ["Cell", "CurveSummary", "Extreme", "Interval", "MeanRank", "MetricFacts", "Summary", "extremes", "summarise"]
__all__ += ["summarise_curves"]


COUNTED = ("perturbation", "localisation", "human")
"""Families that count in the mean rank: what they prefer is a better map. A constant map is the least sensitive one and
the most consistent, a sparse one may be wrong, and cost is a matter of its own."""


@dataclass(frozen=True)
class MetricFacts:
    """What a table must say about a metric besides its numbers."""

    name: str
    family: str
    """Such as "perturbation"; all are ranked, those of `COUNTED` count in the mean rank."""
    unit: str
    higher_is_better: bool
    protocol: str = ""
    """One line: how it is measured, by whose rule."""
    derived: bool = False
    """Another metric's score by another scale: it does not count in the mean rank a second time."""

    @property
    def counts(self) -> bool:
        """Whether it counts in the mean rank, where any metric of a run does."""
        return self.family in COUNTED and not self.derived

    @property
    def arrow(self) -> str:
        """Where better is: up or down."""
        return "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it; NaN bounds where fewer than two images are known, and for a cost."""

    mean: float
    low: float
    high: float
    n: int
    """Images behind it."""


@dataclass(frozen=True)
class Cell(Interval):
    """One method under one metric."""

    status: str = "ok"
    """"ok" if any image has a value, else "failed", "not_applicable", "undefined" (NaN on all images) or "missing"."""
    undefined: int = 0
    """Images on which the metric is undefined."""
    failed: int = 0
    """Images of batches on which the method failed."""
    reason: str = ""
    """Why it failed on all or some images, or else does not apply to them; of several reasons the commonest."""
    left_out: int = 0
    """Images of batches to which the method does not apply, where others have a value."""


@dataclass(frozen=True)
class MeanRank:
    """A method's rank, averaged over metrics."""

    mean: float
    low: float
    high: float
    metrics: int
    """Metrics it has a rank in."""


@dataclass(frozen=True)
class Summary:
    """All that the tables and the report show. Dictionaries are keyed by (method, metric) names."""

    methods: tuple[str, ...]
    """By mean rank; methods that lack a rank in some metric that counts come after those that have all."""
    metrics: tuple[MetricFacts, ...]
    images: int
    reference: str | None
    confidence: float
    resamples: int
    seed: int
    cells: dict[tuple[str, str], Cell]
    differences: dict[tuple[str, str], Interval]
    """Method minus reference, over the images on which both are known; empty without a reference."""
    ranks: dict[tuple[str, str], Interval]
    """1 is the best; only cells with a value. Two methods are compared over the images on which both have one."""
    mean_ranks: dict[str, MeanRank]
    ranked_metrics: int
    """Metrics that count in the mean rank (`MetricFacts.counts`; all but costs where none does) and that at least two
    methods have."""

    @property
    def counts_some(self) -> bool:
        """Whether any metric is one of those that count; without one, the mean rank takes all but costs."""
        return any(facts.counts for facts in self.metrics)

    def best(self, metric: str) -> frozenset[str]:
        """The methods with the best rank, each compared with the others over common images; several if they tie."""
        ranks = {method: rank.mean for (method, name), rank in self.ranks.items() if name == metric}
        return frozenset(method for method, rank in ranks.items() if rank == min(ranks.values()))

    def facts(self, metric: str) -> MetricFacts:
        """The facts of one metric, by its name."""
        for facts in self.metrics:
            if facts.name == metric:
                return facts
        raise ValueError(f"unknown metric {metric!r}{did_you_mean(metric, [facts.name for facts in self.metrics])}")


@dataclass(frozen=True)
class CurveSummary:
    """The mean curve of one method with its pointwise interval; all arrays (S+1,)."""

    method: str
    metric: str
    fractions: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int


@dataclass(frozen=True)
class Extreme:
    """An image on which a method did very well or very badly."""

    method: str
    image: int
    name: str
    value: float


def summarise(
    rows: Iterable[Row],
    metrics: Sequence[MetricFacts],
    reference: str | None = None,
    *,
    methods: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Average rows over images.

    With v_i(m, k) the value of image i, N images, and bootstrap samples b of images shared by all methods and metrics
    (`bootstrap.resampled_means`), c the confidence and Q its percentile interval over b (`percentile_interval`):

        mean        mean_i v_i(m, k) over the n images where it is defined;    Q_b of the samples' means
        difference  mean_i (v_i(m, k) - v_i(ref, k)) over the images where both are;    Q_b of the same, so it is paired
        rank        1 + methods with a better mean + half of those with an equal one, each over the images on which both
                    are finite (`bootstrap.pairwise_ranks`);    Q_b of the samples' ranks
        mean rank   the mean of a method's ranks over the metrics that count;    Q_b of the samples' mean ranks

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sec. 6.2, 13.3.

    Args:
        rows: in any order.
        metrics: those to show, in this order.
        reference: the method that others are held against.
        methods: those to show; None is all that the rows name.
        confidence: between 0 and 1.
        seed: of the bootstrap.

    Raises:
        ValueError: no rows, a metric or method without rows, an unknown reference, the same cell of an image twice, a
            confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows to summarise")
    methods = list(dict.fromkeys(row.method for row in rows)) if methods is None else list(methods)
    names = [facts.name for facts in metrics]
    _check_names("metric", names, {row.metric for row in rows})
    _check_names("method", methods, {row.method for row in rows})
    if reference is not None:
        _check_names("reference method", [reference], methods)
    rows = [row for row in rows if row.method in set(methods) and row.metric in set(names)]
    values = _values(rows, methods, names)  # [N, M, K]
    images, shape = values.shape[0], values.shape[1:]

    sides = [values]
    if reference is not None:
        sides.append(values - values[:, [methods.index(reference)]])
    columns = np.concatenate([side.reshape(images, -1) for side in sides], axis=1)
    resampled = resampled_means(columns, seed=seed)
    parts = [part.reshape(-1, *shape) for part in np.split(resampled, len(sides), axis=1)]
    # The cost is that of the method, measured once and filed under some images: they are no sample.
    sampled = np.array([facts.family != "cost" for facts in metrics])
    intervals = [_intervals(side, part, confidence, sampled) for side, part in zip(sides, parts, strict=True)]

    def keyed(found: dict[tuple[int, int], Interval]) -> dict[tuple[str, str], Interval]:
        return {(methods[m], names[k]): interval for (m, k), interval in found.items()}

    ranks, rank_samples = np.empty(shape), np.empty(parts[0].shape)
    for k, facts in enumerate(metrics):
        better, column = facts.higher_is_better, values[:, :, k]
        known = np.isfinite(column)
        # Whether all methods that have any value have it on the same images: then means can be compared as they are.
        same_images = ((known | ~known.any(axis=0)) == known.any(axis=1)[:, None]).all()
        if same_images:
            ranks[:, k] = average_ranks(mean_without_nan(np.where(known, column, np.nan)), higher_is_better=better)
            rank_samples[:, :, k] = average_ranks(parts[0][:, :, k], higher_is_better=better)
        else:
            ranks[:, k], rank_samples[:, :, k] = pairwise_ranks(
                np.where(known, column, np.nan), higher_is_better=better, seed=seed
            )
    several = [k for k in range(len(metrics)) if (~np.isnan(ranks[:, k])).sum() > 1]
    counting = [k for k in several if metrics[k].counts] or [k for k in several if metrics[k].family != "cost"]
    mean_ranks = _mean_ranks(methods, ranks[:, counting], rank_samples[:, :, counting], confidence, images)
    low, high = percentile_interval(rank_samples, confidence)
    known = (~np.isnan(values)).sum(axis=0)
    low, high = (np.where((known > 1) & sampled, bound, np.nan) for bound in (low, high))
    pairs = [(m, k) for m in range(shape[0]) for k in range(shape[1])]

    def place(method: str) -> tuple[bool, float]:
        rank = mean_ranks[method]
        return rank.metrics < len(counting), rank.mean if rank.metrics else math.inf

    return Summary(
        methods=tuple(sorted(methods, key=place)),
        metrics=tuple(metrics),
        images=images,
        reference=reference,
        confidence=confidence,
        resamples=resampled.shape[0],
        seed=seed,
        cells=_cells(rows, keyed(intervals[0])),
        differences=keyed(intervals[1]) if reference is not None else {},
        ranks=keyed(
            {
                (m, k): Interval(ranks[m, k], low[m, k], high[m, k], int(known[m, k]))
                for m, k in pairs
                if not np.isnan(ranks[m, k])
            }
        ),
        mean_ranks=mean_ranks,
        ranked_metrics=len(counting),
    )


def summarise_curves(curves: Iterable[CurveBatch], *, confidence: float = 0.95, seed: int = 0) -> list[CurveSummary]:
    """Mean curves with pointwise bootstrap percentile intervals over images, NaN left out."""
    found = []
    for curve in curves:
        scores = curve.scores.astype(np.float64)
        low, high = percentile_interval(resampled_means(scores, seed=seed), confidence)
        mean = mean_without_nan(scores)
        found.append(CurveSummary(curve.method, curve.metric, curve.fractions, mean, low, high, len(scores)))
    return found


def extremes(
    rows: Iterable[Row], metric: MetricFacts, *, count: int = 3
) -> dict[str, tuple[list[Extreme], list[Extreme]]]:
    """Each method's best and worst images under one metric: {method: (best, worst)}, the most extreme first.

    Images without a value are left out, ties go to the lower index, and no image is in both lists.
    """
    sign = -1.0 if metric.higher_is_better else 1.0
    found: dict[str, list[Extreme]] = {}
    for row in rows:
        if row.metric == metric.name and not math.isnan(row.value):
            found.setdefault(row.method, []).append(Extreme(row.method, row.image, row.name, row.value))
    chosen = {}
    for method, cases in found.items():
        size = min(count, len(cases) // 2)
        best = sorted(cases, key=lambda case: (sign * case.value, case.image))[:size]
        rest = [case for case in cases if case not in best]
        chosen[method] = (best, sorted(rest, key=lambda case: (-sign * case.value, case.image))[:size])
    return chosen


def _check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"there are no rows of {kind} {name!r}{did_you_mean(name, known)}")


def _values(rows: Sequence[Row], methods: Sequence[str], metrics: Sequence[str]) -> np.ndarray:
    """(N, M, K) float64 in rising order of the image index, NaN where there is no value."""
    images = {image: i for i, image in enumerate(sorted({row.image for row in rows}))}
    method_at, metric_at = ({name: i for i, name in enumerate(names)} for names in (methods, metrics))
    values = np.full((len(images), len(methods), len(metrics)), np.nan)
    seen = np.zeros(values.shape, dtype=bool)
    for row in rows:
        place = images[row.image], method_at[row.method], metric_at[row.metric]
        if seen[place]:
            raise ValueError(f"image {row.image} has more than one row for {row.method!r}, {row.metric!r}")
        seen[place], values[place] = True, row.value
    return values


def _intervals(
    values: np.ndarray, resampled: np.ndarray, confidence: float, sampled: np.ndarray
) -> dict[tuple[int, int], Interval]:
    """(N, M, K) values and (R, M, K) means of their resamples to {(m, k): interval}; bounds for `sampled` k alone."""
    means, known = mean_without_nan(values), (~np.isnan(values)).sum(axis=0)
    low, high = percentile_interval(resampled, confidence)
    low, high = (np.where((known > 1) & sampled, bound, np.nan) for bound in (low, high))  # one knows no spread
    return {
        (m, k): Interval(float(means[m, k]), float(low[m, k]), float(high[m, k]), int(known[m, k]))
        for m, k in np.ndindex(means.shape)
    }


def _mean_ranks(
    methods: Sequence[str], ranks: np.ndarray, samples: np.ndarray, confidence: float, images: int
) -> dict[str, MeanRank]:
    """(M, K) ranks and (R, M, K) of the resamples to mean ranks."""
    means = mean_without_nan(ranks.T)
    low, high = percentile_interval(mean_without_nan(np.moveaxis(samples, 2, 0)), confidence)
    if images < 2:
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    counts = (~np.isnan(ranks)).sum(axis=1)
    columns = zip(methods, means, low, high, counts, strict=True)
    return {method: MeanRank(float(mean), float(a), float(b), int(n)) for method, mean, a, b, n in columns}


def _cells(rows: Sequence[Row], intervals: dict[tuple[str, str], Interval]) -> dict[tuple[str, str], Cell]:
    counts: dict[tuple[str, str], Counter[str]] = {key: Counter() for key in intervals}
    reasons: dict[tuple[str, str], dict[str, Counter[str]]] = {key: defaultdict(Counter) for key in intervals}
    for row in rows:
        key = row.method, row.metric
        counts[key]["undefined" if row.status == "ok" and math.isnan(row.value) else row.status] += 1
        if row.status != "ok":
            reasons[key][row.status][row.reason] += 1
    cells = {}
    for key, interval in intervals.items():
        count = counts[key]
        status = next((s for s in ("ok", "failed", "not_applicable", "undefined") if count[s]), "missing")
        given = reasons[key]["failed" if count["failed"] else "not_applicable"].most_common(1)
        reason = given[0][0] if given else ""
        means = interval.mean, interval.low, interval.high, interval.n
        left_out = count["not_applicable"] if status == "ok" else 0
        cells[key] = Cell(*means, status, count["undefined"], count["failed"], reason, left_out)
    return cells
