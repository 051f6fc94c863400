"""Statistics against closed forms, scipy and a literal resampling loop."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from ib_explain.bootstrap import average_ranks, pairwise_ranks, pareto_front, percentile_interval, resampled_means
from ib_explain.report import _finding
from ib_explain.rows import CurveBatch, Row
from ib_explain.summary import MetricFacts, extremes, summarise, summarise_curves

UP = MetricFacts("insertion", "perturbation", "probability", True)
DOWN = MetricFacts("deletion", "perturbation", "probability", False)
COST = MetricFacts("passes", "cost", "forward passes", False)


def rows_of(values: dict[tuple[str, str], np.ndarray]) -> list[Row]:
    return [
        Row(i, f"{i}.jpg", method, metric, float(value))
        for (method, metric), column in values.items()
        for i, value in enumerate(column)
    ]


# --- resampling ------------------------------------------------------------------------------------------------------


def test_interval_of_a_normal_sample_is_near_the_t_interval():
    sample = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = percentile_interval(resampled_means(sample[:, None]))
    expected = stats.t.interval(0.95, 399, loc=sample.mean(), scale=stats.sem(sample))
    width = expected[1] - expected[0]
    np.testing.assert_allclose([low[0], high[0]], expected, atol=0.03 * width)


def test_resampled_means_are_those_of_a_literal_loop():
    values = np.random.default_rng(2).normal(size=(7, 3))
    values[[1, 4], 1] = np.nan
    drawn = np.random.default_rng(5).integers(0, 7, (50, 7))
    expected = np.stack([np.nanmean(values[sample], axis=0) for sample in drawn])
    np.testing.assert_allclose(resampled_means(values, resamples=50, seed=5), expected, rtol=1e-12)


def test_interval_is_near_scipys():
    sample = np.random.default_rng(3).exponential(size=60)
    low, high = percentile_interval(resampled_means(sample[:, None], seed=1), 0.9)
    theirs = stats.bootstrap((sample,), np.mean, confidence_level=0.9, method="percentile", rng=2).confidence_interval
    np.testing.assert_allclose([low[0], high[0]], theirs, atol=0.02)


def test_resamples_grow_no_slower_than_they_must():
    assert [resampled_means(np.zeros((n, 1))).shape[0] for n in (1, 500, 20_000)] == [10_000, 10_000, 2_500]


def test_same_seed_same_numbers_other_seed_others():
    values = np.random.default_rng(0).normal(size=(20, 2))
    assert np.array_equal(resampled_means(values), resampled_means(values))
    assert not np.array_equal(resampled_means(values), resampled_means(values, seed=1))


def test_sample_without_a_known_value_is_nan_and_left_out_of_the_interval():
    values = np.array([[1.0], [np.nan], [np.nan]])
    means = resampled_means(values, resamples=200)
    assert np.isnan(means).any()
    assert np.array_equal(np.unique(means[~np.isnan(means)]), [1.0])
    assert percentile_interval(means) == (1.0, 1.0)
    assert np.isnan(percentile_interval(np.full((9, 1), np.nan))).all()


# --- ranks and fronts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("higher", [True, False])
def test_ranks_are_scipys_under_ties(higher):
    values = np.random.default_rng(4).integers(0, 4, (30, 6)).astype(float)
    expected = stats.rankdata(-values if higher else values, axis=1)
    np.testing.assert_array_equal(average_ranks(values, higher_is_better=higher), expected)


def test_ranks_of_special_values():
    values = np.array([0.1 + 0.2, np.nan, 0.3, np.inf, np.inf, -np.inf])
    assert average_ranks(values, higher_is_better=True).tolist()[2:] == [3.5, 1.5, 1.5, 5.0]
    assert np.isnan(average_ranks(values, higher_is_better=True)[1])
    assert average_ranks(values, higher_is_better=False)[0] == 2.5


@pytest.mark.parametrize("higher", [True, False])
def test_pareto_front_is_that_of_brute_force(higher):
    rng = np.random.default_rng(6)
    cost, quality = rng.integers(1, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    cost[3], quality[5] = np.nan, np.nan
    front = pareto_front(cost, quality, higher_is_better=higher)
    sign = 1 if higher else -1
    points = list(zip(cost, sign * quality, strict=True))
    for i, (c, q) in enumerate(points):
        beaten = any(oc <= c and oq >= q and (oc, oq) != (c, q) for oc, oq in points)
        assert front[i] == (not beaten and not math.isnan(c) and not math.isnan(q))
    assert front.any()


# --- summaries -------------------------------------------------------------------------------------------------------


def test_means_intervals_and_counts():
    sample = np.random.default_rng(7).normal(size=300)
    sample[:20] = np.nan
    summary = summarise(rows_of({("a", "insertion"): sample}), [UP])
    cell = summary.cells["a", "insertion"]
    assert (cell.n, cell.undefined, cell.failed, cell.status) == (280, 20, 0, "ok")
    assert cell.mean == pytest.approx(np.nanmean(sample), rel=1e-12)
    low, high = stats.t.interval(0.95, 279, loc=cell.mean, scale=stats.sem(sample[20:]))
    assert (cell.low, cell.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert summary.images == 300 and summary.resamples == 10_000


def test_difference_of_shifted_copies_has_no_width():
    sample = np.random.default_rng(8).normal(size=100)
    summary = summarise(rows_of({("ref", "insertion"): sample, ("a", "insertion"): sample + 0.25}), [UP], "ref")
    shift, own = summary.differences["a", "insertion"], summary.differences["ref", "insertion"]
    assert (shift.mean, shift.low, shift.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)
    assert (own.mean, own.low, own.high) == (0.0, 0.0, 0.0)
    assert summary.cells["a", "insertion"].high - summary.cells["a", "insertion"].low > 0.3


def test_difference_is_that_of_pairs():
    rng = np.random.default_rng(9)
    ref, noise = rng.normal(0, 5, 500), rng.normal(0.1, 0.2, 500)
    ref[:50] = np.nan
    other = ref + noise
    other[450:] = np.nan
    summary = summarise(rows_of({("ref", "insertion"): ref, ("a", "insertion"): other}), [UP], "ref")
    difference = summary.differences["a", "insertion"]
    assert difference.n == 400
    low, high = stats.t.interval(0.95, 399, loc=noise[50:450].mean(), scale=stats.sem(noise[50:450]))
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_ranks_follow_direction_and_ties():
    base = np.random.default_rng(10).normal(size=50)
    values = {
        (method, metric): base + shift
        for metric in ("insertion", "deletion")
        for method, shift in (("a", 0.0), ("b", 2.0), ("twin", 2.0), ("d", 1.0))
    }
    summary = summarise(rows_of(values), [UP, DOWN])
    ranks = {key: (rank.mean, rank.low, rank.high) for key, rank in summary.ranks.items()}
    for metric, order in (("insertion", [4, 1.5, 1.5, 3]), ("deletion", [1, 3.5, 3.5, 2])):
        for method, rank in zip(("a", "b", "twin", "d"), order, strict=True):
            assert ranks[method, metric] == (rank, rank, rank)  # shifted copies: the order is the same in each resample
    assert summary.best("insertion") == {"b", "twin"} and summary.best("deletion") == {"a"}
    assert {method: rank.mean for method, rank in summary.mean_ranks.items()} == {
        "a": 2.5,
        "b": 2.5,
        "twin": 2.5,
        "d": 2.5,
    }


def test_rank_uncertainty_of_two_equal_methods():
    """Two independent methods with the same mean in the sample: either wins half of the resamples."""
    rng = np.random.default_rng(11)
    one, two = (1 + sample - sample.mean() for sample in rng.normal(size=(2, 200)))
    summary = summarise(rows_of({("a", "insertion"): one, ("b", "insertion"): two}), [UP])
    assert (summary.ranks["a", "insertion"].low, summary.ranks["a", "insertion"].high) == (1.0, 2.0)
    mean = summary.mean_ranks["a"]
    assert (mean.mean, mean.low, mean.high, mean.metrics) == (1.5, 1.0, 2.0, 1)


def test_mean_rank_leaves_cost_and_lonely_metrics_out():
    lonely = MetricFacts("gaze", "human", "bits", True)
    values = {
        ("good", "insertion"): np.array([1.0, 1.1]),
        ("bad", "insertion"): np.array([0.0, 0.1]),
        ("good", "passes"): np.array([100.0, 100.0]),
        ("bad", "passes"): np.array([1.0, 1.0]),
        ("good", "gaze"): np.array([1.0, 1.0]),
    }
    summary = summarise(rows_of(values), [UP, COST, lonely])
    assert summary.ranks["good", "passes"].mean == 2.0
    assert summary.ranked_metrics == 1 and summary.mean_ranks["good"].mean == 1.0


def test_no_method_gains_by_failing():
    rows = rows_of(
        {(m, k): np.array([s, s + 0.1]) for m, s in (("b", 0.5), ("c", 0.1)) for k in ("insertion", "energy")}
    )
    rows += [Row(i, f"{i}.jpg", "a", "insertion", 0.9) for i in range(2)]
    rows += [Row(i, f"{i}.jpg", "a", "energy", status="not_applicable", reason="no layer") for i in range(2)]
    energy = MetricFacts("energy", "localisation", "share", True)
    summary = summarise(rows, [UP, energy])
    assert summary.mean_ranks["a"].mean == 1.0 and summary.mean_ranks["a"].metrics == 1
    assert summary.methods == ("b", "c", "a")
    cell = summary.cells["a", "energy"]
    assert (cell.status, cell.reason, cell.n) == ("not_applicable", "no layer", 0)
    assert math.isnan(cell.mean) and ("a", "energy") not in summary.ranks


def test_failed_batches_cost_their_images_only():
    rows = rows_of({("a", "insertion"): np.array([1.0, 2.0, 3.0])})
    rows += [Row(i, "x", "a", "insertion", status="failed", reason="out of memory") for i in (3, 4)]
    cell = summarise(rows, [UP]).cells["a", "insertion"]
    assert (cell.mean, cell.n, cell.failed, cell.reason, cell.status) == (2.0, 3, 2, "out of memory", "ok")
    cell = summarise(rows[3:], [UP]).cells["a", "insertion"]
    assert (cell.status, cell.n) == ("failed", 0)


def test_the_reason_that_is_told_is_of_the_status_that_is_told():
    rows = [Row(i, "x", "a", "insertion", status="not_applicable", reason="needs a square") for i in range(3)]
    cell = summarise(rows, [UP]).cells["a", "insertion"]
    assert (cell.status, cell.reason) == ("not_applicable", "needs a square")
    rows += [Row(3, "x", "a", "insertion", status="failed", reason="boom")]
    cell = summarise(rows, [UP]).cells["a", "insertion"]
    assert (cell.status, cell.failed, cell.reason) == ("failed", 1, "boom")
    rows += rows_of({("a", "insertion"): np.arange(5.0)})[4:]
    cell = summarise(rows, [UP]).cells["a", "insertion"]
    assert (cell.status, cell.failed, cell.left_out, cell.reason) == ("ok", 1, 3, "boom")


def test_a_method_is_not_ranked_better_than_its_twin_for_the_images_it_failed_on():
    easy, hard = np.array([0.9, 0.8]), np.array([0.2, 0.1])
    rows = rows_of({("same", "insertion"): np.concatenate([easy, hard]), ("low", "insertion"): np.full(4, 0.05)})
    rows += rows_of({("flaky", "insertion"): easy})
    rows += [Row(i, f"{i}.jpg", "flaky", "insertion", status="failed", reason="boom") for i in (2, 3)]
    summary = summarise(rows, [UP])
    assert summary.cells["flaky", "insertion"].mean > summary.cells["same", "insertion"].mean
    assert summary.ranks["flaky", "insertion"].mean == summary.ranks["same", "insertion"].mean == 1.5
    assert summary.best("insertion") == {"flaky", "same"}


def test_a_method_gains_nothing_by_abstaining_on_hard_images():
    honest = np.array([0.9, 0.8, 0.2, 0.1])
    abstains = np.array([0.9, 0.8, np.nan, np.nan])
    values = {("honest", "insertion"): honest, ("abstains", "insertion"): abstains, ("low", "insertion"): honest / 2}
    summary = summarise(rows_of(values), [UP])
    assert summary.cells["abstains", "insertion"].mean > summary.cells["honest", "insertion"].mean
    assert [summary.ranks[m, "insertion"].mean for m in ("honest", "abstains", "low")] == [1.5, 1.5, 3.0]


def test_what_happens_to_one_method_does_not_reorder_others():
    generator = np.random.default_rng(0)
    good, bad = generator.normal(0.6, 0.1, 40), generator.normal(0.4, 0.1, 40)
    good[:3], bad[:3] = 0.1, 0.9  # the images on which the flaky one has values
    flaky = np.where(np.arange(40) < 3, 0.5, np.nan)
    values = {("good", "insertion"): good, ("bad", "insertion"): bad, ("flaky", "insertion"): flaky}
    before = summarise(rows_of(dict(list(values.items())[:2])), [UP])
    after = summarise(rows_of(values), [UP])
    assert before.methods[:2] == ("good", "bad")
    assert after.methods.index("good") < after.methods.index("bad")
    # Against the flaky one each is compared on the three images, where the bad one is better and the good one worse.
    assert [after.ranks[m, "insertion"].mean for m in ("good", "bad", "flaky")] == [2.0, 2.0, 2.0]


def test_pairwise_ranks_of_complete_values_are_the_ranks_of_the_means():
    values = np.random.default_rng(0).normal(size=(30, 5))
    values[:, 3] = values[:, 1]
    ranks, samples = pairwise_ranks(values, higher_is_better=True, resamples=200, seed=3)
    np.testing.assert_array_equal(ranks, average_ranks(values.mean(axis=0), higher_is_better=True))
    means = resampled_means(values, resamples=200, seed=3)
    np.testing.assert_array_equal(samples, average_ranks(means, higher_is_better=True))
    values[:, 4] = np.nan
    assert np.isnan(pairwise_ranks(values, higher_is_better=False, resamples=10)[0]).tolist() == [False] * 4 + [True]


def test_only_families_that_prefer_better_maps_count_in_the_mean_rank():
    robust = MetricFacts("max_sensitivity", "robustness", "relative change", False)
    scaled = MetricFacts("insertion_relative", "perturbation", "times", True, derived=True)
    good, flat = np.array([0.9, 0.8, 0.7]), np.array([0.3, 0.2, 0.1])
    values = {("good", "insertion"): good, ("constant", "insertion"): flat}
    values |= {("good", "max_sensitivity"): good, ("constant", "max_sensitivity"): np.zeros(3)}
    values |= {("good", "insertion_relative"): flat, ("constant", "insertion_relative"): good}
    summary = summarise(rows_of(values), [robust, scaled, UP])
    assert summary.methods == ("good", "constant") and summary.ranked_metrics == 1
    assert summary.mean_ranks["good"].mean == 1.0 and summary.ranks["constant", "max_sensitivity"].mean == 1.0
    assert summarise(rows_of(values), [robust]).methods == ("constant", "good")  # where none counts, all do


def test_a_cost_is_no_sample_of_images():
    values = {("a", "passes"): np.full(8, 2.0), ("b", "passes"): np.full(8, 1.0)}
    summary = summarise(rows_of(values), [COST], "a")
    for found in (summary.cells["b", "passes"], summary.differences["b", "passes"], summary.ranks["b", "passes"]):
        assert math.isnan(found.low) and math.isnan(found.high)
    assert summary.differences["b", "passes"].mean == -1 and summary.ranks["b", "passes"].mean == 1


def test_undefined_everywhere_and_missing():
    rows = rows_of(
        {("a", "insertion"): np.full(3, np.nan), ("a", "deletion"): np.ones(3), ("b", "deletion"): np.ones(3)}
    )
    cells = summarise(rows, [UP, DOWN]).cells
    assert cells["a", "insertion"].status == "undefined" and cells["b", "insertion"].status == "missing"


def test_one_image_has_a_mean_but_no_interval():
    summary = summarise(rows_of({("a", "insertion"): np.array([0.5]), ("b", "insertion"): np.array([0.4])}), [UP])
    cell, rank = summary.cells["a", "insertion"], summary.mean_ranks["a"]
    assert cell.mean == 0.5 and math.isnan(cell.low) and math.isnan(cell.high)
    assert rank.mean == 1 and math.isnan(rank.low) and math.isnan(rank.high)
    assert _finding(summary) == (
        "Best mean rank over 1 metric: a, 1.00. From one image nothing can be said on how certain that is."
    )


def test_infinite_values_are_shown_not_hidden():
    summary = summarise(rows_of({("a", "insertion"): np.array([1.0, np.inf]), ("b", "insertion"): np.ones(2)}), [UP])
    assert summary.cells["a", "insertion"].mean == math.inf and math.isnan(summary.cells["a", "insertion"].low)
    assert summary.cells["b", "insertion"].low == 1.0


@pytest.mark.parametrize(("images", "hits"), [(10, 3), (14, 3), (100, 3), (200, 3), (300, 2)])
def test_a_difference_that_may_be_none_at_all_is_open(images, hits):
    """A bootstrap sample without any of the few hits has the mean 0, not 1e-17: by its sign the gain would be sure."""
    pointing = MetricFacts("pointing_game", "localisation", "hits", True)
    rows = [
        Row(i, f"{i}", method, pointing.name, float(method == "a" and i < hits))
        for i in range(images)
        for method in "ab"
    ]
    found = summarise(rows, [pointing], "b")
    assert (1 - hits / images) ** images > 0.025
    assert found.differences["a", pointing.name].low == 0
    assert found.cells["a", pointing.name].low == found.cells["b", pointing.name].low == 0
    assert (found.ranks["a", pointing.name].low, found.ranks["a", pointing.name].high) == (1, 1.5)


def test_no_resampled_mean_lies_outside_of_its_values():
    values = np.random.default_rng(0).choice([0.1, 0.3], (20, 50))
    values[:, 0] = 0.1
    means = resampled_means(values, resamples=500)
    assert (means >= values.min(axis=0)).all() and (means <= values.max(axis=0)).all()


def test_a_mean_rank_lies_in_its_interval_where_a_metric_is_infinite():
    metrics = [MetricFacts(name, "perturbation", "u", True) for name in ("plain", "endless")]
    values = np.random.default_rng(0).normal(size=(2, 30))
    rows = [Row(i, f"{i}", m, "plain", values[k, i]) for k, m in enumerate("ab") for i in range(30)]
    for endless in ("ab", "b"):
        finite = [Row(i, f"{i}", "a", "endless", values[0, i]) for i in range(30) if endless == "b"]
        boundless = [Row(i, f"{i}", m, "endless", math.inf) for m in endless for i in range(30)]
        found = summarise(rows + finite + boundless, metrics)
        for rank in found.mean_ranks.values():
            assert rank.low <= rank.mean <= rank.high
        assert ("b", "endless") not in found.ranks


def test_order_of_rows_changes_nothing():
    rng = np.random.default_rng(12)
    values = {key: rng.normal(size=40) for key in itertools.product("abc", ("insertion", "deletion"))}
    rows = rows_of(values)
    first = summarise(rows, [UP, DOWN], "a", methods="abc")
    second = summarise([rows[i] for i in rng.permutation(len(rows))], [UP, DOWN], "a", methods="abc")
    assert first == second


def test_bad_input():
    rows = rows_of({("grad_cam", "insertion"): np.ones(2)})
    with pytest.raises(ValueError, match="there are no rows to summarise"):
        summarise([], [UP])
    with pytest.raises(ValueError, match="no rows of metric 'deletion'"):
        summarise(rows, [DOWN])
    with pytest.raises(ValueError, match=re.escape("no rows of reference method 'gradcam'; did you mean 'grad_cam'?")):
        summarise(rows, [UP], "gradcam")
    with pytest.raises(ValueError, match="image 1 has more than one row for 'grad_cam', 'insertion'"):
        summarise([*rows, rows[1]], [UP])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        summarise(rows, [UP], confidence=95)
    with pytest.raises(ValueError, match="unknown metric 'insert'; did you mean 'insertion'"):
        summarise(rows, [UP]).facts("insert")


# --- curves and extremes ---------------------------------------------------------------------------------------------


def test_mean_curve_and_its_band():
    scores = np.random.default_rng(13).normal(size=(200, 4)).astype(np.float32)
    scores[:, 0] = 0.5
    scores[:3, 2] = np.nan
    (curve,) = summarise_curves([CurveBatch("a", "insertion", np.arange(200), np.linspace(0, 1, 4), scores)])
    np.testing.assert_allclose(curve.mean, np.nanmean(scores.astype(float), axis=0))
    assert (curve.low[0], curve.high[0], curve.n) == (0.5, 0.5, 200)
    half = stats.sem(scores[:, 1].astype(float)) * 1.96
    assert curve.high[1] - curve.low[1] == pytest.approx(2 * half, rel=0.1)


def test_extremes_follow_direction():
    rows = rows_of({("a", "insertion"): np.array([0.3, 0.9, np.nan, 0.1, 0.9]), ("a", "deletion"): np.zeros(5)})
    best, worst = extremes(rows, UP, count=2)["a"]
    assert [case.image for case in best] == [1, 4] and [case.image for case in worst] == [3, 0]
    best, worst = extremes(rows, DOWN, count=9)["a"]
    assert [case.image for case in best] == [0, 1] and [case.image for case in worst] == [2, 3]
    assert extremes(rows_of({("a", "insertion"): np.ones(1)}), UP)["a"] == ([], [])


def test_ranks_over_common_images_are_drawn_by_the_seed():
    values = np.random.default_rng(0).normal(size=(9, 6)).round(1)
    values[0, 1] = np.nan  # not known on the same images: compared in pairs
    rows = rows_of({(f"m{m}", "insertion"): values[:, m] for m in range(6)})
    found = summarise(rows, [UP], seed=3, confidence=0.5)
    by_seed, other = (
        percentile_interval(pairwise_ranks(values, higher_is_better=True, seed=seed)[1], 0.5) for seed in (3, 0)
    )
    low, high = ([getattr(found.ranks[f"m{m}", "insertion"], end) for m in range(6)] for end in ("low", "high"))
    np.testing.assert_array_equal([low, high], by_seed)
    assert not np.array_equal(by_seed, other), "the case that this is about"
