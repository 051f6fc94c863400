"""Scores against gaze: worked examples, properties, pysaliency and SciPy as independent implementations, bad input."""

from __future__ import annotations

import importlib.util
import json
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from ib_explain.metrics.base import METRICS, Case
from ib_explain.metrics.ground_truth import centred_gaussian, fixations_to_density, other_fixations
from ib_explain.metrics.human import (
    CONVENTIONS,
    auc,
    auc_judd,
    auc_shuffled,
    cc,
    information_gain,
    kld,
    nss,
    sim,
)

P = torch.tensor([[4.0, 2.0], [1.0, 1.0]])[None, None]
Q = torch.tensor([[1.0, 3.0], [2.0, 2.0]])[None, None]


def points(*row_column: tuple[int, int]) -> list[Tensor]:
    """One image's fixations, written as (row, column) as in the examples."""
    return [torch.tensor([[float(column), float(row)] for row, column in row_column]).reshape(-1, 2)]


def random_case(batch: int = 5, size: tuple[int, int] = (11, 17)) -> tuple[Tensor, list[Tensor], Tensor]:
    """Maps, fixations of different numbers with repeated ones, densities."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(batch, 1, *size, generator=generator)
    scale = torch.tensor([size[1] - 1.0, size[0] - 1.0])
    fixations = [(torch.rand(3 + 4 * i, 2, generator=generator) * scale).round() for i in range(batch)]
    fixations[-1] = fixations[-1].repeat(2, 1)
    return maps, fixations, fixations_to_density(fixations, size, sigma=2.0)


# Worked examples.


def test_cc_by_hand():
    assert cc(P, Q).item() == pytest.approx(-2 / math.sqrt(12), abs=1e-7)
    assert cc(P, P).item() == 1


def test_sim_by_hand():
    assert sim(P, Q).item() == pytest.approx(0.625)
    # Stretching both to [0, 1] first is another measure, and another number.
    assert sim(P - 1, Q - 1).item() == pytest.approx(0.25)


def test_kld_by_hand_and_its_direction():
    assert kld(P, Q).item() == pytest.approx(0.325336, abs=1e-6)
    assert kld(Q, P).item() == pytest.approx(0.418494, abs=1e-6)


def test_kld_of_a_zero_is_decided_by_epsilon():
    heat = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    truth = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])
    assert kld(heat, truth).item() == pytest.approx(17.3287, abs=1e-4)
    # Half of the mass at the zero: a thousandth of epsilon costs half of ln 1000 more.
    assert kld(heat, truth, epsilon=2.2204e-19).item() == pytest.approx(17.3287 + math.log(1000) / 2, abs=1e-4)


def test_nss_by_hand():
    assert nss(P, points((0, 0))).item() == pytest.approx(2 / math.sqrt(1.5))
    assert nss(P, points((0, 1))).item() == 0


@pytest.mark.parametrize(("at", "expected"), [([(0, 0)], 0.875), ([(0, 1)], 0.625), ([(0, 0), (0, 1)], 0.75)])
def test_auc_by_hand(at, expected):
    assert auc(P, points(*at)).item() == expected


def test_auc_judd_by_hand():
    # No jitter: the area under the lines is larger than the exact probability against the others (2/3 and 1/6).
    assert auc_judd(P, points((0, 1))).item() == pytest.approx(5 / 6)
    assert auc_judd(P, points((1, 0))).item() == pytest.approx(0.5)
    assert auc_judd(P, points((0, 0), (0, 1))).item() == 1
    assert auc_judd(P, points((0, 1), (0, 1), (0, 1))).item() == pytest.approx(5 / 6)


def test_auc_shuffled_by_hand():
    assert auc_shuffled(P, points((0, 0)), points((0, 0), (0, 0), (1, 1))).item() == pytest.approx(2 / 3)
    assert auc_shuffled(P, points((0, 0)), points((0, 0), (1, 1))).item() == 0.75


def test_information_gain_by_hand():
    assert information_gain(P, points((0, 0)), "uniform").item() == pytest.approx(1)
    assert information_gain(P, points((0, 0), (1, 0)), "uniform").item() == pytest.approx(0, abs=1e-7)
    baseline = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]]])
    assert information_gain(P, points((0, 0), (1, 0)), baseline).item() == pytest.approx(-0.178072, abs=1e-6)
    assert information_gain(centred_gaussian((9, 9)), points((4, 4), (0, 3))).item() == pytest.approx(0, abs=1e-6)
    zero = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    lost = math.log2(2.2204e-16) - math.log2(0.25)
    assert information_gain(zero, points((0, 1)), "uniform").item() == pytest.approx(lost, rel=1e-6)


# Properties.


def test_affine_changes():
    maps, fixations, density = random_case()
    other = other_fixations(fixations)
    changed = 3 * maps + 2
    for score in (
        lambda m: cc(m, density),
        lambda m: nss(m, fixations),
        lambda m: auc(m, fixations),
        lambda m: auc_judd(m, fixations),
        lambda m: auc_shuffled(m, fixations, other),
    ):
        torch.testing.assert_close(score(changed), score(maps), rtol=1e-5, atol=1e-5)
    for score in (lambda m: sim(m, density), lambda m: kld(m, density), lambda m: information_gain(m, fixations)):
        torch.testing.assert_close(score(3 * maps), score(maps), rtol=1e-5, atol=1e-5)
        assert (score(changed) - score(maps)).abs().min() > 1e-3


def test_monotone_changes():
    maps, fixations, density = random_case()
    other = other_fixations(fixations)
    torch.testing.assert_close(auc(maps**3, fixations), auc(maps, fixations))
    torch.testing.assert_close(auc_judd(maps**3, fixations), auc_judd(maps, fixations))
    torch.testing.assert_close(auc_shuffled(maps**3, fixations, other), auc_shuffled(maps, fixations, other))
    assert (cc(maps**3, density) - cc(maps, density)).abs().min() > 1e-3
    assert (nss(maps**3, fixations) - nss(maps, fixations)).abs().min() > 1e-3


def test_a_map_against_itself():
    maps, _, _ = random_case()
    torch.testing.assert_close(sim(maps, maps), torch.ones(5))
    torch.testing.assert_close(kld(maps, maps), torch.zeros(5), rtol=0, atol=1e-9)
    torch.testing.assert_close(cc(maps, 7 * maps), torch.ones(5))
    torch.testing.assert_close(cc(maps, 7 * maps), cc(7 * maps, maps))


def test_all_pixels_as_fixations_are_chance():
    maps, _, _ = random_case(batch=1)
    y, x = torch.meshgrid(torch.arange(11.0), torch.arange(17.0), indexing="ij")
    everywhere = [torch.stack([x, y], dim=-1).reshape(-1, 2)]
    torch.testing.assert_close(nss(maps, everywhere), torch.zeros(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(auc(maps, everywhere), torch.tensor([0.5]))
    assert auc_judd(maps, everywhere).isnan().all()  # there are no negatives left


def test_padding_of_shorter_lists_changes_nothing():
    maps, fixations, density = random_case()
    other = other_fixations(fixations)
    for score in (
        lambda i: nss(maps[i], fixations[i]),
        lambda i: auc(maps[i], fixations[i]),
        lambda i: auc_judd(maps[i], fixations[i]),
        lambda i: auc_shuffled(maps[i], fixations[i], other[i]),
        lambda i: information_gain(maps[i], fixations[i]),
        lambda i: kld(maps[i], density[i]),
    ):
        together = score(slice(0, 5))
        assert together.dtype == torch.float32
        torch.testing.assert_close(torch.cat([score(slice(i, i + 1)) for i in range(5)]), together)


def test_signed_maps():
    maps, fixations, density = random_case()
    signed = maps - 0.5
    torch.testing.assert_close(cc(signed, density), cc(signed.clamp_min(0), density))
    torch.testing.assert_close(sim(signed, density), sim(signed.clamp_min(0), density))
    torch.testing.assert_close(nss(signed, fixations), nss(maps, fixations))
    torch.testing.assert_close(auc(signed, fixations), auc(maps, fixations))
    shifted = signed - signed.amin(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(cc(shifted, density), cc(maps, density))


def test_a_map_of_the_fixations_beats_the_centre_which_beats_nothing_when_shuffled():
    size = (40, 60)
    generator = torch.Generator().manual_seed(0)
    middle, spread = torch.tensor([29.5, 19.5]), torch.tensor([9.0, 6.0])
    lists = [
        (middle + spread * torch.randn(200, 2, generator=generator)).clamp(min=0).minimum(2 * middle) for _ in range(20)
    ]
    prior = centred_gaussian(size).expand(20, -1, -1, -1)
    assert auc(prior, lists).mean() > 0.75
    assert auc_shuffled(prior, lists, other_fixations(lists)).mean().item() == pytest.approx(0.5, abs=0.02)


# Undefined.


def test_no_fixations_and_constant_maps_are_nan():
    maps, fixations, density = random_case()
    other = other_fixations(fixations)
    none = [torch.zeros(0, 2)] * 5
    for scores in (
        nss(maps, none),
        auc(maps, none),
        auc_judd(maps, none),
        auc_shuffled(maps, none, other),
        auc_shuffled(maps, fixations, none),
        information_gain(maps, none),
    ):
        assert scores.shape == (5,)
        assert scores.isnan().all()
    some = [*fixations[:2], torch.zeros(0, 2), *fixations[3:]]
    assert auc_judd(maps, some).isnan().tolist() == [False, False, True, False, False]

    flat, zero = torch.full_like(maps, 0.1), torch.zeros_like(maps)
    for scores in (cc(flat, density), cc(maps, flat), nss(flat, fixations), sim(zero, density), kld(zero, density)):
        assert scores.isnan().all()
    for scores in (sim(maps, zero), kld(maps, zero), information_gain(-maps, fixations), cc(-maps, density)):
        assert scores.isnan().all()
    # Chance is a value, not a lack of one.
    for scores in (auc(flat, fixations), auc_judd(flat, fixations), auc_shuffled(flat, fixations, other)):
        torch.testing.assert_close(scores, torch.full((5,), 0.5))


# Independent implementations.


@pytest.fixture(scope="module")
def pysaliency_metrics() -> ModuleType:
    """The file of metric functions alone: the package's import takes seconds and needs pkg_resources."""
    package = importlib.util.find_spec("pysaliency")
    assert package is not None and package.submodule_search_locations, "pysaliency comes with the test extra"
    spec = importlib.util.spec_from_file_location(
        "pysaliency_metrics", f"{package.submodule_search_locations[0]}/metrics.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agrees_with_pysaliency(pysaliency_metrics):
    maps, fixations, density = random_case()
    maps[0] -= maps[0].amin()  # an exact zero
    ours = {"cc": cc(maps, density), "sim": sim(maps, density), "kld": kld(maps, density), "nss": nss(maps, fixations)}
    for i in range(5):
        s, g = maps[i, 0].double().numpy(), density[i, 0].double().numpy()
        xs, ys = fixations[i].numpy().astype(int).T
        theirs = {
            "cc": pysaliency_metrics.CC(s, g),
            "sim": pysaliency_metrics.SIM(s, g),
            "nss": pysaliency_metrics.NSS(s, xs, ys).mean(),
        }
        with np.errstate(divide="ignore", invalid="ignore"):
            theirs["kld"] = pysaliency_metrics.MIT_KLDiv(s, g)
        for name, value in theirs.items():
            assert ours[name][i].item() == pytest.approx(value, abs=1e-6), name


def test_auc_agrees_with_the_rank_sum_statistic():
    from scipy import stats

    maps, fixations, _ = random_case()
    maps = (maps * 20).floor()  # many ties
    other = other_fixations(fixations)
    uniform, shuffled = auc(maps, fixations), auc_shuffled(maps, fixations, other)
    for i in range(5):
        s = maps[i, 0].numpy()
        xs, ys = fixations[i].numpy().astype(int).T
        other_xs, other_ys = other[i].numpy().astype(int).T
        for score, negatives in ((uniform, s.ravel()), (shuffled, s[other_ys, other_xs])):
            wins = stats.mannwhitneyu(s[ys, xs], negatives).statistic
            assert score[i].item() == pytest.approx(wins / (len(xs) * len(negatives)), abs=1e-6)


def test_auc_judd_agrees_with_the_definition():
    maps, fixations, _ = random_case()
    ours = auc_judd(maps, fixations)
    for i in range(5):
        s = maps[i, 0].numpy()
        fixated = np.zeros_like(s, dtype=bool)
        fixated[tuple(fixations[i].numpy().astype(int).T[::-1])] = True
        # Threshold by threshold as the benchmark has it: i of n hits, and what else is as high.
        n, thresholds = fixated.sum(), np.sort(s[fixated])[::-1]
        tp = [0, *[(k + 1) / n for k in range(n)], 1]
        fp = [0, *[((s >= t).sum() - (k + 1)) / (s.size - n) for k, t in enumerate(thresholds)], 1]
        area = sum((fp[k + 1] - fp[k]) * (tp[k + 1] + tp[k]) / 2 for k in range(n + 1))
        assert ours[i].item() == pytest.approx(area, abs=1e-6)


# Conventions and bad input.


def test_conventions_name_every_score_and_are_json():
    import ib_explain.metrics.human as human

    assert set(CONVENTIONS) == set(human.__all__) - {"CONVENTIONS"}
    assert json.loads(json.dumps(CONVENTIONS)) == CONVENTIONS


def test_registered_under_their_names():
    maps, fixations, density = random_case()
    other, prior = other_fixations(fixations), centred_gaussian((11, 17))
    case = Case(maps=maps, density=density, fixations=fixations, other=other, baseline=prior)
    expected = {
        "cc": cc(maps, density),
        "sim": sim(maps, density),
        "kld": kld(maps, density),
        "nss": nss(maps, fixations),
        "auc": auc(maps, fixations),
        "auc_judd": auc_judd(maps, fixations),
        "auc_shuffled": auc_shuffled(maps, fixations, other),
        "information_gain": information_gain(maps, fixations),
    }
    assert set(expected) == {name for name in METRICS if METRICS.get(name).family == "human"}
    for name, scores in expected.items():
        metric = METRICS.get(name)
        assert metric.higher_is_better is (name != "kld")
        torch.testing.assert_close(metric(case), scores)


def test_bad_densities():
    maps, fixations, density = random_case()
    with pytest.raises(ValueError, match=r"density must have the maps' size \(11, 17\), got \(10, 17\)"):
        cc(maps, density[..., :-1, :])
    with pytest.raises(ValueError, match="density must hold one density for each of the 5 maps, got 1"):
        kld(maps, density[:1])
    with pytest.raises(ValueError, match="density must be >= 0 everywhere, got a minimum of -1"):
        sim(maps, density - density.amin() - 1)
    with pytest.raises(TypeError, match="density: maps must be floating point, got torch.int64"):
        sim(maps, density.long())
    with pytest.raises(ValueError, match="epsilon must be > 0, got 0"):
        kld(maps, density, epsilon=0)
    with pytest.raises(ValueError, match="baseline must be a density, 'centre' or 'uniform', got 'center'"):
        information_gain(maps, fixations, "center")  # type: ignore[arg-type]
    information_gain(maps, fixations, density[:1] + 1e-3)  # one baseline for all is fine


def test_bad_fixations():
    maps, fixations, _ = random_case()
    for score in (nss, auc, auc_judd, information_gain):
        with pytest.raises(TypeError, match="fixations must hold one torch.Tensor an image, got NoneType"):
            score(maps, None)
        with pytest.raises(ValueError, match="fixations must hold one tensor for each of the 5 maps, got 4"):
            score(maps, fixations[:4])
    with pytest.raises(ValueError, match="other must hold one tensor for each of the 5 maps, got 1"):
        auc_shuffled(maps, fixations, fixations[:1])
    outside = [*fixations[:4], torch.tensor([[17.0, 2.0]])]
    with pytest.raises(ValueError, match=r"fixations must lie inside of the image, .* got \(17, 2\) for image 4"):
        auc(maps, outside)
    with pytest.raises(ValueError, match=r"maps must be finite, got 1 NaN"):
        auc(maps.index_put((torch.tensor(0),) * 4, torch.tensor(math.nan)), fixations)
