import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ib_explain.data.synthetic import Synthetic
from ib_explain.metrics import METRICS, Case
from ib_explain.metrics.consistency import input_modification_consistency
from ib_explain.metrics.random_weights import draw_again, randomisable_layers
from ib_explain.metrics.sanity import (
    cascading_randomisation,
    label_randomisation,
    seed_correlation,
    target_sensitivity,
)
from ib_explain.metrics.similarity import rank_correlation, ssim
from tests.explaining import blind, even, random_maps
from tests.models import Brightness, images, tiny


def gradient(model, x, target):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        score = model(x).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, x)[0].abs().sum(1, keepdim=True)


# Similarity of maps.


@pytest.mark.parametrize("levels", [None, 5, 2])
def test_rank_correlation_agrees_with_scipy_with_and_without_ties(levels):
    from scipy.stats import spearmanr

    first, second = random_maps(seed=1), random_maps(seed=2) + random_maps(seed=1)
    if levels:
        first, second = ((m * levels / 4).round() for m in (first, second))
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlation(first, second[:, 0]), expected, atol=1e-6)


def test_rank_correlation_sees_the_order_only():
    maps = random_maps()
    torch.testing.assert_close(rank_correlation(maps, maps.exp() * 3), torch.ones(3))
    torch.testing.assert_close(rank_correlation(maps, -maps), -torch.ones(3))


def literal_ssim(a, b):
    """Wang et al. 2004, equations 6 and 13 to 17, window by window."""
    a, b = ((m - m.min()) / (m.max() - m.min()) for m in (a, b))
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / np.outer(taps, taps).sum()
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(found)


def test_ssim_agrees_with_its_definition_and_with_scikit_image():
    first = torch.nn.functional.interpolate(random_maps(size=6), size=(17, 20), mode="bilinear")
    second = first + 0.5 * torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
    found = ssim(first, second)
    pairs = [(a.double().numpy(), b.double().numpy()) for a, b in zip(first[:, 0], second[:, 0], strict=True)]
    np.testing.assert_allclose(found, [literal_ssim(a, b) for a, b in pairs], atol=1e-6)
    from skimage import metrics

    settings = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 1}
    stretched = [[(m - m.min()) / (m.max() - m.min()) for m in pair] for pair in pairs]
    np.testing.assert_allclose(
        found, [metrics.structural_similarity(a, b, **settings) for a, b in stretched], atol=1e-6
    )


def test_ssim_does_not_depend_on_the_scale():
    first, second = random_maps(seed=1), random_maps(seed=2)
    torch.testing.assert_close(ssim(first, second), ssim(first * 1e4, second * 1e-3 - 0.007), atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(first, first), torch.ones(3))


@pytest.mark.parametrize("score", [rank_correlation, ssim])
def test_similarity_is_undefined_for_constant_and_broken_maps(score):
    first, second = random_maps(4), random_maps(4, seed=1)
    second[0], second[1, 0, 3, 3], second[2, 0, 3, 3] = 2.5, torch.nan, torch.inf
    for found in (score(first, second), score(second, first)):
        assert found.isnan().tolist() == [True, True, True, False]


def test_similarity_refuses_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"the other maps must have the images' size \(16, 16\), got \(12, 12\)"):
        rank_correlation(random_maps(), random_maps(size=12))
    with pytest.raises(ValueError, match=r"at least 11 pixels a side for SSIM, got \(10, 10\)"):
        ssim(random_maps(size=10), random_maps(size=10))


# Randomisation.


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("cnn", ["fc", "stages.2", "stages.1", "stages.0", "stem"]),
        ("vit", ["head", "blocks.2", "blocks.1", "blocks.0", "patch", ""]),
        ("nhwc", ["head", "middle", "stem"]),
    ],
)
def test_layers_from_the_output_to_the_input(kind, layers):
    assert randomisable_layers(tiny(kind), images(1)) == layers


def test_order_is_that_of_the_forward_pass_and_nothing_is_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.norm = nn.LayerNorm(3)  # used without being called
            self.first = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            pooled = self.first(x).mean((2, 3))
            return self.head(nn.functional.layer_norm(pooled, (3,), self.norm.weight, self.norm.bias))

    assert randomisable_layers(Odd(), images(1)) == ["head", "first", "norm"]


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_host_is_handed_back_bit_identical(kind):
    model = tiny(kind).train()
    next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cascading_randomisation(model, images(2), gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(versions) - 1)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_host_is_handed_back_when_the_method_fails():
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def fails(model, x, target):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("the method failed")
        return blind(model, x, target)

    with pytest.raises(RuntimeError, match="the method failed"):
        cascading_randomisation(model, images(2), fails)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_are_randomised_one_after_the_other():
    model, seen = tiny(), []

    def watch(given, x, target):
        seen.append({name: value.clone() for name, value in given.named_parameters()})
        assert not given.training
        return gradient(given, x, target)

    found = cascading_randomisation(model, images(2), watch)
    assert found.rank_correlation.shape == found.ssim.shape == (5, 2)
    assert len(seen) == 6
    for step, weights in enumerate(seen):
        changed = {name for name, value in weights.items() if not torch.equal(value, seen[0][name])}
        expected = {name for name in weights if any(name.startswith(f"{done}.") for done in found.layers[:step])}
        assert changed == expected


def test_a_method_that_does_not_look_at_the_host_stays_the_same():
    found = cascading_randomisation(tiny(), images(2), blind)
    torch.testing.assert_close(found.rank_correlation, torch.ones(5, 2))
    torch.testing.assert_close(found.ssim, torch.ones(5, 2))
    assert cascading_randomisation(tiny(), images(2), even).rank_correlation.isnan().all()


def test_a_method_that_shows_the_weights_by_hand():
    from scipy.stats import spearmanr

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 2))

    def weights(model, x, target):
        return model[1].weight[target].view(-1, 3, 12, 12).sum(1)

    target = torch.tensor([0, 1, 1])
    found = cascading_randomisation(model, images(3, 12), weights, target, seed=4)
    assert found.layers == ("1",)
    fresh = nn.Linear(3 * 12 * 12, 2)
    draw_again(fresh, 4 * 1_000_003 + 2)  # the third of the host's modules
    old, new = (m.weight.detach().view(2, 3, 144).sum(1) for m in (model[1], fresh))
    expected = [spearmanr(old[c], new[c]).statistic for c in target]
    np.testing.assert_allclose(found.rank_correlation[0], expected, atol=1e-6)


def test_draws_depend_on_the_seed_and_the_place_alone():
    model, x = tiny(), images(2)
    names = ["stem", "stages", "fc"]
    there, back = (cascading_randomisation(model, x, gradient, layers=order) for order in (names, names[::-1]))
    torch.testing.assert_close(there.rank_correlation[-1], back.rank_correlation[-1])
    other = cascading_randomisation(model, x, gradient, layers=names, seed=1)
    assert (other.rank_correlation[-1] != there.rank_correlation[-1]).any()
    torch.manual_seed(17)
    again = cascading_randomisation(model, x, gradient, layers=names, batch_size=1)
    torch.testing.assert_close(again.rank_correlation, there.rank_correlation)


def test_modules_are_initialised_by_their_own_rule_and_the_rest_is_shuffled():
    norm = nn.BatchNorm2d(4)
    norm.weight.data.fill_(3)
    norm.running_mean.fill_(5)
    draw_again(norm, 0)
    assert norm.weight.tolist() == [1] * 4 and norm.running_mean.tolist() == [0] * 4
    linear = nn.Linear(6, 5)
    expected = torch.empty_like(linear.weight)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        nn.init.kaiming_uniform_(expected, a=5**0.5)
    draw_again(linear, 9)
    torch.testing.assert_close(linear.weight.detach(), expected)
    attention = nn.MultiheadAttention(4, 2)
    before, inside = attention.in_proj_weight.detach().clone(), attention.out_proj.weight.detach().clone()
    draw_again(attention, 0)
    assert not torch.equal(attention.in_proj_weight, before)
    torch.testing.assert_close(
        attention.in_proj_weight.detach().flatten().sort().values, before.flatten().sort().values
    )
    assert torch.equal(attention.out_proj.weight, inside)  # a layer of its own


def test_broken_maps_of_a_randomised_host_are_undefined_not_an_error():
    model, x = tiny(), images(2)
    own = model.fc.weight.detach().clone()

    def overflows(model, x, target):
        maps = blind(model, x, target)
        return maps if torch.equal(model.fc.weight, own) else maps * torch.nan

    assert cascading_randomisation(model, x, overflows).rank_correlation.isnan().all()
    with pytest.raises(ValueError, match="maps must be finite"):
        cascading_randomisation(model, x, lambda *_: blind(*_) * torch.nan)


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="has no layer 'stage.1'; did you mean 'stages.1'"):
        cascading_randomisation(tiny(), images(1), gradient, layers=["stage.1"])
    with pytest.raises(ValueError, match="at least one layer with parameters, got none"):
        cascading_randomisation(tiny(), images(1), gradient, layers=[])
    with pytest.raises(ValueError, match="layer 'act' has no parameters to randomise"):
        cascading_randomisation(tiny(), images(1), gradient, layers=["fc", "act"])
    with pytest.raises(TypeError, match=r"layers must be a list of names, got the string 'fc'; write \['fc'\]"):
        cascading_randomisation(tiny(), images(1), gradient, layers="fc")
    with pytest.raises(TypeError, match=r"explain must be a function \(model, x, target\) -> maps, got 'saliency'"):
        cascading_randomisation(tiny(), images(1), "saliency")


def test_a_module_of_two_names_goes_by_either():
    host = tiny()
    host.again = host.fc
    one, other = (cascading_randomisation(host, images(1), gradient, layers=[name]) for name in ("fc", "again"))
    assert torch.equal(one.rank_correlation, other.rank_correlation)
    assert float(one.rank_correlation) < 0.99


def test_label_randomisation():
    model, other, x = tiny(), tiny(seed=1), images(3)
    same = label_randomisation(model, model, x, gradient)
    torch.testing.assert_close(same.rank_correlation, torch.ones(1, 3))
    found = label_randomisation(model, other, x, gradient)
    target = model(x).argmax(1)
    expected = rank_correlation(gradient(model, x, target), gradient(other, x, target))
    torch.testing.assert_close(found.rank_correlation[0], expected)
    assert found.layers == ("labels",) and (found.rank_correlation < 0.9).all()


# The class.


def oracle(masks, labels, swap=False):
    """Maps that are the mask of the class that is asked for, or of the other one."""

    def explain(model, x, target):
        place = (labels[: len(x)] == target[:, None]).int().argmax(1)
        return masks[torch.arange(len(x)), 1 - place if swap else place][:, None].float()

    return explain


def test_energy_moves_to_the_object_of_the_class():
    drawn = Synthetic(3, 32, pairs=True).batch(range(3))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    settings = {"target": drawn.label[:, 0], "other": drawn.label[:, 1], "masks": drawn.mask}
    for explain, expected in (
        (oracle(drawn.mask, drawn.label), 1.0),
        (oracle(drawn.mask, drawn.label, swap=True), -1.0),
        (blind, 0.0),
    ):
        found = target_sensitivity(model, drawn.image, explain, **settings)
        torch.testing.assert_close(found.towards, torch.full((3,), expected))
    torch.testing.assert_close(found.change, torch.zeros(3), atol=1e-6, rtol=0)


def test_energy_by_hand():
    masks = torch.zeros(1, 2, 12, 12, dtype=torch.bool)
    masks[0, 0, :, :3] = masks[0, 1, :, 9:] = True

    def explain(model, x, target):
        maps = torch.zeros(len(x), 12, 12)
        # Class 0: 50 % on its own object, 20 % on the other; class 1: 40 % on the other, 60 % on its own.
        shares = {0: (0.5, 0.2), 1: (0.4, 0.6)}[int(target[0])]
        maps[:, 0, 0], maps[:, 0, 11], maps[:, 0, 5] = *shares, 1 - sum(shares)
        return maps

    found = target_sensitivity(tiny(), images(1, 12), explain, 0, other=1, masks=masks)
    torch.testing.assert_close(found.towards, torch.tensor([((0.5 - 0.4) + (0.6 - 0.2)) / 2]))


def test_the_runner_up_is_the_second_class():
    model, x, asked = tiny(), images(3), []

    def watch(model, x, target):
        asked.append(target.clone())
        return gradient(model, x, target)

    found = target_sensitivity(model, x, watch)
    best = model(x).topk(2).indices
    assert torch.equal(asked[0], best[:, 0]) and torch.equal(asked[1], best[:, 1])
    expected = 1 - rank_correlation(gradient(model, x, best[:, 0]), gradient(model, x, best[:, 1]))
    torch.testing.assert_close(found.change, expected)
    assert found.towards is None
    assert target_sensitivity(model, x, even).change.isnan().all()


def test_target_sensitivity_refuses_what_makes_no_sense():
    model, x = tiny(), images(2)
    with pytest.raises(ValueError, match="other must differ from target in every image, got the same class in 2"):
        target_sensitivity(model, x, gradient, 1, other=1)
    with pytest.raises(ValueError, match=r"masks must have shape \(2, 2, 24, 24\).*got \(2, 1, 24, 24\)"):
        target_sensitivity(model, x, gradient, masks=torch.ones(2, 1, 24, 24, dtype=torch.bool))
    with pytest.raises(TypeError, match="masks must be a bool tensor"):
        target_sensitivity(model, x, gradient, masks=torch.ones(2, 2, 24, 24))
    single = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 1))
    with pytest.raises(ValueError, match="two or more classes, got 1"):
        target_sensitivity(single, x, gradient)


# Seeds.


def test_seed_correlation_is_the_mean_over_pairs():
    def noise(model, x, target, seed):
        return random_maps(len(x), x.shape[2], seed) + blind(model, x, target)

    model, x = tiny(), images(2)
    explains = [functools.partial(noise, seed=s) for s in range(3)]
    maps = [explain(model, x, None) for explain in explains]
    pairs = [rank_correlation(maps[i], maps[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(seed_correlation(model, x, explains), sum(pairs) / 3)
    torch.testing.assert_close(seed_correlation(model, x, [gradient, gradient]), torch.ones(2))
    with pytest.raises(ValueError, match="two or more callables, one for each seed, got 1 of them"):
        seed_correlation(model, x, [gradient])
    with pytest.raises(ValueError, match="got function"):
        seed_correlation(model, x, gradient)


# The registry.


def test_chance_does_not_favour_fine_maps():
    """Maps that have nothing to do with each other score 0 in the mean, on a coarse grid as on a fine one."""
    draws = torch.Generator().manual_seed(0)

    def noise(model, x, target, cells):
        coarse = torch.randn(len(x), 1, cells, cells, generator=draws)
        return nn.functional.interpolate(coarse, size=x.shape[2:], mode="bilinear")

    model, x = Brightness(), torch.randn(300, 3, 24, 24, generator=draws)
    for cells in (4, 24):
        explain = functools.partial(noise, cells=cells)
        found = METRICS.get("model_randomisation")(Case(model, x, explain(model, x, None), explain=explain))
        assert found.mean().abs() < 0.05


def test_registered_metrics_are_the_functions():
    model, x = tiny(), images(3)
    target = model(x).argmax(1)
    case = Case(model, x, gradient(model, x, target), explain=gradient, seed=2)
    cascade = cascading_randomisation(model, x, gradient, seed=2)
    torch.testing.assert_close(METRICS.get("model_randomisation")(case), cascade.rank_correlation[-1])
    torch.testing.assert_close(METRICS.get("target_sensitivity")(case), target_sensitivity(model, x, gradient).change)
    for modification in ("patch", "low_frequency", "high_frequency"):
        found = input_modification_consistency(model, x, gradient, modification=modification, seed=2)
        expected = found.cosine.nanmean(0)
        torch.testing.assert_close(METRICS.get(f"consistency_{modification}")(case), expected, equal_nan=True)


def test_every_metric_is_in_the_docs():
    page = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    page = page.split("## All registered metrics")[1].split("## ")[0]
    listed = {line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")}
    assert listed == set(METRICS)


def test_the_rank_correlation_of_a_large_map_with_itself_is_one():
    maps = torch.randn(2, 1, 512, 512, generator=torch.Generator().manual_seed(0)).clamp_min(0)
    assert rank_correlation(maps, maps).tolist() == pytest.approx([1, 1], abs=1e-7)
