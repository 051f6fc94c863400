"""Anchors and the attention network."""

import math
from types import SimpleNamespace

import pytest
import torch

from ib_explain.bottleneck.anchors import Anchors
from ib_explain.bottleneck.attention import AttentionNetwork, NetworkInputs, _gelu, class_evidence, unit_scale
from ib_explain.bottleneck.module import Bottleneck, Normaliser, Restriction
from ib_explain.maps import spread
from ib_explain.statistics import Moments


def test_anchors_replace_by_the_nearest_value():
    anchors = Anchors(5)  # 0, .25, .5, .75, 1
    got, _ = anchors(torch.tensor([-0.3, 0.1, 0.2, 0.6, 0.99]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0]))


def test_gradient_passes_straight_through_to_the_attention_and_only_the_loss_moves_anchors():
    anchors, a = Anchors(4), torch.tensor([0.1, 0.5, 0.8], requires_grad=True)
    quantised, _ = anchors(a)
    weights = torch.tensor([1.0, -2.0, 3.0])
    to_attention, to_anchors = torch.autograd.grad((quantised * weights).sum(), [a, anchors.values], allow_unused=True)
    torch.testing.assert_close(to_attention, weights)
    assert to_anchors is None or torch.equal(to_anchors, torch.zeros(4))


def test_loss_is_the_codebook_and_commitment_of_lai_et_al():
    anchors, a = Anchors(2), torch.tensor([0.2, 0.9], requires_grad=True)
    _, loss = anchors(a)
    assert loss.item() == pytest.approx((0.4 + 0.1) * (0.04 + 0.01) / 2)
    to_attention, to_anchors = torch.autograd.grad(loss, [a, anchors.values])
    torch.testing.assert_close(to_attention, 0.1 * 2 * torch.tensor([0.2, -0.1]) / 2)
    torch.testing.assert_close(to_anchors, 0.4 * 2 * torch.tensor([-0.2, 0.1]) / 2)


def test_unsorted_anchors_still_give_the_nearest():
    anchors = Anchors(3)
    with torch.no_grad():
        anchors.values.copy_(torch.tensor([0.9, 0.1, 0.4]))
    torch.testing.assert_close(anchors(torch.tensor([0.0, 0.5, 1.0]))[0], torch.tensor([0.1, 0.4, 0.9]))


def reads(gradient, batch=3):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(batch, *shape, generator=generator)

    deep = [random(6, 4, 4), random(10, 2, 2)]
    if gradient:
        return NetworkInputs(random(5, 8, 8), deep, random(5, 8, 8), [random(6, 4, 4), random(10, 2, 2)], None)
    return NetworkInputs(random(5, 8, 8), deep, None, [], random(7))


def second_of(part):
    """The second image's share of a field of a `NetworkInputs`."""
    if part is None:
        return None
    return [p[1:2] for p in part] if isinstance(part, list) else part[1:2]


@pytest.mark.parametrize("gradient", [True, False])
def test_attention_is_a_probability_and_its_deviation_positive(gradient):
    network = AttentionNetwork(5, [6, 10], gradient=gradient, query_width=0 if gradient else 7)
    mean, std = network(reads(gradient))
    assert mean.shape == std.shape == (3, 1, 8, 8)
    assert ((mean > 0) & (mean < 1)).all() and (std > 0).all()


def test_the_scale_of_the_gradient_does_not_matter():
    network = AttentionNetwork(5, [6, 10], gradient=True, query_width=0)
    inputs = reads(True)
    fainter = inputs._replace(gradient=inputs.gradient * 1e-4, deep_gradients=[g * 1e-4 for g in inputs.deep_gradients])
    torch.testing.assert_close(network(inputs)[0], network(fainter)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", [True, False])
def test_attention_depends_on_the_class_and_not_on_the_batch(gradient):
    network = AttentionNetwork(5, [6, 10], gradient=gradient, query_width=0 if gradient else 7)
    torch.nn.init.normal_(network.head.weight, std=1.0)
    inputs = reads(gradient)
    whole = network(inputs)[0]
    second = NetworkInputs(*map(second_of, inputs))
    torch.testing.assert_close(whole[1:2], network(second)[0], rtol=1e-5, atol=1e-5)
    other_class = network(
        inputs._replace(gradient=-inputs.gradient) if gradient else inputs._replace(query=-inputs.query)
    )
    assert (other_class[0] - whole).abs().max() > 1e-3


def test_a_zero_gradient_gives_finite_evidence():
    zeros = torch.zeros(2, 4, 3, 3)
    assert torch.equal(class_evidence(torch.randn(2, 4, 3, 3), zeros), torch.zeros(2, 2, 3, 3))
    assert torch.equal(unit_scale(zeros), zeros)


@pytest.mark.parametrize("size", [(640, 640), (23, 37), (5, 4), (3, 2)])
def test_a_resized_map_keeps_the_sum_and_an_even_one_stays_even(size):
    amounts = torch.rand(2, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread(amounts, size).sum((2, 3)), amounts.sum((2, 3)))
    torch.testing.assert_close(spread(torch.ones(1, 1, 5, 4), size), torch.full((1, 1, *size), 20 / math.prod(size)))
    assert torch.equal(spread(torch.zeros(1, 1, 5, 4), size), torch.zeros(1, 1, *size))


def test_a_resized_map_is_the_square_of_the_interpolated_roots():
    alone = torch.zeros(1, 1, 5, 5)
    alone[0, 0, 2, 2] = 9.0
    fine = spread(alone, (500, 500))[0, 0]
    # Along an axis the root falls from 1 to 0 between centres; of its square's integral, 2/3, 7/12 lie within its cell.
    assert fine[200:300, 200:300].sum().item() == pytest.approx(9 * (7 / 8) ** 2, rel=1e-3)
    assert fine.max() == fine[249:251, 249:251].max() and fine[:, :150].sum() == 0


@pytest.mark.parametrize(("upstream", "left"), [(1.0, True), (1e-20, True), (1e-39, False)])
def test_no_gradient_is_too_small_for_its_digits(upstream, left):
    """Such numbers, which a GELU far below zero gives, slow a CPU down."""
    values = torch.linspace(-3, 5, 81).requires_grad_()
    given = torch.full_like(values, upstream)
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(values), values, given)
    (gradient,) = torch.autograd.grad(_gelu(values), values, given)
    assert (expected != 0).any()
    assert torch.equal(gradient, expected if left else torch.zeros_like(expected))


def test_quantised_attention_is_exactly_an_anchor():
    anchors = Anchors(4)
    anchors.values.data.copy_(torch.tensor([0.0427, 0.3157, 0.6304, 0.8946]))
    got, _ = anchors(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert set(got.unique().tolist()) == set(anchors.values.tolist())


def test_the_class_activation_map_is_of_the_deepest_features():
    fits, other = (AttentionNetwork(c, [d], gradient=False, query_width=10) for c, d in ((5, 10), (10, 5)))
    assert fits.evidence.in_channels == other.evidence.in_channels + 1


def test_a_gradient_is_that_of_the_normalised_features():
    normaliser = Normaliser(Moments(torch.randn(1, 3, 1, 1), torch.tensor([0.5, 1.0, 4.0]).view(1, 3, 1, 1), 1))
    features, weights = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    (gradient,) = torch.autograd.grad((normaliser(features) * weights).sum(), features)
    torch.testing.assert_close(normaliser.of_gradient(gradient), weights)


def test_sampled_attention_stays_in_its_range():
    moments = Moments(torch.zeros(1, 5, 1, 1), torch.ones(1, 5, 1, 1), 1)
    bottleneck = Bottleneck(Restriction("gaussian", moments, []), [], gradient=False, classes=torch.randn(3, 4))
    seen = SimpleNamespace(features=torch.randn(2, 5, 4, 4), deep=[], gradient=None, target=torch.tensor([0, 1]))
    for noise, bound in ((1e3, 0.999), (-1e3, 0.0)):
        value = bottleneck.attend(seen, torch.full((2, 1, 4, 4), noise)).value
        torch.testing.assert_close(value, torch.full_like(value, bound))
