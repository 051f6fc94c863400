import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from ib_explain.metrics import (
    METRICS,
    Case,
    Probe,
    dc,
    degradation,
    degradation_area,
    deletion,
    ic,
    insertion,
    insertion_deletion,
    register_metric,
    sensitivity_n,
)
from ib_explain.metrics.base import FAMILIES
from tests.perturbing import Weighted, noise_and_maps, ones, small_net


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def batch():
    return noise_and_maps()


# RISE, written again: one image, one step at a time.


def rise_curve(model, image, saliency, mode, step):
    side = image.shape[-1]
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = np.zeros((3, 3, 11, 11))
    kernel[0, 0] = kernel[1, 1] = kernel[2, 2] = ndimage.gaussian_filter(impulse, 5)
    kernel = torch.from_numpy(kernel.astype("float32"))
    with torch.no_grad():
        target = model(image[None]).argmax(1).item()
        steps = math.ceil(side * side / step)
        if mode == "del":
            start, finish = image.clone(), torch.zeros_like(image)
        else:
            start, finish = nn.functional.conv2d(image[None], kernel, padding=5)[0], image.clone()
        start, finish = start.reshape(3, -1).clone(), finish.reshape(3, -1)
        order = np.argsort(-saliency.numpy().reshape(-1), kind="stable")
        scores = np.empty(steps + 1)
        for i in range(steps + 1):
            scores[i] = model(start.reshape(1, 3, side, side)).softmax(1)[0, target].item()
            if i < steps:
                pixels = order[step * i : step * (i + 1)]
                start[:, pixels] = finish[:, pixels]
    return scores, (scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


@pytest.mark.parametrize("step", [24, 100])  # the second leaves a shorter last step
@pytest.mark.parametrize(("metric", "mode"), [(insertion, "ins"), (deletion, "del")])
def test_rise_written_again_gives_the_same_curves(net, batch, metric, mode, step):
    x, maps = batch
    maps[1] = maps[1].round(decimals=1)  # many ties
    curve = metric(net, x, maps, pixels_per_step=step)
    for i in range(len(x)):
        scores, auc = rise_curve(net, x[i], maps[i, 0], mode, step)
        np.testing.assert_allclose(curve.scores[i].numpy(), scores, atol=1e-6, rtol=0)
        assert curve.auc[i].item() == pytest.approx(auc, abs=1e-6)


def test_default_step_is_that_of_the_papers_averages(net):
    x = torch.randn(1, 3, 224, 224)
    curve = deletion(net, x, torch.rand(1, 1, 224, 224))
    assert curve.scores.shape == (1, 29)
    torch.testing.assert_close(curve.fractions, torch.arange(29) / 28)


# Closed forms.


def test_curves_of_a_linear_model_are_partial_sums():
    x, maps = ones(4, 3, 2, 1)
    model = Weighted([[0.1, 0.2, 0.3, 0.4]])
    removed = deletion(model, x, maps, 0, steps=4, score="logit")
    torch.testing.assert_close(removed.scores, torch.tensor([[1.0, 0.9, 0.7, 0.4, 0]]))
    torch.testing.assert_close(removed.auc, torch.tensor([(0.5 + 0.9 + 0.7 + 0.4) / 4]))
    inserted = insertion(model, x, maps, 0, fill="zero", steps=4, score="logit")
    torch.testing.assert_close(inserted.scores, 1 - removed.scores)
    assert removed.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_two_pixels():
    x, maps = ones(1, 2)
    model = Weighted([[math.log(3), math.log(9)]])
    curve = deletion(model, x, maps, 0, steps=2)  # the second pixel goes first
    torch.testing.assert_close(curve.scores, torch.tensor([[27 / 28, 3 / 4, 1 / 2]]))


# Degradation.


def test_degradation_of_a_linear_model():
    x = torch.zeros(1, 3, 4, 4)
    x[0, 0, :2, :2], x[0, 0, :2, 2:], x[0, 0, 2:, :2] = 8, 4, 2  # tiles of 2 x 2; mean 3.5
    maps = x[:, :1].clone()
    weights = torch.zeros(4, 4)
    weights[0, 0] = weights[0, 2] = weights[2, 0] = weights[2, 2] = 1  # one pixel of each tile: 8 + 4 + 2 + 0
    weights[0, 0] = 2
    model = Weighted(weights)
    morf = degradation(model, x, maps, 0, tile=2, score="logit")
    torch.testing.assert_close(morf.scores, torch.tensor([[22.0, 13, 12.5, 14, 17.5]]))
    lerf = degradation(model, x, maps, 0, tile=2, score="logit", order="lerf")
    torch.testing.assert_close(lerf.scores, torch.tensor([[22.0, 25.5, 27, 26.5, 17.5]]))
    torch.testing.assert_close(morf.fractions, torch.arange(5) / 4)
    area = degradation_area(model, x, maps, 0, tile=2, score="logit")
    torch.testing.assert_close(area, torch.tensor([(79 - 39.5) / 4 / (22 - 17.5)]))


def test_area_between_is_zero_without_order_and_turns_with_the_map(net, batch):
    x, maps = batch
    target = net(x).argmax(1)
    area = degradation_area(net, x, maps, target)
    torch.testing.assert_close(degradation_area(net, x, -maps, target), -area)
    for value in (1.0, 0.1, 0.3, 1e-30, 1e37):  # whose means over tiles that are cut must not differ by rounding
        constant = degradation_area(net, x, torch.full_like(maps, value), target, tile=5)
        assert (constant[~constant.isnan()] == 0).all()
    assert (degradation(net, x, torch.full_like(maps, 0.1), target, tile=5).tied == 1).all()


def test_area_is_undefined_where_the_degraded_image_scores_higher():
    x, maps = torch.tensor([[[[1.0, 0]]], [[[0.0, 0]]]]).expand(2, 3, 1, 2), torch.tensor([[[1.0, 0]]]).expand(2, 1, 2)
    area = degradation_area(Weighted([[-1.0, 0]]), x, maps, 0, tile=1)
    assert area.isnan().all()  # below in the first image, equal in the second
    assert degradation_area(Weighted([[1.0, 0]]), x, maps, 0, tile=1).isnan().tolist() == [False, True]


def test_cut_tiles_and_number_of_points(net, batch):
    x, maps = batch
    assert degradation(net, x, maps, tile=7).scores.shape == (3, 17)  # 4 x 4 tiles, the last ones 3 pixels wide
    assert degradation(net, x, maps, tile=1).scores.shape == (3, 101)
    assert degradation(net, x, maps, tile=99).scores.shape == (3, 2)


# Sensitivity-n.


# What holds for all of them.

EACH = {
    "insertion": insertion,
    "deletion": deletion,
    "ic": ic,
    "dc": dc,
    "degradation": degradation,
    "degradation_area": degradation_area,
    "sensitivity_n": lambda *args, **settings: sensitivity_n(*args, fractions=(0.1, 0.5), sets=7, **settings),
}


def numbers(result):
    return result if isinstance(result, torch.Tensor) else result.auc


@pytest.mark.parametrize("metric", EACH.values(), ids=EACH)
def test_batch_size_changes_no_result_and_bounds_every_pass(net, batch, metric):
    sizes = []
    with net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
        whole = numbers(metric(net, *batch))
        for batch_size in (1, 2, 5):
            sizes.clear()
            torch.testing.assert_close(
                numbers(metric(net, *batch, batch_size=batch_size)), whole, atol=1e-3, rtol=0, equal_nan=True
            )
            assert max(sizes) == batch_size


@pytest.mark.parametrize("metric", EACH.values(), ids=EACH)
def test_a_batch_is_its_images(net, batch, metric):
    x, maps = batch
    whole = numbers(metric(net, x, maps))
    each = torch.cat([numbers(metric(net, x[i : i + 1], maps[i])) for i in range(3)])
    torch.testing.assert_close(whole, each, atol=1e-3, rtol=0, equal_nan=True)
    assert whole.shape == (3,) and whole.dtype == torch.float32 and not whole.requires_grad


@pytest.mark.parametrize("metric", [insertion, deletion, degradation], ids=["insertion", "deletion", "degradation"])
def test_only_the_order_of_the_map_counts(net, batch, metric):
    x, maps = batch
    maps = (maps * 1000).round()  # exact in float32 after doubling
    torch.testing.assert_close(metric(net, x, maps).scores, metric(net, x, 2 * maps - 512).scores)


@pytest.mark.parametrize("metric", EACH.values(), ids=EACH)
def test_the_host_comes_back_as_it_was(net, batch, metric):
    net.train()
    net[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    metric(net, *batch)
    assert [m.training for m in net] == [False, True, True, True, True]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())

    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken host")

    broken = nn.Sequential(Breaks()).train()
    with pytest.raises(RuntimeError, match="broken host"):
        metric(broken, *batch)
    assert broken.training and broken[0].training


@pytest.mark.parametrize("metric", EACH.values(), ids=EACH)
def test_bad_maps_are_named(net, batch, metric):
    x, maps = batch
    with pytest.raises(ValueError, match="maps must be finite, got 1 NaN"):
        metric(net, x, maps.clone().index_put_((torch.tensor(0),) * 4, torch.tensor(math.nan)))
    with pytest.raises(ValueError, match=r"images' size \(24, 24\), got \(12, 12\)"):
        metric(net, x, maps[:, :, :12, :12])
    with pytest.raises(ValueError, match="each of the 3 images, got 2"):
        metric(net, x, maps[:2])
    with pytest.raises(IndexError, match="target class 7 is out of range"):
        metric(net, x, maps, 7)
    with pytest.raises(ValueError, match="unknown score 'logits'; did you mean 'logit'"):
        metric(net, x, maps, score="logits")
    with pytest.raises(ValueError, match="unknown fill 'means'; did you mean 'mean'"):
        metric(net, x, maps, fill="means")
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        metric(net, x, maps, batch_size=0)


def test_bad_settings_are_named(net, batch):
    with pytest.raises(ValueError, match="unknown order 'mrof'; did you mean 'morf'"):
        degradation(net, *batch, order="mrof")
    with pytest.raises(ValueError, match="tile must be an integer >= 1, got 0"):
        degradation(net, *batch, tile=0)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        deletion(net, *batch, steps=0)
    with pytest.raises(ValueError, match="either steps or pixels_per_step"):
        insertion(net, *batch, steps=3, pixels_per_step=3)
    with pytest.raises(ValueError, match=r"fractions must be one or more numbers in \(0, 1\), got \(1.5,\)"):
        sensitivity_n(net, *batch, fractions=[1.5])


def test_constant_maps_are_valid_and_wholly_tied(net, batch):
    x, maps = batch
    maps[0], maps[1] = 0, 3
    for metric in (insertion, deletion, degradation):
        curve = metric(net, x, maps)
        assert curve.tied[:2].tolist() == [1, 1] and curve.tied[2] < 0.1
        assert curve.auc.isfinite().all()
    ramp = -torch.arange(24.0 * 24).view(1, 1, 24, 24)  # the pixel order itself
    torch.testing.assert_close(deletion(net, x[:1], maps[:1]).scores, deletion(net, x[:1], ramp).scores)


# The registry.


def test_metrics_are_listed_by_family_in_whatever_order_their_files_are_read():
    families = [METRICS.get(name).family for name in METRICS]
    assert families == sorted(families, key=FAMILIES.index) and set(families) == set(FAMILIES)


def test_a_case_asks_only_once(batch):
    x, maps = batch
    model = Weighted(torch.randn(24, 24) / 100)
    case = Case(model, x, maps, batch_size=3)
    METRICS.get("insertion")(case)
    METRICS.get("deletion")(case)
    inner = 2 * 2  # 576 pixels in steps of 192: 2 points between the ends, for each curve
    assert len(model.sizes) == 1 + 2 + inner  # the intact images, two fills
    METRICS.get("ic")(case), METRICS.get("dc")(case)
    assert len(model.sizes) == 1 + 2 + inner


def test_registered_scores_are_those_of_the_functions(net, batch):
    case = Case(net, *batch, target=2, seed=3)
    expected = {
        "insertion": insertion(net, *batch, 2).auc,
        "deletion": deletion(net, *batch, 2).auc,
        "ic": ic(net, *batch, 2),
        "dc": dc(net, *batch, 2),
        "degradation_8": degradation_area(net, *batch, 2),
        "degradation_14": degradation_area(net, *batch, 2, tile=14),
        "sensitivity_n": sensitivity_n(net, *batch, 2, seed=3).auc,
    }
    for name, scores in expected.items():
        torch.testing.assert_close(METRICS.get(name)(case), scores, equal_nan=True)


def test_every_metric_has_a_line_and_facts():
    for name, summary in METRICS.summaries().items():
        metric = METRICS.get(name)
        assert metric.name == name and summary.endswith(".") and len(summary) < 140
        assert metric.family and metric.unit and isinstance(metric.higher_is_better, bool)


def test_a_case_that_lacks_something_says_what(net, batch):
    with pytest.raises(ValueError, match="metric 'insertion' needs model, maps; the case lacks maps"):
        METRICS.get("insertion")(Case(net, batch[0]))
    with pytest.raises(ValueError, match="give model and x together"):
        Case(net, maps=batch[1])
    with pytest.raises(ValueError, match="unknown metric 'insertions'; did you mean 'insertion'"):
        METRICS.get("insertions")
    with pytest.raises(ValueError, match="metric 'x' needs 'mask', which a Case has not"):
        register_metric("x", family="complexity", unit="share", higher_is_better=True, needs=("mask",))
    with pytest.raises(ValueError, match="metric 'x' needs 'seed', which is always there and is not named; known: "):
        register_metric("x", family="complexity", unit="share", higher_is_better=True, needs=("x", "seed"))
    with pytest.raises(ValueError, match="metric 'x' has the unknown family 'costs'; did you mean 'cost'"):
        register_metric("x", family="costs", unit="share", higher_is_better=True)


def test_both_curves_share_their_ends(batch):
    x, maps = batch
    model = Weighted(torch.randn(24, 24) / 100)
    inserted, deleted = insertion_deletion(model, x, maps, steps=4, batch_size=1)
    assert sum(model.sizes) == 3 * (2 + 3 + 3)
    torch.testing.assert_close(inserted.scores, insertion(model, x, maps, fill="zero", steps=4).scores)
    torch.testing.assert_close(deleted.scores, deletion(model, x, maps, steps=4).scores)


def test_probe_shares_the_fully_replaced_image(batch):
    model = Weighted(torch.randn(24, 24) / 100)
    probe = Probe(model, batch[0], batch_size=2)
    assert model.sizes == [2, 1]
    for _ in range(2):
        probe.filled("zero")
        probe.filled("zero", "logit")
    assert model.sizes == [2, 1, 2, 1]


def test_area_is_undefined_where_scores_differ_by_rounding_alone():
    x, maps = ones(1.0, 0.0)
    model = Weighted([[2e-6, 0.0]], bias=10.0)  # 10.000002 to 10.000001: one unit in the last place
    assert degradation_area(model, x, maps, 0, tile=1, score="logit").isnan().all()


def test_eight_rows_a_step_by_default():
    x, maps = torch.rand(1, 3, 32, 16), torch.rand(1, 1, 32, 16)
    curve = insertion(nn.Sequential(nn.Flatten(), nn.Linear(3 * 512, 2)), x, maps)
    torch.testing.assert_close(curve.fractions, torch.arange(5) / 4)
