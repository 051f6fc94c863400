import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from torch import nn

from ib_explain.metrics import METRICS, Case, infidelity, max_sensitivity
from ib_explain.metrics.robustness import _squares
from tests.models import images, tiny


class Linear(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        score = (x * self.weights).sum((1, 2, 3))
        return torch.stack([score, -score], 1)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return Linear(torch.randn(3, 12, 12)), torch.randn(4, 3, 12, 12)


def contributions(model, x, target):
    sign = torch.where(target == 0, 1.0, -1.0)[:, None, None]
    return (x * model.weights).sum(1) * sign


def gradient(model, x, target):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = model(x).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, x)[0].sum(1, keepdim=True)


# Infidelity.


@pytest.mark.parametrize("normalize", [True, False])
def test_contributions_of_a_linear_model_predict_exactly(linear, normalize):
    model, x = linear
    target = torch.tensor([0, 1, 0, 1])
    maps = contributions(model, x, target)
    exact = infidelity(model, x, maps, target, normalize=normalize)
    torch.testing.assert_close(exact, torch.zeros(4), atol=1e-4, rtol=0)
    scaled = infidelity(model, x, 3 * maps, target, normalize=normalize)
    assert (scaled < 1e-4).all() if normalize else (scaled > 0.1).all()


def test_infidelity_by_hand(linear):
    model, x = linear
    maps = torch.rand(4, 1, 12, 12)
    squares = _squares(20, 12, 12, 5)
    falls = torch.stack([model(x)[:, 0] - model(x * (1 - square))[:, 0] for square in squares])  # [20, 4]
    sums = (squares[:, None, 0] * maps[None, :, 0]).sum((2, 3))
    plain = infidelity(model, x, maps, 0, samples=20, normalize=False, seed=5)
    torch.testing.assert_close(plain, (sums - falls).pow(2).mean(0))
    scaled = sums * ((sums * falls).mean(0) / sums.pow(2).mean(0)).clamp_min(0)
    torch.testing.assert_close(infidelity(model, x, maps, 0, samples=20, seed=5), (scaled - falls).pow(2).mean(0))


def test_a_map_that_points_the_wrong_way_is_no_better_than_one_of_zeros(linear):
    model, x = linear
    right = contributions(model, x, torch.zeros(4, dtype=torch.long))
    nothing = infidelity(model, x, torch.zeros_like(right), 0)
    torch.testing.assert_close(infidelity(model, x, -right, 0), nothing)
    assert (infidelity(model, x, right, 0) < 1e-4 * nothing).all() and (infidelity(model, x, right, 0) >= 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_infidelity_agrees_with_captum(linear, normalize):
    model, x = linear
    right = contributions(model, x, torch.zeros(4, dtype=torch.long))
    maps = right + 0.5 * torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(1))  # of the right sign
    squares = _squares(30, 12, 12, 3)

    def hide(copies):
        hidden = squares.repeat(len(copies) // 30, 1, 1, 1).expand_as(copies)
        return hidden, copies * (1 - hidden)

    theirs = captum_infidelity(
        lambda images: model(images)[:, 0],
        hide,
        x,
        (maps[:, None] / 3).expand_as(x),
        n_perturb_samples=30,
        normalize=normalize,
    )
    torch.testing.assert_close(infidelity(model, x, maps, 0, samples=30, seed=3, normalize=normalize), theirs)


def test_a_map_of_zeros_gets_the_mean_squared_fall(linear):
    model, x = linear
    squares = _squares(50, 12, 12, 0)
    falls = torch.stack([model(x)[:, 0] - model(x * (1 - square))[:, 0] for square in squares])
    torch.testing.assert_close(infidelity(model, x, torch.zeros(4, 12, 12), 0), falls.pow(2).mean(0))


def test_squares_are_squares_of_all_sizes_everywhere():
    squares = _squares(400, 28, 40, 0)[:, 0]
    heights, widths = squares.amax(2).sum(1), squares.amax(1).sum(1)
    assert torch.equal(heights, widths) and torch.equal(squares.sum((1, 2)), heights * widths)
    assert heights.unique().tolist() == list(range(1, 11))
    reached = squares.amax(0)
    assert reached.mean() > 0.95 and all(
        edge.any() for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1])
    )


# Maximum sensitivity.


def test_a_method_that_ignores_the_image_is_not_sensitive(linear):
    model, x = linear
    fixed = torch.rand(1, 12, 12)
    scores = max_sensitivity(model, x, lambda model, x, target: fixed.expand(len(x), 12, 12))
    assert scores.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(max_sensitivity(model, x, gradient), torch.zeros(4))


def test_max_sensitivity_by_hand(linear):
    model, x = linear
    noise = 0.1 * (2 * torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(2)) - 1)
    changes = torch.stack([(noise_s.sum(0)).norm() for noise_s in noise])
    expected = changes.max() / x.sum(1).flatten(1).norm(dim=1)
    scores = max_sensitivity(model, x, lambda model, x, target: x.sum(1), samples=6, radius=0.1, seed=2)
    torch.testing.assert_close(scores, expected)


def test_the_class_stays_that_of_the_intact_image(linear):
    model, x = linear
    asked = []

    def explain(model, x, target):
        asked.append(target)
        return x.abs().sum(1)

    max_sensitivity(model, x, explain, samples=3)
    top = model(x).argmax(1)
    assert torch.equal(asked[0], top) and torch.equal(asked[1], top.repeat_interleave(3))
    asked.clear()
    max_sensitivity(model, x[:1], explain, 1, samples=3)
    assert [len(target) for target in asked] == [1, 3] and all((target == 1).all() for target in asked)


def test_an_empty_map_has_no_relative_change(linear):
    model, x = linear
    scores = max_sensitivity(model, x, lambda model, x, target: (x * (x[:, :1, :1, :1] > x[0, 0, 0, 0])).sum(1))
    assert scores.isnan()[0] and not scores.isnan().all()


def test_a_function_that_takes_gradients_needs_no_enable_grad_of_its_own(linear):
    model, x = linear

    def plain_gradient(model, x, target):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0].abs().amax(1, keepdim=True)

    with torch.no_grad():
        assert max_sensitivity(model, x, plain_gradient, samples=2).tolist() == [0, 0, 0, 0]


# Both.


def each(model, x, **settings):
    maps = contributions(model, x, torch.zeros(len(x), dtype=torch.long)).abs()
    yield infidelity(model, x, maps, 0, samples=7, **settings)
    yield max_sensitivity(model, x, lambda model, x, target: x.pow(2).sum(1), samples=7, **settings)


def test_batch_size_and_batches_change_no_result(linear):
    model, x = linear
    for whole, alone, *chunked in zip(
        each(model, x), each(model, x[1:2]), *(each(model, x, batch_size=b) for b in (1, 3, 9)), strict=True
    ):
        assert whole.shape == (4,) and whole.dtype == torch.float32
        torch.testing.assert_close(alone, whole[1:2])
        for scores in chunked:
            torch.testing.assert_close(scores, whole)
    model.sizes.clear()
    list(each(model, x, batch_size=3))
    assert max(model.sizes) == 3


def test_seeds_rule_and_global_random_state_is_left_alone(linear):
    model, x = linear
    state = torch.get_rng_state()
    first, again, other = list(each(model, x)), list(each(model, x)), list(each(model, x, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaled_infidelity_does_not_depend_on_the_maps_unit(linear, scale):
    model, x = linear
    maps = torch.rand(4, 12, 12)
    torch.testing.assert_close(infidelity(model, x, scale * maps), infidelity(model, x, maps), rtol=1e-3, atol=1e-5)


def test_infidelity_of_a_half_precision_host(linear):
    model, x = linear
    maps = 1e-6 * torch.rand(4, 12, 12)
    whole = infidelity(model, x, maps)
    half = Linear(model.weights.half())
    torch.testing.assert_close(infidelity(half, x.half(), maps), whole, rtol=0.05, atol=0)


def test_max_sensitivity_lends_the_host_in_eval_mode_and_keeps_the_random_state():
    host, x = tiny(), images(2)

    def noisy(model, x, target):
        assert not model.training
        torch.rand(1)
        return gradient(model, x, target)

    quiet = max_sensitivity(host, x, gradient, samples=2)
    host.train()
    before, random = {name: value.clone() for name, value in host.state_dict().items()}, torch.get_rng_state()
    assert torch.equal(max_sensitivity(host, x, noisy, samples=2), quiet)
    assert host.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    with pytest.raises(TypeError, match="explain must be a function"):
        max_sensitivity(host, x, "saliency")


def test_the_host_comes_back_as_it_was(linear):
    model, x = linear
    model.train()
    list(each(model, x))
    assert model.training


def test_bad_settings_are_named(linear):
    model, x = linear
    maps = torch.rand(4, 12, 12)
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got 0"):
        infidelity(model, x, maps, samples=0)
    with pytest.raises(ValueError, match="maps must be finite"):
        infidelity(model, x, maps / 0)
    with pytest.raises(ValueError, match=r"radius \(in normalised units\) must be a finite number > 0, got 0"):
        max_sensitivity(model, x, gradient, radius=0)
    with pytest.raises(ValueError, match="each of the 4 images, got 1"):
        max_sensitivity(model, x, lambda model, x, target: maps[:1])


def test_registered_scores_are_those_of_the_functions(linear):
    model, x = linear
    maps = torch.rand(4, 12, 12)
    case = Case(model, x, maps, explain=lambda model, x, target: x.pow(2).sum(1), seed=4)
    torch.testing.assert_close(METRICS.get("infidelity")(case), infidelity(model, x, maps, seed=4))
    expected = max_sensitivity(model, x, case.explain, seed=4)
    torch.testing.assert_close(METRICS.get("max_sensitivity")(case), expected)
    with pytest.raises(ValueError, match="the case lacks explain"):
        METRICS.get("max_sensitivity")(Case(model, x, maps))
