"""Localisation scores by hand, against loops, and where they are undefined; boxes, densities, the centre prior."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from ib_explain.metrics.base import METRICS, Case
from ib_explain.metrics.ground_truth import (
    boxes_to_masks,
    centred_gaussian,
    fixation_pixels,
    fixations_to_density,
    other_fixations,
)
from ib_explain.metrics.localisation import (
    best_iou,
    effective_heat_ratio,
    energy_inside,
    pointing_game,
    relative_to_centre,
    top_share,
)

MEASURES = [pointing_game, energy_inside, top_share, effective_heat_ratio, best_iou]
RANKING = [pointing_game, top_share, best_iou]


def as_map(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[None, None]


def as_mask(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows)[None, None].bool()


def random_case(batch: int = 6, size: tuple[int, int] = (9, 13), levels: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(batch, 1, *size, generator=generator)
    if levels:
        maps = (maps * levels).floor() / levels
    return maps, torch.rand(batch, 1, *size, generator=generator) < 0.3


# By hand.

MAP = as_map([[4.0, 2.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("measure", "mask", "expected"),
    [
        (pointing_game, [[1, 0], [0, 0]], 1.0),
        (pointing_game, [[0, 1], [1, 1]], 0.0),
        (energy_inside, [[0, 1], [0, 1]], 3 / 8),
        (top_share, [[1, 0], [1, 0]], 0.5),
        # n = 3: places for 4 and 2, the third is a tie of two pixels, one of them inside.
        (top_share, [[1, 1], [1, 0]], (2 + 1 / 2) / 3),
        # Thresholds 4, 2, 1 take 1, 2, 4 pixels: IoU 1/3, 1/4, 3/4 on the left, never 2/3 by cutting the tie.
        (best_iou, [[1, 0], [1, 1]], 3 / 4),
        (best_iou, [[1, 1], [0, 0]], 1.0),
    ],
)
def test_by_hand(measure, mask, expected):
    torch.testing.assert_close(measure(MAP, as_mask(mask)), torch.tensor([expected]))


def test_negative_evidence_is_ranked_last_and_adds_no_heat():
    signed = as_map([[3.0, -9.0], [1.0, 0.0]])
    mask = as_mask([[1, 1], [0, 0]])
    assert energy_inside(signed, mask).item() == 0.75
    assert top_share(signed, mask).item() == 0.5
    assert best_iou(signed, mask).item() == pytest.approx(0.5)
    # All-negative: there is no heat, but there is a ranking.
    assert math.isnan(energy_inside(-MAP, mask).item())
    assert pointing_game(-MAP, as_mask([[0, 0], [1, 0]])).item() == 1  # first of the two maxima in pixel order
    assert pointing_game(-MAP, as_mask([[0, 0], [0, 1]])).item() == 0


def test_pointing_tolerance_is_euclidean_and_inclusive():
    heat = torch.zeros(1, 1, 9, 9)
    heat[0, 0, 4, 4] = 1
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[0, 0, 8, 7] = True  # 4 down, 3 to the right: distance 5
    assert pointing_game(heat, mask, tolerance=4.99).item() == 0
    assert pointing_game(heat, mask, tolerance=5).item() == 1
    with pytest.raises(ValueError, match=r"tolerance \(in pixels\) must be a finite number >= 0, got -1"):
        pointing_game(heat, mask, tolerance=-1)


def test_effective_heat_ratio_by_hand():
    # Two kept values 1 and 0.5 (0.05 is under the floor): the quantile q is 0.5 + q/2, at 0 both pixels pass, from 0.1
    # on the larger alone. Ratios: (1 + 0)/2 at 0, then 1.
    heat = as_map([[1.0, 0.5], [0.05, 0.0]])
    expected = 0.1 * (0.5 + 1) / 2 + 0.9
    assert effective_heat_ratio(heat, as_mask([[1, 0], [0, 0]])).item() == pytest.approx(expected)
    assert effective_heat_ratio(heat * 7, as_mask([[1, 0], [0, 0]])).item() == pytest.approx(expected)
    # Thresholds stop at 0.99 of the maximum: what is nearly as high always passes with it.
    nearly = as_map([[1.0, 0.995], [0.0, 0.0]])
    assert effective_heat_ratio(nearly, as_mask([[1, 0], [0, 0]])).item() == pytest.approx(0.5)
    # An even map keeps its share of the mask at each threshold.
    assert effective_heat_ratio(torch.ones(1, 1, 2, 2), as_mask([[1, 0], [0, 0]])).item() == pytest.approx(0.25)


# Against loops written from the definitions.


def slow_iou(heat: np.ndarray, mask: np.ndarray) -> float:
    return max(((heat >= t) & mask).sum() / ((heat >= t) | mask).sum() for t in np.unique(heat))


def slow_ratio(heat: np.ndarray, mask: np.ndarray) -> float:
    heat = heat / heat.max()
    kept = heat[heat >= 0.1]
    ratios = []
    for tenth in range(11):
        # As np.quantile, but its rounding of q * (n - 1) moves a threshold off the value that it falls on.
        place = Fraction(tenth * (kept.size - 1), 10)
        low, high = np.sort(kept)[[math.floor(place), math.ceil(place)]]
        threshold = min(low + (high - low) * float(place % 1), 0.99)
        assert threshold == pytest.approx(min(np.quantile(kept, tenth / 10), 0.99))
        ratios.append(heat[(heat >= threshold) & mask].sum() / (heat >= threshold).sum())
    return sum((a + b) / 2 * 0.1 for a, b in zip(ratios[1:], ratios[:-1], strict=True))


def slow_share(heat: np.ndarray, mask: np.ndarray, orders: int = 4000) -> float:
    """Mean over random orders of the ties."""
    rng = np.random.default_rng(0)
    area = mask.sum()
    shares = [mask.flat[np.lexsort((rng.random(heat.size), -heat.ravel()))[:area]].mean() for _ in range(orders)]
    return float(np.mean(shares))


@pytest.mark.parametrize("levels", [None, 4])
def test_agrees_with_loops(levels):
    maps, masks = random_case(levels=levels)
    pairs = [(m[0].double().numpy(), k[0].numpy()) for m, k in zip(maps, masks, strict=True)]
    for fast, slow in ((best_iou, slow_iou), (effective_heat_ratio, slow_ratio)):
        expected = torch.tensor([slow(heat, mask) for heat, mask in pairs], dtype=torch.float32)
        torch.testing.assert_close(fast(maps, masks), expected, rtol=1e-6, atol=1e-6)


def test_ties_at_the_cut_count_by_the_mean_over_their_orders():
    maps, masks = random_case(batch=2, levels=4)
    expected = torch.tensor([slow_share(m[0].numpy(), k[0].numpy()) for m, k in zip(maps, masks, strict=True)])
    torch.testing.assert_close(top_share(maps, masks), expected.float(), rtol=0, atol=6e-3)


# Properties.


@pytest.mark.parametrize("measure", MEASURES)
def test_scores_are_per_image_free_of_scale_and_in_range(measure):
    maps, masks = random_case()
    scores = measure(maps, masks)
    assert scores.shape == (6,)
    assert scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all()
    torch.testing.assert_close(measure(maps * 16, masks), scores)
    torch.testing.assert_close(measure(maps[:, 0], masks[:, 0]), scores)  # (B, H, W)
    torch.testing.assert_close(torch.cat([measure(maps[i : i + 1], masks[i : i + 1]) for i in range(6)]), scores)
    torch.testing.assert_close(measure(maps.flip(-1), masks.flip(-1)), scores)


@pytest.mark.parametrize("measure", MEASURES)
def test_perfect_and_worst_map(measure):
    _, masks = random_case()
    torch.testing.assert_close(measure(masks.float(), masks), torch.ones(6))
    worst = measure((~masks).float(), masks)
    # The lowest threshold takes the whole image, so the best IoU never falls under the mask's share.
    floor = masks.double().mean(dim=(1, 2, 3)).float() if measure is best_iou else torch.zeros(6)
    torch.testing.assert_close(worst, floor)


@pytest.mark.parametrize("measure", RANKING)
def test_ranking_scores_ignore_monotone_changes(measure):
    maps, masks = random_case()
    torch.testing.assert_close(measure((maps * 3 - 1).exp(), masks), measure(maps, masks))


@pytest.mark.parametrize("measure", MEASURES)
def test_undefined_is_nan(measure):
    maps, masks = random_case()
    nothing, everything = torch.zeros_like(masks), torch.ones_like(masks)
    assert measure(maps, nothing).isnan().all()
    if measure is not effective_heat_ratio:
        torch.testing.assert_close(measure(maps, everything), torch.ones(6))
    assert measure(torch.zeros_like(maps), masks).isnan().all()
    constant = measure(torch.full_like(maps, 0.1), masks)
    if measure in RANKING:
        assert constant.isnan().all()
    else:
        torch.testing.assert_close(constant, masks.double().mean(dim=(1, 2, 3)).float())
    # One undefined image does not touch the others.
    maps[2] = 0
    assert measure(maps, masks).isnan().tolist() == [False, False, True, False, False, False]


def test_a_resized_constant_map_is_constant():
    grid = torch.full((1, 1, 7, 7), 0.7)
    resized = torch.nn.functional.interpolate(grid, size=(37, 53), mode="bilinear")
    assert resized.min() != resized.max(), "the test needs an interpolation that rounds"
    mask = torch.rand(1, 1, 37, 53, generator=torch.Generator().manual_seed(0)) < 0.5
    assert best_iou(resized, mask).isnan().all()


def test_relative_to_the_centre():
    masks = boxes_to_masks(torch.tensor([[20, 20, 43, 43], [0, 0, 9, 9]]), (64, 64))
    centre = centred_gaussian((64, 64)).expand(2, -1, -1, -1)
    for measure in MEASURES[1:]:
        torch.testing.assert_close(relative_to_centre(measure, centre[:1], masks[:1]), torch.ones(1))
    even = relative_to_centre(energy_inside, torch.ones(2, 1, 64, 64), masks)
    # Closed form of the Gaussian's mass in the middle box, sigma 0.2 of the side, cut at the image's border.
    mass = (math.erf(12 / (12.8 * math.sqrt(2))) / math.erf(32 / (12.8 * math.sqrt(2)))) ** 2
    assert even[0].item() == pytest.approx((24 / 64) ** 2 / mass, rel=2e-3)
    assert even[1] > 1
    # The Gaussian misses the corner box: there is nothing to divide by.
    pointing = relative_to_centre(functools.partial(pointing_game, tolerance=2), centre, masks)
    assert pointing[0] == 1
    assert pointing[1].isnan()


@pytest.mark.parametrize("measure", MEASURES)
def test_registered_under_its_name(measure):
    maps, masks = random_case()
    metric = METRICS.get(measure.__name__)
    assert (metric.family, metric.higher_is_better) == ("localisation", True)
    assert METRICS.summaries()[measure.__name__] == measure.__doc__.split("\n")[0]
    torch.testing.assert_close(metric(Case(maps=maps, masks=masks)), measure(maps, masks))
    relative = METRICS.get(f"{measure.__name__}_relative")
    assert measure.__name__ in METRICS.summaries()[f"{measure.__name__}_relative"]
    torch.testing.assert_close(
        relative(Case(maps=maps, masks=masks)), relative_to_centre(measure, maps, masks), equal_nan=True
    )


# Bad input.


def test_bad_masks_and_maps():
    maps, masks = random_case()
    with pytest.raises(TypeError, match="masks must be a bool tensor of shape .*, got torch.float32"):
        energy_inside(maps, masks.float())
    with pytest.raises(TypeError, match="masks must be a bool tensor .*, got list"):
        energy_inside(maps, [masks])
    with pytest.raises(
        ValueError, match=r"masks must have the maps' batch and size \(6, 9, 13\), got shape \(1, 1, 9, 13\)"
    ):
        energy_inside(maps, masks[:1])
    with pytest.raises(ValueError, match="maps must be finite, got 1 NaN"):
        best_iou(maps.index_put((torch.tensor(0),) * 4, torch.tensor(math.nan)), masks)
    with pytest.raises(ValueError, match=r"floor must be a share of the maximum in \[0, 1\), got 1"):
        effective_heat_ratio(maps, masks, floor=1)


# Ground truth.


def test_boxes_hold_both_ends():
    masks = boxes_to_masks(torch.tensor([[1, 2, 3, 2], [0, 0, 4, 3]]), (4, 5))
    assert masks.shape == (2, 1, 4, 5)
    assert masks.dtype == torch.bool
    assert masks[0, 0].nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]
    assert masks[1].all()


def test_several_boxes_are_a_union_and_none_is_an_empty_mask():
    boxes = [torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2]]), torch.zeros(0, 4), torch.tensor([4, 3, 4, 3])]
    masks = boxes_to_masks(boxes, (4, 5))
    assert masks.sum(dim=(1, 2, 3)).tolist() == [4 + 4 - 1, 0, 1]
    assert masks[2, 0, 3, 4]


def test_fractional_boxes_take_pixels_whose_centre_is_inside():
    # Edges at 0.75 - 0.5 and 2.25 + 0.5 hold the centres 1 and 2; 0 and 3 stay outside.
    mask = boxes_to_masks(torch.tensor([[0.75, 0.0, 2.25, 0.0]]), (1, 4))
    assert mask.flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([3, 0, 2, 3], r"boxes must have an area, .*, got \(3, 0, 2, 3\) for image 0"),
        ([0, 0, 5, 3], r"boxes must lie inside of the image, 0 <= x <= 4 and 0 <= y <= 3, got \(0, 0, 5, 3\)"),
        ([-1, 0, 2, 2], "boxes must lie inside of the image"),
        ([0, math.nan, 2, 2], "boxes must lie inside of the image"),
        ([[0, 0, 2]], r"boxes of image 0 must have shape \(n, 4\) or \(4,\), got \(1, 3\)"),
    ],
)
def test_bad_boxes(box, message):
    with pytest.raises(ValueError, match=message):
        boxes_to_masks(torch.tensor([box], dtype=torch.float32), (4, 5))


def test_density_is_the_mean_of_gaussians_at_the_points():
    points = [torch.tensor([[3.25, 2.0], [3.25, 2.0], [10.0, 8.5]]), torch.zeros(0, 2)]
    density = fixations_to_density(points, (11, 14), sigma=1.5)
    assert density.shape == (2, 1, 11, 14)
    assert density.dtype == torch.float32
    y, x = torch.meshgrid(torch.arange(11.0), torch.arange(14.0), indexing="ij")
    slow = sum(torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.5**2)) for px, py in points[0].tolist())
    torch.testing.assert_close(density[0, 0], slow / slow.sum(), rtol=1e-5, atol=1e-9)
    assert density[1].eq(0).all()
    with pytest.raises(ValueError, match="sigma must be > 0 pixels, got 0"):
        fixations_to_density(points, (11, 14), sigma=0)


def test_density_agrees_with_a_blurred_point_image():
    from scipy import ndimage

    image = np.zeros((40, 50))
    image[12, 30] += 2
    image[20, 3] += 1
    blurred = ndimage.gaussian_filter(image, 2.0, mode="constant", truncate=8)
    ours = fixations_to_density([torch.tensor([[30.0, 12], [30, 12], [3, 20]])], (40, 50), sigma=2.0)
    np.testing.assert_allclose(ours[0, 0], blurred / blurred.sum(), atol=1e-6)


def test_fixations_go_to_the_nearest_pixel():
    index, valid = fixation_pixels([torch.tensor([[-0.5, 0.49], [3.5, 1.0]]), torch.zeros(0, 2)], (3, 5))
    assert index.tolist() == [[0, 5 + 4], [0, 0]]
    assert valid.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("point", [(4.5, 0.0), (0.0, 2.5), (-0.51, 0.0), (math.nan, 0.0)])
def test_fixations_outside_are_refused(point):
    with pytest.raises(
        ValueError, match=r"fixations must lie inside of the image, .* for image 1 \(1 outside in all\)"
    ):
        fixation_pixels([torch.zeros(1, 2), torch.tensor([[0.0, 0.0], point])], (3, 5))


def test_bad_fixations():
    with pytest.raises(TypeError, match="fixations must hold one torch.Tensor an image, got list"):
        fixation_pixels([[[0, 0]]], (3, 5))
    with pytest.raises(ValueError, match=r"fixations of image 0 must have shape \(n, 2\) for \(x, y\), got \(2,\)"):
        fixation_pixels([torch.zeros(2)], (3, 5))
    with pytest.raises(TypeError, match="fixations must hold one torch.Tensor an image, got NoneType"):
        fixation_pixels(None, (4, 4))
    with pytest.raises(TypeError, match=r"size must be the image's \(height, width\), got 24"):
        fixations_to_density([torch.zeros(1, 2)], 24, 2)
    with pytest.raises(ValueError, match="fixations must hold one tensor an image, got an empty list"):
        fixation_pixels([], (3, 5))


def test_others_are_all_but_ones_own():
    lists = [torch.tensor([[0.0, 0.0]]), torch.zeros(0, 2), torch.tensor([[1.0, 1.0], [1.0, 1.0]])]
    assert [rows.tolist() for rows in other_fixations(lists)] == [
        [[1, 1], [1, 1]],
        [[0, 0], [1, 1], [1, 1]],
        [[0, 0]],
    ]


def test_centred_gaussian():
    prior = centred_gaussian((60, 90))
    assert prior.shape == (1, 1, 60, 90)
    assert prior.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(prior, prior.flip(-1, -2))
    # One standard deviation from the middle, 0.2 of the width: down by exp(-1/2).
    ratio = prior[0, 0, 30, 45 + 18] / prior[0, 0, 30, 45]
    assert ratio.item() == pytest.approx(math.exp(-((18.5 / 18) ** 2 - (0.5 / 18) ** 2) / 2), rel=1e-5)
    with pytest.raises(ValueError, match=r"sigma must be > 0 \(a share of each side\), got -1"):
        centred_gaussian((4, 4), sigma=-1)


def test_a_value_at_the_floor_is_kept():
    maps, masks = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[[True, False]]])
    # Thresholds .5, .55, ..., .95, .99: at the first one two pixels are left, at the others one.
    assert effective_heat_ratio(maps, masks, floor=0.5).item() == pytest.approx(0.1 * (0.25 + 9 + 0.5))


def test_a_hit_where_the_centre_misses_is_no_infinity():
    maps, masks = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool)
    maps[0, 0, 0], masks[0, 0, 0] = 1, True
    assert relative_to_centre(pointing_game, maps, masks).isnan().all()


def test_outer_edges_of_boxes_are_half_open():
    wide = boxes_to_masks(torch.tensor([[0.5, 0.0, 1.5, 0.0]]), (1, 4))
    high = boxes_to_masks(torch.tensor([[0.0, 0.5, 0.0, 1.5]]), (4, 1))
    assert wide.flatten().tolist() == high.flatten().tolist() == [True, True, False, False]


def test_the_rounding_of_a_resize_is_no_box_outside():
    assert boxes_to_masks(torch.tensor([[-5e-4, 0.0, 4.0005, 3.0005]]), (4, 5)).all()


def test_a_fixation_between_two_pixels_is_of_the_second():
    index, _ = fixation_pixels([torch.tensor([[0.5, 2.5], [1.5, -0.5]])], (4, 4))
    assert index.tolist() == [[13, 2]]
