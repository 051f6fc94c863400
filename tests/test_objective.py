"""The rate and the price of places: closed forms and invariances."""

import math
from types import SimpleNamespace

import pytest
import torch

from ib_explain.objective import LEAST_AT_STAKE, location_price, nats_at_stake, rate, worth_fitting

CHANNELS = 5


def bits_of(nats):
    """Bits (B, 1, h, w) that are these nats a feature element."""
    return nats * CHANNELS / math.log(2)


def seen(deep=(), gradients=(), features=None, gradient=None):
    features = torch.zeros(2, CHANNELS, 8, 8) if features is None else features
    return SimpleNamespace(features=features, gradient=gradient, deep=list(deep), deep_gradients=list(gradients))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestRate:
    @pytest.mark.parametrize("nats", [0.0, 0.09, 4.0])
    def test_even_information_costs_its_root(self, nats):
        got = rate(bits_of(torch.full((2, 1, 8, 8), nats)), torch.ones(1), CHANNELS)
        torch.testing.assert_close(got, torch.full((2,), math.sqrt(nats + 1e-6)))

    def test_one_block_costs_less_than_as_much_spread_over_all(self):
        one = torch.zeros(1, 1, 8, 8)
        one[..., :2, :2] = 1.6  # one of sixteen blocks
        spread = torch.full_like(one, 0.1)
        assert rate(bits_of(one), torch.ones(1), CHANNELS).item() == pytest.approx(math.sqrt(1.6) / 16, abs=1.1e-3)
        assert rate(bits_of(spread), torch.ones(1), CHANNELS).item() == pytest.approx(math.sqrt(0.1), abs=1e-3)

    def test_within_a_block_only_the_sum_counts(self):
        nats = random(1, 1, 8, 8).abs()
        moved = nats.clone()
        moved[..., 0, 0], moved[..., 1, 1] = nats[..., 1, 1], nats[..., 0, 0]
        ones = torch.ones(1)
        torch.testing.assert_close(rate(bits_of(nats), ones, CHANNELS), rate(bits_of(moved), ones, CHANNELS))

    def test_a_place_at_twice_the_price_costs_as_twice_the_nats(self):
        nats, price = random(2, 1, 8, 8).abs(), random(2, 1, 8, 8, seed=1).abs()
        got = rate(bits_of(nats), price, CHANNELS)
        torch.testing.assert_close(got, rate(bits_of(nats * price), torch.ones(1), CHANNELS))

    @pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 5), (14, 14)])
    def test_any_grid(self, grid):
        assert torch.isfinite(rate(torch.ones(2, 1, *grid), torch.ones(1), CHANNELS)).all()

    def test_its_gradient_is_finite_where_nothing_passes(self):
        attention = torch.zeros(1, 1, 4, 4, requires_grad=True)
        rate(attention.square(), torch.ones(1), CHANNELS).sum().backward()
        assert torch.isfinite(attention.grad).all()


class TestLocationPrice:
    def test_it_is_grad_cam_written_out(self):
        features, gradient = random(2, CHANNELS, 8, 8), random(2, CHANNELS, 8, 8, seed=1)
        cam = torch.stack(
            [sum(g.mean() * f for f, g in zip(*pair, strict=True)) for pair in zip(features, gradient, strict=True)]
        )
        z = (cam - cam.mean((1, 2), keepdim=True)) / cam.std((1, 2), keepdim=True, correction=0)
        price = torch.exp(-3 * z)
        expected = (price / price.mean((1, 2), keepdim=True))[:, None]
        found = location_price(seen(features=features, gradient=gradient))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_one_on_average_and_lowest_where_the_evidence_is(self):
        deep, gradient = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
        deep[:, :, 1, 2] = 5
        price = location_price(seen([deep], [gradient]))
        assert price.shape == (2, 1, 8, 8)
        torch.testing.assert_close(price.mean((2, 3)), torch.ones(2, 1))
        assert price[0, 0].argmin().item() in (2 * 8 + 4, 2 * 8 + 5, 3 * 8 + 4, 3 * 8 + 5)

    def test_scales_and_offsets_of_the_layers_do_not_matter(self):
        deep, gradients = [random(2, 3, 4, 4), random(2, 6, 2, 2)], [random(2, 3, 4, 4, seed=1), random(2, 6, 2, 2)]
        other = [deep[0] * 7 + 3, deep[1] - 20], [gradients[0] * 1e-3, gradients[1] * 50]
        torch.testing.assert_close(
            location_price(seen(deep, gradients)), location_price(seen(*other)), rtol=1e-3, atol=1e-4
        )

    def test_without_evidence_all_places_cost_the_same(self):
        ones = torch.ones(2, 1, 8, 8)
        assert torch.equal(location_price(seen()), ones)  # no gradients
        flat = torch.full((2, 3, 4, 4), 0.3)
        torch.testing.assert_close(location_price(seen([flat], [random(2, 3, 4, 4)])), ones)
        assert torch.equal(location_price(seen([random(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)])), ones)

    def test_where_nothing_coarser_is_behind_the_site_its_own_evidence_counts(self):
        features, gradient = random(2, CHANNELS, 8, 8), random(2, CHANNELS, 8, 8, seed=1)
        own = location_price(seen(features=features, gradient=gradient))
        alike = random(2, 3, 8, 8, seed=2)
        assert torch.equal(own, location_price(seen([alike], [alike], features=features, gradient=gradient)))


def test_nats_at_stake_is_a_divergence_of_at_least_a_little():
    logits, closed = 5 * random(3, 4), 5 * random(3, 4, seed=1)
    p = torch.distributions.Categorical(logits=logits)
    for those in (closed, closed[:1]):  # of each image, or the same for all
        divergence = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=those))
        torch.testing.assert_close(nats_at_stake(logits, those), divergence.clamp_min(LEAST_AT_STAKE))
    assert nats_at_stake(logits, logits).tolist() == pytest.approx([LEAST_AT_STAKE] * 3)


def test_an_image_is_worth_fitting_as_far_as_it_puts_its_target_ahead():
    closed = torch.tensor([[0.7, 0.2, 0.1]]).log()
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()
    expected = [0.0, math.log(1.5), 0.0, 1.0]
    found = [
        worth_fitting(logits[i : i + 1], closed, torch.tensor([t])).item() for i, t in ((0, 0), (0, 1), (1, 0), (2, 2))
    ]
    assert found == pytest.approx(expected, abs=1e-6)


def test_masked_evidence_counts_as_much_as_all_layers():
    deep, gradient, masked = random(2, 6, 4, 4), random(2, 6, 4, 4, seed=1), random(2, 1, 8, 8, seed=2)
    one = location_price(seen([deep], [gradient]), masked)
    torch.testing.assert_close(location_price(seen([deep] * 3, [gradient] * 3), masked), one, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(location_price(seen([deep], [gradient]), 7 * masked + 1), one, rtol=1e-3, atol=1e-5)
