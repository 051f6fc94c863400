"""Input-modification consistency: patches, frequencies, and which images count."""

import numpy as np
import pytest
import torch

from ib_explain.metrics.consistency import Consistency, input_modification_consistency, modified_images
from tests.explaining import blind, even, random_maps
from tests.models import Brightness, images


def test_patch_is_one_window_of_one_colour_within_the_range():
    x = images(3)
    modified, window = modified_images(x, "patch")
    assert window.sum() == 6 * 6  # a quarter of 24 pixels a side
    assert torch.equal(modified[..., ~window], x[..., ~window])
    patch = modified[..., window]
    assert torch.equal(patch, patch[..., :1].expand_as(patch))
    assert (patch >= x.amin((2, 3))[..., None]).all() and (patch <= x.amax((2, 3))[..., None]).all()
    other = modified_images(x, "patch", draw=1)
    assert not torch.equal(other[1], window)
    single, same = modified_images(x[1:2], "patch")  # alone as in the batch
    assert torch.equal(single, modified[1:2]) and torch.equal(same, window)


@pytest.mark.parametrize(("cycles", "low"), [(1, True), (2, True), (3, False), (7, False)])
def test_frequencies_on_either_side_of_the_radius(cycles, low):
    wave = torch.cos(2 * torch.pi * cycles * torch.arange(24) / 24).expand(1, 3, 24, 24)  # the radius is 3
    passed = modified_images(wave, "low_frequency" if low else "high_frequency")[0]
    torch.testing.assert_close(passed, wave, atol=1e-5, rtol=0)
    stopped, window = modified_images(wave, "high_frequency" if low else "low_frequency")
    assert not window.any()
    torch.testing.assert_close(stopped, torch.zeros_like(wave), atol=1e-5, rtol=0)


def test_filtered_images_keep_their_range():
    x = images(2)
    for modification in ("low_frequency", "high_frequency"):
        modified, _ = modified_images(x, modification)
        torch.testing.assert_close(modified.amin((2, 3)), x.amin((2, 3)))
        torch.testing.assert_close(modified.amax((2, 3)), x.amax((2, 3)))
        assert (modified - x).abs().amax() > 0.1


def test_the_changed_window_does_not_count():
    found = input_modification_consistency(Brightness(), images(3), blind)
    assert found.kept.all() and found.number == 12
    torch.testing.assert_close(found.cosine, torch.ones(4, 3))
    assert found.shares == {0.85: 1.0, 0.90: 1.0, 0.95: 1.0} and found.mean == pytest.approx(1)


def test_nearly_even_maps_are_centred():
    """Uncentred, these maps have a cosine above 0.999."""
    calls = []

    def shimmer(model, x, target):
        calls.append(0)
        return 10 + 0.1 * random_maps(len(x), x.shape[2], seed=len(calls))

    found = input_modification_consistency(Brightness(), images(3), shimmer)
    assert found.cosine.abs().max() < 0.3 and found.shares[0.85] == 0


def test_only_images_that_keep_their_prediction_count():
    x, draws = images(4), 6
    modified = torch.stack([modified_images(x, draw=d)[0].mean((1, 2, 3)) for d in range(draws)])
    model = Brightness(float(x.mean((1, 2, 3)).median()) + 0.01)
    clean = (x.mean((1, 2, 3)) > model.threshold).long()
    kept = (modified > model.threshold) == clean.bool()
    assert kept.any() and not kept.all()
    found = input_modification_consistency(model, x, blind, draws=draws, labels=clean)
    assert torch.equal(found.kept, kept) and torch.equal(found.cosine.isnan(), ~kept)
    assert found.number == int(kept.sum()) and found.accuracy == pytest.approx(float(kept.float().mean()))
    assert input_modification_consistency(model, x, blind, draws=draws).correct.isnan().all()
    wrong = input_modification_consistency(model, x, blind, draws=draws, labels=1 - clean)
    assert wrong.accuracy == pytest.approx(1 - found.accuracy)


def test_shares_and_mean_by_hand():
    cosine = torch.tensor([[0.96, 0.91, torch.nan, 0.86], [0.5, torch.nan, torch.nan, 0.97]])
    found = Consistency(cosine, ~cosine.isnan(), torch.full_like(cosine, torch.nan))
    assert found.number == 5 and found.mean == pytest.approx((0.96 + 0.91 + 0.86 + 0.5 + 0.97) / 5)
    assert found.shares == pytest.approx({0.85: 0.8, 0.90: 0.6, 0.95: 0.4})


def test_nothing_kept_is_undefined_not_zero():
    nothing = Consistency(torch.full((1, 2), torch.nan), torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2))
    assert np.isnan(nothing.mean) and all(np.isnan(share) for share in nothing.shares.values())
    assert input_modification_consistency(Brightness(), images(2), even).cosine.isnan().all()


def test_bad_modifications():
    with pytest.raises(ValueError, match="unknown modification 'low_freq'; did you mean 'low_frequency'"):
        input_modification_consistency(Brightness(), images(1), blind, modification="low_freq")
    with pytest.raises(ValueError, match=r"strength must be a share of the image's side in \(0, 1\), got 8"):
        input_modification_consistency(Brightness(), images(1), blind, strength=8)


def test_patches_follow_the_seed():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = [modified_images(x, seed=seed, draw=draw)[0] for seed in (0, 1) for draw in (0, 1)]
    assert len({image.numpy().tobytes() for image in drawn}) == 4
