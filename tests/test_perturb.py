import numpy as np
import pytest
import torch
from scipy import ndimage

from ib_explain.perturb import FILLS, fill_images, gaussian_blur, pixel_ranks, rise_blur, step_counts, tied_share


def rise_kernel(size=11, sigma=5):
    """RISE's gkern, literally (one channel)."""
    impulse = np.zeros((size, size))
    impulse[size // 2, size // 2] = 1
    return ndimage.gaussian_filter(impulse, sigma)


def test_rise_blur_is_a_convolution_with_scipys_filtered_impulse():
    x = torch.randn(2, 3, 20, 17, dtype=torch.float64)
    kernel = torch.from_numpy(rise_kernel()).expand(3, 1, 11, 11)
    expected = torch.nn.functional.conv2d(x, kernel, padding=5, groups=3)
    torch.testing.assert_close(rise_blur(x), expected, atol=1e-12, rtol=0)


def test_rise_kernel_is_nearly_a_box():
    impulse = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    impulse[0, 0, 10, 10] = 1
    kernel = rise_blur(impulse)[0, 0, 5:16, 5:16]
    assert kernel.sum().item() == pytest.approx(1)
    assert (kernel[5, 5] / kernel[0, 0]).item() == pytest.approx(1.14, abs=0.005)


@pytest.mark.parametrize("size", [(30, 41), (7, 9)])  # the second is smaller than the kernel
def test_gaussian_blur_agrees_with_scipy(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, 5, 5), mode="nearest", truncate=4)
    torch.testing.assert_close(gaussian_blur(x), torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_mean_zero_and_tensor_fills():
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(fill_images(x, "mean")[1, 2], x[1, 2].mean().expand(5, 4))
    assert torch.equal(fill_images(x, "zero"), torch.zeros_like(x))
    black = torch.tensor([-2.1, -2.0, -1.8])[:, None, None]
    assert torch.equal(fill_images(x, black)[1, 2], torch.full((5, 4), -1.8))


def test_noise_fill_has_the_images_statistics_and_ignores_how_images_are_batched():
    x = 3 * torch.randn(2, 3, 64, 64) + 5
    state = torch.get_rng_state()
    noise = fill_images(x, "noise", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(noise.mean((2, 3)), x.mean((2, 3)), atol=0.2, rtol=0)
    torch.testing.assert_close(noise.std((2, 3)), x.std((2, 3)), atol=0.2, rtol=0)
    assert torch.equal(noise[1:], fill_images(x[1:], "noise", seed=4))
    assert not torch.equal(noise, fill_images(x, "noise", seed=5))


@pytest.mark.parametrize("fill", FILLS)
def test_fills_keep_shape_and_dtype_and_leave_the_images_alone(fill):
    x = torch.randn(2, 3, 13, 9, dtype=torch.float64)
    before = x.clone()
    filled = fill_images(x, fill)
    assert filled.shape == x.shape and filled.dtype == x.dtype
    assert torch.equal(x, before)


def test_bad_fills_are_named():
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="unknown fill 'gausian'; did you mean 'gaussian'"):
        fill_images(x, "gausian")
    with pytest.raises(ValueError, match=r"broadcast to the images' shape \(1, 3, 4, 4\), got \(2, 5\)"):
        fill_images(x, torch.zeros(2, 5))
    with pytest.raises(TypeError, match="got int"):
        fill_images(x, 0)


def test_ranks_follow_value_then_pixel_index():
    maps = torch.tensor([[[0.2, 0.9], [0.2, 0.5]]])
    assert pixel_ranks(maps).tolist() == [[2, 0, 3, 1]]
    assert pixel_ranks(maps, descending=False).tolist() == [[0, 3, 1, 2]]
    assert pixel_ranks(torch.zeros(1, 2, 2), descending=False).tolist() == [[0, 1, 2, 3]]


def test_tied_share_counts_pixels_that_have_an_equal():
    maps = torch.tensor([[[1.0, 2], [3, 4]], [[0, 0], [0, 1]], [[5, 5], [5, 5]], [[1, 1], [2, 2]]])
    assert tied_share(maps).tolist() == [0, 0.75, 1, 1]
    assert tied_share(torch.ones(1, 1, 1)).tolist() == [0]


def test_step_counts():
    assert step_counts(50176, per_step=1792).tolist() == list(range(0, 50177, 1792))  # RISE's 28 steps
    assert step_counts(10, per_step=4).tolist() == [0, 4, 8, 10]
    assert step_counts(10, per_step=99).tolist() == [0, 10]
    assert step_counts(10, steps=4).tolist() == [0, 3, 5, 8, 10]
    assert step_counts(10, steps=10).tolist() == list(range(11))
    assert len(step_counts(50176, steps=100)) == 101


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3, "per_step": 2}, "either steps or pixels_per_step, got steps=3 and pixels_per_step=2"),
        ({}, "either steps or pixels_per_step"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"per_step": -1}, "pixels_per_step must be an integer >= 1, got -1"),
        ({"steps": 11}, "steps must be at most 10, the number of units to replace, got 11"),
    ],
)
def test_bad_steps_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        step_counts(10, **settings)
    with pytest.raises(TypeError, match="steps must be an integer"):
        step_counts(10, steps=2.5)


def test_noise_has_the_images_own_deviation():
    x = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    field = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(fill_images(x, "noise", seed=3), field[None])


def test_steps_are_rounded_to_the_nearest_unit():
    assert step_counts(9, steps=4).tolist() == [0, 2, 5, 7, 9]
