"""Means, bootstrap intervals and ranks on arrays: no names, no files. `summary` gives them to methods and metrics."""

from __future__ import annotations

import numpy as np

__all__ = ["average_ranks", "mean_without_nan", "pairwise_ranks", "pareto_front", "percentile_interval"]
__all__ += ["resampled_means"]


def mean_without_nan(values: np.ndarray) -> np.ndarray:
    """Mean over axis 0 of what is not NaN; NaN where nothing is left. (N, ...) -> (...)."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    return np.where(known, values, 0.0).sum(axis=0) / np.where(counts > 0, counts, np.nan)


def resampled_means(values: np.ndarray, *, resamples: int | None = None, seed: int = 0) -> np.ndarray:
    """The means of bootstrap samples of images: (N, P) -> (R, P).

    Sample b draws N images i_1 ... i_N with replacement; its mean in column p is

        m_bp = sum_k v[i_k, p] k_p / sum_k k_p,   k_p = 1 where v[i_k, p] is not NaN, else 0

    (Efron & Tibshirani 1993, An Introduction to the Bootstrap, sec. 6.2). All columns share the samples, so that the
    difference of two columns is the difference of a pair. m_bp is NaN if a sample holds no known value of the column.

    Args:
        values: (N, P), one row an image, NaN where undefined.
        resamples: R; None is 10,000, less (at least 1,000) beyond 5,000 images, where that many draws take seconds.
        seed: of the draws; the same seed and N give the same samples.
    """
    images = values.shape[0]
    if resamples is None:
        resamples = max(1_000, min(10_000, 50_000_000 // max(images, 1)))
    generator = np.random.default_rng(seed % 2**63)
    known = ~np.isnan(values)
    means = mean_without_nan(values)
    # Around their mean, equal values resample to exactly their mean, and large offsets cost no digits.
    with np.errstate(invalid="ignore"):  # inf - inf: an infinite mean has no interval
        centred = np.where(known, values - means, 0.0)
    finite = np.where(np.isfinite(values), values, np.nan)
    low, high = (bound(finite, axis=0, initial=start) for bound, start in ((np.nanmin, np.inf), (np.nanmax, -np.inf)))
    rounding, bounded = 1e-12 * np.maximum(np.abs(low), np.abs(high)), (low <= high) & np.isfinite(means)
    step = max(1, 4_000_000 // max(images, 1))  # bounds the memory to some 100 MB
    parts = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, images, (size, images)) + images * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images).astype(np.float64)
        counts = np.full((size, 1), float(images)) if known.all() else weights @ known.astype(np.float64)
        with np.errstate(invalid="ignore"):
            drawn_means = means + (weights @ centred) / np.where(counts > 0, counts, np.nan)
            # A mean of zeros alone is zero, not 1e-17: signs are read from it. None lies outside of its values.
            drawn_means = np.where(np.abs(drawn_means) <= rounding, 0.0, drawn_means)
            parts.append(np.clip(drawn_means, low, high, out=drawn_means, where=bounded))
    return np.concatenate(parts)


def percentile_interval(resampled: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval: the (1 - c)/2 and (1 + c)/2 quantiles over axis 0. (R, ...) -> two of (...).

    Efron & Tibshirani 1993, sec. 13.3. NaN entries are left out; a column of NaN alone gives NaN. For few images it is
    a little short, by about sqrt((N - 1)/N), as it takes the sample's variance for the population's.
    """
    levels = [(1 - confidence) / 2, (1 + confidence) / 2]
    columns = resampled.reshape(resampled.shape[0], -1)
    bounds = np.quantile(columns, levels, axis=0)
    # nanquantile is slow: only for the few columns that need it. One with NaN alone stays NaN.
    for p in np.flatnonzero(np.isnan(bounds[0]) & ~np.isnan(columns).all(axis=0)):
        bounds[:, p] = np.nanquantile(columns[:, p], levels)
    low, high = bounds.reshape(2, *resampled.shape[1:])
    return low, high


def average_ranks(values: np.ndarray, *, higher_is_better: bool) -> np.ndarray:
    """Ranks along the last axis, 1 the best: 1 + number of better ones + half the number of equal others.

    NaN has no rank (NaN) and is not counted. Values that differ by rounding alone (1e-12 of the larger) are equal.
    """
    sign = -1.0 if higher_is_better else 1.0
    mine, other = sign * values[..., :, None], sign * values[..., None, :]
    with np.errstate(invalid="ignore"):  # inf - inf, settled by the == below
        equal = (mine == other) | (np.abs(mine - other) <= 1e-12 * np.maximum(np.abs(mine), np.abs(other)))
    equal &= np.isfinite(mine) & np.isfinite(other) | (mine == other)
    better = (other < mine) & ~equal
    ranks = 0.5 + better.sum(axis=-1) + 0.5 * equal.sum(axis=-1)  # each value equals itself: that half is the other 0.5
    return np.where(np.isnan(values), np.nan, ranks)


def pairwise_ranks(
    values: np.ndarray, *, higher_is_better: bool, resamples: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of columns that are not known on the same images: each pair is compared where both are.

    A column's rank is 1 + those that are better than it + half of those that are equal, or share no image with it. So
    none gains by having no value on hard images, and none changes by what happens to two others. With everything known
    these are the ranks of the means.

    Args:
        values: (N, M), one row an image, NaN where undefined.
        higher_is_better: direction.
        resamples, seed: as for `resampled_means`.

    Returns:
        (M,) ranks, NaN for a column without a value, and (R, M) ranks of the bootstrap samples.
    """
    sign = 1.0 if higher_is_better else -1.0
    there = np.flatnonzero((~np.isnan(values)).any(axis=0))
    first, second = np.triu_indices(len(there), 1)
    with np.errstate(invalid="ignore"):  # inf - inf: not to be compared
        leads = sign * (values[:, there[first]] - values[:, there[second]])
    rounding = 1e-12 * np.nanmax(np.abs(np.where(np.isfinite(values), values, np.nan)), initial=0.0)

    def ranked(means: np.ndarray) -> np.ndarray:
        """(R, pairs) mean leads to (R, M)."""
        won = np.where(means > rounding, 1.0, np.where(means < -rounding, 0.0, 0.5))  # NaN is 0.5
        ranks = np.full((len(means), values.shape[1]), np.nan)
        ranks[:, there] = 1.0
        for pair, (a, b) in enumerate(zip(there[first], there[second], strict=True)):
            ranks[:, a] += 1 - won[:, pair]
            ranks[:, b] += won[:, pair]
        return ranks

    samples = resampled_means(leads, resamples=resamples, seed=seed)
    return ranked(mean_without_nan(leads)[None])[0], ranked(samples)


def pareto_front(cost: np.ndarray, quality: np.ndarray, *, higher_is_better: bool) -> np.ndarray:
    """Which of M entries no other one dominates, i.e. none is as good in both and better in one. (M,), (M,) -> (M,).

    Cost is better low. An entry with NaN is never on the front.
    """
    quality = quality if higher_is_better else -quality
    no_worse = (cost[None, :] <= cost[:, None]) & (quality[None, :] >= quality[:, None])
    better = (cost[None, :] < cost[:, None]) | (quality[None, :] > quality[:, None])
    return ~(no_worse & better).any(axis=1) & ~np.isnan(cost) & ~np.isnan(quality)
