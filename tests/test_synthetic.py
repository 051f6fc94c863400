"""The pictures are what they claim: reproducible, balanced, and answerable only from the evidence."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.data import DataLoader

from ib_explain.data.synthetic import CLASS_NAMES, MEAN, STD, Synthetic, demo_host, render
from ib_explain.maps import pixel_order


@pytest.fixture(scope="module")
def singles():
    return Synthetic(480).batch(range(480))


@pytest.fixture(scope="module")
def host():
    return demo_host()


def test_a_picture_depends_on_seed_and_index_alone():
    one = Synthetic(40, seed=3).sample(37)
    many = Synthetic(1000, seed=3).batch([5, 37, 999])
    torch.testing.assert_close(many.image[1], one.image, rtol=0, atol=0)
    assert torch.equal(many.mask[1], one.mask) and many.label[1] == one.label
    assert not torch.equal(Synthetic(40, seed=4).sample(37).image, one.image)
    assert not torch.equal(many.image[0], many.image[1])


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Synthetic(8).sample(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_pictures_stay_what_they_are():
    # A change of these sums is a change of the data set: retrain demo_host and say so in the changelog.
    drawn = Synthetic(8).batch(range(8))
    assert drawn.label.tolist() == [3, 4, 2, 7, 1, 6, 5, 0]
    areas = torch.tensor([454, 324, 270, 286, 330, 253, 379, 368])
    means = torch.tensor([0.0870, 0.0345, -0.0277, -0.0906, -0.0162, -0.0042, 0.0768, 0.1894])
    torch.testing.assert_close(drawn.mask.sum(dim=(1, 2, 3)), areas, rtol=0, atol=2)
    torch.testing.assert_close(drawn.image.mean(dim=(1, 2, 3)), means, rtol=0, atol=1e-3)


def test_shapes_types_and_range(singles):
    assert singles.image.shape == (480, 3, 64, 64) and singles.image.dtype == torch.float32
    assert singles.mask.shape == (480, 1, 64, 64) and singles.mask.dtype == torch.bool
    assert singles.label.shape == (480,) and singles.label.dtype == torch.int64
    pixels = (singles.image * STD[0] + MEAN[0]) * 255
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), rtol=0, atol=1e-3)


def test_every_run_of_eight_holds_each_class_once(singles):
    runs = singles.label.view(-1, len(CLASS_NAMES))
    assert (runs.sort(dim=1).values == torch.arange(len(CLASS_NAMES))).all()
    assert len({tuple(run) for run in runs.tolist()}) > 50  # not the same order each time


def test_size_scales_the_same_scene():
    small, large = Synthetic(24).batch(range(24)), Synthetic(24, size=128).batch(range(24))
    assert torch.equal(small.label, large.label)
    reduced = torch.nn.functional.avg_pool2d(large.mask.float(), 2)
    assert ((reduced > 0.5) != small.mask).float().mean() < 0.005


def test_masks_hold_one_object_of_plausible_area(singles):
    area = singles.mask.float().mean(dim=(1, 2, 3))
    assert area.min() > 0.02 and area.max() < 0.15
    by_class = torch.stack([area[singles.label == k].mean() for k in range(len(CLASS_NAMES))])
    assert by_class.max() / by_class.min() < 1.2  # size tells no class


def test_a_centre_prior_does_not_find_the_object(singles):
    assert singles.mask[:, 0, 31:33, 31:33].float().mean() < singles.mask.float().mean()


def test_colour_and_place_tell_no_class(singles):
    # The best linear guess from the object's mean colour and centre, fitted on one half, is near chance on the other.
    inside = singles.mask.float()
    area = inside.sum(dim=(1, 2, 3))
    axis = torch.linspace(-1, 1, 64)
    features = torch.cat(
        [
            (singles.image * inside).sum(dim=(2, 3)) / area[:, None],
            ((inside * axis).sum(dim=(1, 2, 3)) / area)[:, None],
            ((inside * axis[:, None]).sum(dim=(1, 2, 3)) / area)[:, None],
            torch.ones(480, 1),
        ],
        dim=1,
    )
    wanted = torch.nn.functional.one_hot(singles.label).float()
    weights = torch.linalg.lstsq(features[:240], wanted[:240]).solution
    accuracy = ((features[240:] @ weights).argmax(dim=1) == singles.label[240:]).float().mean()
    assert accuracy < 0.25  # chance is 0.125


def test_pairs_are_two_classes_with_disjoint_masks():
    drawn = Synthetic(200, pairs=True).batch(range(200))
    assert drawn.label.shape == (200, 2) and drawn.mask.shape == (200, 2, 64, 64)
    assert (drawn.label[:, 0] != drawn.label[:, 1]).all()
    assert not (drawn.mask[:, 0] & drawn.mask[:, 1]).any()
    assert (drawn.mask.float().mean(dim=(2, 3)) > 0.015).all()
    assert len(drawn.label[:, 1].unique()) == len(CLASS_NAMES)


def test_a_data_loader_draws_batches():
    data = Synthetic(20)
    images, labels = zip(*DataLoader(data, batch_size=8), strict=True)
    whole = data.batch(range(20))
    assert torch.equal(torch.cat(images), whole.image) and torch.equal(torch.cat(labels), whole.label)
    image, label = data[-1]
    assert torch.equal(image, whole.image[-1]) and label == whole.label[-1]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Synthetic(0), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: Synthetic(8, size=16), ValueError, "size must be at least 32 pixels"),
        (lambda: Synthetic(8, seed=-1), ValueError, "seed must be an integer >= 0, got -1"),
        (lambda: Synthetic(8, seed=1.5), TypeError, "seed must be an integer, got 1.5"),
        (lambda: Synthetic(8, pairs="no"), TypeError, "pairs must be True or False, got 'no'"),
        (lambda: Synthetic(8)[8], IndexError, "index 8 is out of range for 8 pictures"),
        (lambda: Synthetic(8).batch([]), ValueError, "got none"),
    ],
)
def test_mistakes_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_host_is_ready_and_described(host):
    assert not host.training
    config = timm.data.resolve_model_data_config(host)
    assert (config["mean"], config["std"], config["input_size"]) == (MEAN, STD, (3, 64, 64))
    assert host.pretrained_cfg["record"]["held_out"]["accuracy"] >= 0.97


@torch.no_grad()
def test_the_host_knows_unseen_pictures(host):
    drawn = Synthetic(320, seed=11).batch(range(320))
    assert (host(drawn.image).argmax(dim=1) == drawn.label).float().mean() >= 0.95


@torch.no_grad()
def test_the_host_looks_at_the_evidence(host):
    # Hide the object, or the same area of distractors and background, by the picture's mean colour.
    drawn = Synthetic(160, seed=12).batch(range(160))
    mean = drawn.image.mean(dim=(2, 3), keepdim=True)
    mask = _grown(drawn.mask)
    elsewhere = _same_area_elsewhere(mask)
    assert (elsewhere.sum(dim=(1, 2, 3)) == mask.sum(dim=(1, 2, 3))).all() and not (elsewhere & mask).any()

    def accuracy(hidden):
        return (host(torch.where(hidden, mean, drawn.image)).argmax(dim=1) == drawn.label).float().mean()

    assert accuracy(elsewhere) > 0.9
    assert accuracy(mask) < 0.35


@torch.no_grad()
def test_the_host_is_undecided_without_evidence(host):
    clutter = render(range(160), 64, seed=13, objects=0).image
    assert host(clutter).softmax(dim=1).amax(dim=1).median() < 0.5


@torch.no_grad()
def test_the_host_sees_both_of_a_pair(host):
    drawn = Synthetic(160, seed=14, pairs=True).batch(range(160))
    top = host(drawn.image).topk(2, dim=1).indices.sort(dim=1).values
    assert (top == drawn.label.sort(dim=1).values).all(dim=1).float().mean() > 0.85


def _grown(mask):
    """The mask and a border of two pixels, so that no outline shows around what is hidden."""
    return torch.nn.functional.max_pool2d(mask.float(), 5, stride=1, padding=2) > 0


def _same_area_elsewhere(mask):
    """The masks moved by half a picture, pixels that fall on the object itself replaced by others of the picture."""
    moved = mask.roll((32, 32), dims=(2, 3)) & ~mask
    order = pixel_order(torch.where(mask[:, 0], -1.0, moved[:, 0].float()))
    rank = order.argsort(dim=1).view(len(mask), 1, 64, 64)
    return rank < mask.sum(dim=(1, 2, 3), keepdim=True)


def test_large_seeds_are_seeds():
    assert torch.equal(Synthetic(2, seed=2**64 + 5).batch([0, 1]).image, Synthetic(2, seed=5).batch([0, 1]).image)
