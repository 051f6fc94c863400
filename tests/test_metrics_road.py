import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve

from ib_explain.metrics import METRICS, Case, noisy_linear_imputation, road, road_combined
from ib_explain.metrics.imputation import _coarsen, _refine
from tests.perturbing import noise_and_maps, small_net

WEIGHTS = {(0, 1): 2, (0, -1): 2, (1, 0): 2, (-1, 0): 2, (1, 1): 1, (1, -1): 1, (-1, 1): 1, (-1, -1): 1}  # of 12


def direct(image, removed):
    """The equations of ROAD, one pixel at a time, solved by SciPy in float64: (C, H, W), (H, W) -> (C, H, W)."""
    channels, height, width = image.shape
    image, removed = image.double().numpy(), removed.numpy()
    number = -np.ones((height, width), dtype=int)
    holes = np.argwhere(removed)
    number[removed] = np.arange(len(holes))
    rows, columns, entries = [], [], []
    right = np.zeros((len(holes), channels))
    for k, (i, j) in enumerate(holes):
        total = 0
        for (di, dj), weight in WEIGHTS.items():
            a, b = i + di, j + dj
            if not (0 <= a < height and 0 <= b < width):
                continue
            total += weight
            if removed[a, b]:
                rows, columns, entries = [*rows, k], [*columns, number[a, b]], [*entries, -weight]
            else:
                right[k] += weight * image[:, a, b]
        rows, columns, entries = [*rows, k], [*columns, k], [*entries, total]
    solved = spsolve(coo_matrix((entries, (rows, columns))).tocsc(), right).reshape(len(holes), channels)
    filled = image.copy()
    filled[:, removed] = solved.T
    return torch.from_numpy(filled).float()


def masks_of(kind, size, share):
    generator = torch.Generator().manual_seed(3)
    if kind == "scattered":
        values = torch.rand(1, *size, generator=generator)
    else:
        values = F.interpolate(torch.randn(1, 1, 4, 4, generator=generator), size=size, mode="bicubic")[0]
    return values >= torch.quantile(values, 1 - share)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["scattered", "compact"])
@pytest.mark.parametrize("size", [(48, 48), (37, 53), (9, 5)])
def test_agrees_with_the_direct_sparse_solve(size, kind, share):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    removed = masks_of(kind, size, share)
    expected = direct(x[0], removed[0])
    exact = noisy_linear_imputation(x, removed, noise=0, tolerance=1e-5)[0]
    torch.testing.assert_close(exact, expected, atol=5e-5, rtol=0)
    usual = noisy_linear_imputation(x, removed, noise=0)[0]
    torch.testing.assert_close(usual, expected, atol=0.01, rtol=0)  # the standard deviation of ROAD's own noise
    assert (usual - expected).pow(2).mean().sqrt() < 0.003


def test_one_pixel_and_a_corner_by_hand():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    for pixel, value in (((1, 1), 4.0), ((0, 0), (2 * 1 + 2 * 3 + 4) / 5)):
        removed = torch.zeros(1, 3, 3, dtype=torch.bool)
        removed[0][pixel] = True
        filled = noisy_linear_imputation(x, removed, noise=0, tolerance=1e-6)
        assert filled[0, 0][pixel].item() == pytest.approx(value, abs=1e-5)


def test_all_but_one_pixel_takes_its_value():
    x = torch.randn(2, 3, 40, 40)
    removed = torch.ones(2, 40, 40, dtype=torch.bool)
    removed[:, 7, 30] = False
    filled = noisy_linear_imputation(x, removed, noise=0, tolerance=1e-5)
    torch.testing.assert_close(filled, x[:, :, 7:8, 30:31].expand_as(x), atol=1e-3, rtol=0)


def test_kept_pixels_stay_and_values_never_leave_their_range():
    x = torch.randn(6, 3, 32, 32)
    removed = torch.rand(6, 32, 32) < torch.tensor([0, 0.1, 0.3, 0.5, 0.7, 0.95])[:, None, None]
    before = x.clone()
    filled = noisy_linear_imputation(x, removed, noise=0, tolerance=1e-5)
    assert torch.equal(x, before)
    kept = ~removed[:, None].expand_as(x)
    assert torch.equal(filled[kept], x[kept])
    low = x.masked_fill(~kept, torch.inf).amin((2, 3), keepdim=True)
    high = x.masked_fill(~kept, -torch.inf).amax((2, 3), keepdim=True)
    assert ((filled >= low - 1e-4) & (filled <= high + 1e-4)).all()


def test_images_of_a_batch_do_not_mix():
    x = torch.randn(9, 3, 24, 24)
    removed = torch.rand(9, 24, 24) < torch.linspace(0.1, 0.9, 9)[:, None, None]
    whole = noisy_linear_imputation(x, removed, tolerance=1e-5)
    each = torch.cat([noisy_linear_imputation(x[i : i + 1], removed[i : i + 1], tolerance=1e-5) for i in range(9)])
    torch.testing.assert_close(whole, each, atol=1e-4, rtol=0)


def test_noise_has_its_size_its_seed_and_no_effect_on_kept_pixels():
    x, removed = torch.randn(1, 3, 64, 64), masks_of("scattered", (64, 64), 0.5)
    clean = noisy_linear_imputation(x, removed, noise=0)
    state = torch.get_rng_state()
    noisy = noisy_linear_imputation(x, removed, noise=0.1, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    difference = (noisy - clean).permute(0, 2, 3, 1)[removed]
    assert difference.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy, noisy_linear_imputation(x, removed, noise=0.1, seed=1))
    assert not torch.equal(noisy, noisy_linear_imputation(x, removed, noise=0.1, seed=2))


def test_transfers_are_bilinear_and_each_others_transpose():
    coarse, fine = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 10, 14)
    half, up, down = torch.empty(2, 3, 5, 14), torch.empty_like(fine), torch.empty_like(coarse)
    _refine(coarse, half, up)
    torch.testing.assert_close(up, F.interpolate(coarse, scale_factor=2, mode="bilinear"))
    _coarsen(fine, half, down)
    torch.testing.assert_close((up * fine).sum(), (coarse * down).sum())


def test_dtype_is_kept():
    x, removed = torch.randn(1, 3, 16, 16), masks_of("scattered", (16, 16), 0.5)
    for dtype in (torch.float64, torch.bfloat16):
        assert noisy_linear_imputation(x.to(dtype), removed).dtype == dtype


def test_bad_holes_are_named():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"removed must be bool of shape \(2, 8, 8\), got torch.float32"):
        noisy_linear_imputation(x, torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="at least one pixel of each image must be left, got 1 images with none"):
        noisy_linear_imputation(x, torch.tensor([True, False])[:, None, None].expand(2, 8, 8))
    with pytest.raises(
        ValueError, match=r"noise \(a standard deviation in the units of x\) must be a finite number >= 0"
    ):
        noisy_linear_imputation(x, torch.zeros(2, 8, 8, dtype=torch.bool), noise=-1)
    with pytest.raises(ValueError, match="tolerance must be a finite number > 0, got 0"):
        noisy_linear_imputation(x, torch.zeros(2, 8, 8, dtype=torch.bool), tolerance=0)


# The metric.


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def batch():
    return noise_and_maps()


def test_a_flat_image_is_imputed_without_a_trace(net):
    x, maps = torch.full((1, 3, 24, 24), 0.7), torch.rand(1, 24, 24)
    curve = road(net, x, maps, noise=0)
    torch.testing.assert_close(curve.scores, curve.scores[:, :1].expand(1, 10), atol=1e-4, rtol=0)
    torch.testing.assert_close(curve.fractions, torch.arange(10) / 10, atol=1e-3, rtol=0)


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_scores_are_those_of_the_images_imputed_one_by_one(net, batch, order):
    x, maps = batch
    curve = road(net, x, maps, 2, order=order, fractions=(0.25, 0.5), noise=0)
    for i in range(3):
        ranked = maps[i, 0].flatten().argsort(descending=order == "morf")
        for k, share in enumerate((0.25, 0.5)):
            removed = torch.zeros(576, dtype=torch.bool)
            removed[ranked[: int(share * 576)]] = True
            image = direct(x[i], removed.view(24, 24))
            expected = net(image[None]).softmax(1)[0, 2].item()
            assert curve.scores[i, k + 1].item() == pytest.approx(expected, abs=1e-3)
    torch.testing.assert_close(curve.auc, curve.scores[:, 1:].mean(1))


def test_the_due_share_is_removed_whatever_the_ties(net, batch):
    x, maps = batch
    maps = (maps - 0.84).relu()  # 84 % zeros, where thresholds remove everything
    seen = []
    with net.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        road(net, x[:1], maps[:1], fractions=(0.1, 0.5, 0.8), batch_size=1)
    removed = [((image - x[:1]).abs().amax(1) > 0).float().mean().item() for image in seen[1:]]
    assert removed == pytest.approx([0.1, 0.5, 0.8], abs=0.005)


def test_combined_is_half_the_gap_and_zero_without_order(net, batch):
    x, maps = batch
    gap = road(net, x, maps, order="lerf").auc - road(net, x, maps).auc
    torch.testing.assert_close(road_combined(net, x, maps), gap / 2)
    assert road_combined(net, x, torch.zeros_like(maps)).tolist() == [0, 0, 0]
    torch.testing.assert_close(METRICS.get("road")(Case(net, x, maps)), gap / 2)


def test_batch_size_changes_no_result(net, batch):
    whole = road(net, *batch, noise=0).scores
    for batch_size in (1, 4):
        torch.testing.assert_close(road(net, *batch, noise=0, batch_size=batch_size).scores, whole, atol=1e-3, rtol=0)


def test_bad_settings_are_named(net, batch):
    with pytest.raises(ValueError, match="unknown order 'lref'; did you mean 'lerf'"):
        road(net, *batch, order="lref")
    for fractions in ((), (0.0, 0.5), (0.5, 1.0), (1.5,)):
        with pytest.raises(ValueError, match=r"fractions must be one or more numbers in \(0, 1\)"):
            road(net, *batch, fractions=fractions)
    for fractions in ((0.5, 0.2), (0.5, 0.5001)):
        with pytest.raises(ValueError, match=r"fractions must rise within \(0, 1\) and differ by a pixel or more"):
            road_combined(net, *batch, fractions=fractions)
    with pytest.raises(TypeError, match=r"fractions must be a sequence of numbers in \(0, 1\), .* got 0.1"):
        road(net, *batch, fractions=0.1)
    with pytest.raises(ValueError, match="maps must be finite"):
        road(net, batch[0], batch[1] / 0)
