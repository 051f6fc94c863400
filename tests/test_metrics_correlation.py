"""ic, dc and sensitivity-n: by hand, against SciPy, and where they are undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ib_explain.metrics import dc, deletion, ic, insertion, sensitivity_n
from ib_explain.metrics.correlation import SENSITIVITY_FRACTIONS, _draw_set
from tests.perturbing import Weighted, noise_and_maps, ones, small_net


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def batch():
    return noise_and_maps()


def test_worked_example_of_calibration():
    x, maps = ones(1, 0.5, 0.15, 0)
    falls = Weighted([[0.4, 0.2, 0.1, 0.1]], bias=0.1)
    rises = Weighted([[0.5, 0.2, 0.1, 0]], bias=0.1)
    settings = {"fill": "zero", "steps": 4, "score": "logit"}
    assert deletion(falls, x, maps, 0, **settings).auc.item() == pytest.approx(0.375)
    assert dc(falls, x, maps, 0, **settings).item() == pytest.approx(0.9817, abs=5e-5)
    assert insertion(rises, x, maps, 0, **settings).auc.item() == pytest.approx(0.7)
    assert ic(rises, x, maps, 0, **settings).item() == pytest.approx(0.9901, abs=5e-5)
    assert deletion(falls, x, maps**2, 0, **settings).auc.item() == pytest.approx(0.375)
    assert dc(falls, x, maps**2, 0, **settings).item() == pytest.approx(0.9951, abs=5e-5)


def test_correlations_agree_with_scipy_also_over_uneven_steps(net, batch):
    x, maps = batch
    curve = deletion(net, x, maps, pixels_per_step=100)
    scores = dc(net, x, maps, pixels_per_step=100)
    for i in range(len(x)):
        ordered = np.sort(maps[i].numpy().ravel())[::-1]
        means = [ordered[k : k + 100].mean() for k in range(0, 576, 100)]
        expected = stats.pearsonr(-np.diff(curve.scores[i].double().numpy()), means).statistic
        assert scores[i].item() == pytest.approx(expected, abs=1e-5)


def test_correlations_are_undefined_without_variation(net, batch):
    x, maps = batch
    maps[0] = 0.1  # whose sums are not exact
    maps[1] = 0
    for metric in (dc, ic):
        scores = metric(net, x, maps, steps=7)
        assert scores.isnan().tolist() == [True, True, False]
        assert metric(net, x, maps, steps=1).isnan().all()
    x, maps = ones(4, 3, 2, 1)
    assert dc(Weighted([[0.1] * 4]), x, maps, 0, steps=4, score="logit").isnan().all()  # falls evenly
    assert dc(Weighted([[0.0] * 4]), x, maps, 0, steps=4).isnan().all()


def test_sensitivity_n_is_one_for_the_contributions_of_a_linear_model():
    x = torch.randn(2, 3, 6, 6)
    weights = torch.randn(6, 6)
    curve = sensitivity_n(Weighted(weights), x, x[:, :1] * weights, 0, sets=20)
    torch.testing.assert_close(curve.scores, torch.ones(2, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(curve.auc, torch.ones(2), atol=1e-4, rtol=0)
    assert sensitivity_n(Weighted(weights), x, -x[:, :1] * weights, 0, sets=20).auc.max() < -0.999


def test_sensitivity_n_by_hand_for_single_pixels(net):
    x, maps = torch.randn(1, 3, 4, 4), torch.rand(1, 1, 4, 4)
    target = 3
    curve = sensitivity_n(net := nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), x, maps, target, fractions=[1 / 16])
    drops, sums = [], []
    for s in range(100):
        pixel = torch.randperm(16, generator=torch.Generator().manual_seed(s))[0]
        removed = x.clone().flatten(2)
        removed[:, :, pixel] = 0
        drops.append((net(x) - net(removed.view_as(x)))[0, target].item())
        sums.append(maps.flatten()[pixel].item())
    assert curve.scores.item() == pytest.approx(stats.pearsonr(drops, sums).statistic, abs=1e-5)


def test_sensitivity_n_is_undefined_for_a_constant_map(net, batch):
    x, maps = batch
    maps[1] = 0.1
    assert sensitivity_n(net, x, maps, sets=5).auc.isnan().tolist() == [False, True, False]


def test_sensitivity_n_does_not_depend_on_the_maps_unit(net, batch):
    x, maps = batch
    expected = sensitivity_n(net, x, maps).auc
    for scale in (1e-30, 1e38):  # whose sums leave float32
        torch.testing.assert_close(sensitivity_n(net, x, maps * scale).auc, expected, rtol=1e-4, atol=1e-5)


def test_sensitivity_n_depends_on_the_seed_alone(net, batch):
    state = torch.get_rng_state()
    first = sensitivity_n(net, *batch, sets=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.scores, sensitivity_n(net, *batch, sets=5, seed=1).scores)
    assert not torch.equal(first.scores, sensitivity_n(net, *batch, sets=5, seed=2).scores)
    alone = sensitivity_n(net, batch[0][2:], batch[1][2:], sets=5, seed=1)
    torch.testing.assert_close(first.scores[2:], alone.scores, atol=1e-3, rtol=0)


def test_a_size_without_correlation_is_left_out_of_the_mean():
    x, maps = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 0] = 1  # single pixels, drawn four times, may all be zeros
    weights = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    curve = sensitivity_n(Weighted(weights), x, maps, 0, fractions=(1 / 16, 1 / 2), sets=4)
    assert curve.scores.isnan().tolist() == [[True, False]]
    assert torch.equal(curve.auc, curve.scores[:, 1])


def test_seeds_share_no_sets():
    sets = {tuple(_draw_set(64, 32, setting, seed).tolist()) for seed in range(4) for setting in range(4)}
    assert len(sets) == 16


def test_the_sizes_are_those_of_the_released_evaluation():
    assert len(SENSITIVITY_FRACTIONS) == 16
    assert (SENSITIVITY_FRACTIONS[0], SENSITIVITY_FRACTIONS[-1]) == pytest.approx((0.01, 0.8))
