import math

import pytest
import torch
from torch import nn

from ib_explain.metrics import (
    METRICS,
    Case,
    add,
    average_drop,
    increase_in_confidence,
    sparsity,
    sparsity_max_over_mean,
    sparsity_mean_over_max,
)


class Sum(nn.Module):
    """Probability of class 0 is the logistic function of the weighted sum of the first channel."""

    def __init__(self, *weights):
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        score = (x[:, 0, 0] * self.weights).sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.fixture
def pair():
    """Two pixels of value 1, the map shows the first: masked, the score is w0; hidden, it is w1."""
    return torch.ones(1, 3, 1, 2), torch.tensor([[[5.0, 2.0]]])


def test_two_pixels_by_hand(pair):
    model = Sum(1.0, 2.0)
    whole, shown, hidden = sigmoid(3), sigmoid(1), sigmoid(2)
    assert average_drop(model, *pair, 0).item() == pytest.approx((whole - shown) / whole, abs=1e-6)
    assert add(model, *pair, 0).item() == pytest.approx((whole - hidden) / whole, abs=1e-6)
    assert increase_in_confidence(model, *pair, 0).item() == 0


def test_a_pixel_that_speaks_against_the_class(pair):
    model = Sum(1.0, -2.0)
    whole, hidden = sigmoid(-1), sigmoid(-2)
    assert average_drop(model, *pair, 0).item() == 0  # the score rises
    assert increase_in_confidence(model, *pair, 0).item() == 1
    assert add(model, *pair, 0).item() == pytest.approx((whole - hidden) / whole, abs=1e-6)
    assert add(Sum(-1.0, 2.0), *pair, 0).item() < 0  # not clamped


def test_grey_values_scale_the_pixels():
    x, maps = torch.ones(1, 3, 1, 3), torch.tensor([[[4.0, 1.0, 0.0]]])
    drop = average_drop(Sum(1.0, 2.0, 1.0), x, maps, 0).item()
    assert drop == pytest.approx(1 - sigmoid(1.5) / sigmoid(4), abs=1e-6)


@pytest.mark.parametrize("metric", [average_drop, increase_in_confidence, add])
def test_scale_and_offset_of_the_map_do_not_matter(metric):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    x, maps = torch.randn(5, 3, 4, 4), torch.rand(5, 1, 4, 4)
    scores = metric(model, x, maps)
    torch.testing.assert_close(scores, metric(model, x, 7 * maps - 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, metric(model, x, maps[:, 0], batch_size=2), atol=1e-5, rtol=0)
    assert scores.shape == (5,) and scores.dtype == torch.float32


@pytest.mark.parametrize("metric", [average_drop, increase_in_confidence, add])
@pytest.mark.parametrize("value", [0.0, 0.1, -2.0])
def test_constant_maps_are_undefined(metric, value, pair):
    x, maps = pair
    assert metric(Sum(1.0, 2.0), x, torch.full_like(maps, value), 0).isnan().all()


def test_a_probability_of_zero_has_no_relative_fall(pair):
    model = Sum(-200.0, -200.0)
    assert average_drop(model, *pair, 0).isnan().all() and add(model, *pair, 0).isnan().all()


def test_images_without_a_score_do_not_hide_the_others():
    x, maps = torch.ones(2, 3, 1, 2), torch.tensor([[[5.0, 2.0]], [[1.0, 1.0]]])
    assert average_drop(Sum(1.0, 2.0), x, maps, 0).isnan().tolist() == [False, True]


def test_masked_images_are_scored_once_for_a_case(pair):
    model = Sum(1.0, 2.0)
    case = Case(model, *pair, target=0)
    scores = {name: METRICS.get(name)(case).item() for name in ("average_drop", "increase_in_confidence", "add")}
    assert model.calls == 3  # intact, masked, hidden
    assert scores["average_drop"] == average_drop(model, *pair, 0).item()
    assert scores["increase_in_confidence"] == increase_in_confidence(model, *pair, 0).item()
    assert scores["add"] == add(model, *pair, 0).item()


def test_bad_maps_are_named(pair):
    x, maps = pair
    for metric in (average_drop, increase_in_confidence, add):
        with pytest.raises(ValueError, match="maps must be finite"):
            metric(Sum(1.0, 2.0), x, maps / 0)
        with pytest.raises(ValueError, match=r"images' size \(1, 2\), got \(2, 2\)"):
            metric(Sum(1.0, 2.0), x, torch.ones(1, 2, 2))


def test_sparsity_by_hand():
    maps = torch.tensor([[[1, 0.5], [0.15, 0]], [[1, 1], [1, 1]], [[0, 3], [0, 0]]])
    torch.testing.assert_close(sparsity_mean_over_max(maps), torch.tensor([0.4125, 1, 0.25]))
    torch.testing.assert_close(sparsity_max_over_mean(maps), torch.tensor([2.4242, 1, 4]), atol=5e-5, rtol=0)
    assert sparsity is sparsity_max_over_mean
    torch.testing.assert_close(sparsity(5 * maps[:, None]), sparsity(maps))


def test_sparsity_is_undefined_without_heat_and_for_signed_maps():
    maps = torch.stack([torch.zeros(2, 2), torch.tensor([[1.0, -1], [0, 0]]), torch.ones(2, 2)])
    for metric in (sparsity_max_over_mean, sparsity_mean_over_max):
        assert metric(maps).isnan().tolist() == [True, True, False]
        with pytest.raises(ValueError, match="maps must be finite"):
            metric(maps / 0)
    for name in ("sparsity_max_over_mean", "sparsity_mean_over_max"):
        assert METRICS.get(name)(Case(maps=maps)).isnan().tolist() == [True, True, False]


def test_a_warning_points_at_the_users_line():
    case = Case(Sum(1.0, 0.0), torch.ones(1, 3, 1, 2), torch.tensor([[[5.0, 2.0]]]), target=0)
    with pytest.warns(UserWarning, match="look like probabilities") as told:
        METRICS.get("add")(case)
    assert [warning.filename for warning in told] == [__file__]


def test_the_registered_drop_is_clamped_and_an_equal_score_is_no_increase():
    x, maps = torch.ones(1, 3, 1, 2), torch.tensor([[[5.0, 2.0]]])
    assert METRICS.get("average_drop")(Case(Sum(1.0, -2.0), x, maps, target=0)).item() == 0
    assert METRICS.get("increase_in_confidence")(Case(Sum(1.0, 0.0), x, maps, target=0)).item() == 0
