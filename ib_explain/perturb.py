"""Replace pixels: what stands in for a removed pixel, and which pixels a given step or a random mask removes.

Shared by RISE, refining, insertion and deletion, degradation, ROAD and sensitivity-n. Images are (B, C, H, W) in the
host's normalised space; nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ib_explain.checks import check_positive_int, did_you_mean
from ib_explain.maps import pixel_order
from ib_explain.randomness import generator_of, normal

__all__ = [
    "FILLS",
    "fill_images",
    "gaussian_blur",
    "pixel_ranks",
    "rise_blur",
    "rise_masks",
    "step_counts",
    "tied_share",
]


def fill_images(x: Tensor, fill: str | Tensor, *, seed: int = 0) -> Tensor:
    """Return the fully replaced images, (B, C, H, W), of which single pixels are then taken.

    Args:
        x: (B, C, H, W).
        fill: "blur" (RISE's own kernel, `rise_blur`), "gaussian" (`gaussian_blur`), "mean" (the image's mean of each
            channel), "zero" (0 in normalised space: the mean colour of the training data), "noise" (Gaussian, with
            the image's mean and standard deviation of each channel; one noise field for all images, so that the
            split into batches changes nothing) or the replacement itself, a tensor that broadcasts to x.
        seed: for "noise" alone.

    Raises:
        ValueError: an unknown name, a tensor that does not broadcast to x.
        TypeError: neither a name nor a tensor.
    """
    if isinstance(fill, Tensor):
        try:
            return fill.to(x).expand_as(x)
        except RuntimeError as err:
            shapes = f"{tuple(x.shape)}, got {tuple(fill.shape)}"
            raise ValueError(f"fill must broadcast to the images' shape {shapes}") from err
    if not isinstance(fill, str):
        raise TypeError(f"fill must be one of {', '.join(FILLS)} or a tensor, got {type(fill).__name__}")
    if fill not in FILLS:
        raise ValueError(f"unknown fill {fill!r}{did_you_mean(fill, FILLS)}")
    return FILLS[fill](x, seed)


def rise_blur(x: Tensor) -> Tensor:
    """Blur (B, C, H, W) as RISE does (Petsiuk et al. 2018, arXiv 1806.07421, released `utils.gkern`).

    Their kernel is a unit impulse in an 11 x 11 array after SciPy's Gaussian filter of sigma 5 with reflecting edges:
    the tails fold back, so that it is almost a box (centre to corner 1.14, where a cut Gaussian has 2.72). The image is
    padded with zeros, so its borders fade to the mean colour.
    """
    size, taps = 11, _gaussian(5.0)
    radius = len(taps) // 2
    offsets = torch.arange(-radius, radius + 1, device="cpu")
    positions = torch.arange(size, device="cpu")[:, None] + offsets  # [size, 2 * radius + 1]
    positions = positions % (2 * size)
    reflected = torch.where(positions < size, positions, 2 * size - 1 - positions)
    kernel = ((reflected == size // 2) * taps).sum(1)
    return _separable(x, kernel, "constant")


def gaussian_blur(x: Tensor, *, sigma: float = 5.0) -> Tensor:
    """Blur (B, C, H, W) with a true Gaussian of `sigma` pixels, cut at 4 sigma, edges replicated."""
    return _separable(x, _gaussian(sigma), "replicate")


def rise_masks(cells: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample binary cells bilinearly to one cell more than the image, and cut the image out at a random shift
    (Petsiuk et al. 2018).

    Args:
        cells: (M, s, s) bool.
        shifts: (M, 2) in [0, 1), shares of a cell.
        size: (H, W) of the image.

    Returns:
        (M, H, W) float32 in [0, 1].
    """
    weights = [_interpolation(int(cells.shape[1]), extent, shifts[:, axis]) for axis, extent in enumerate(size)]
    return weights[0] @ cells.float() @ weights[1].transpose(1, 2)


def pixel_ranks(maps: Tensor, *, descending: bool = True) -> Tensor:
    """Return each pixel's place in the order of removal: (B, H, W) -> (B, H*W) int32, 0 first, ties by pixel index."""
    order = pixel_order(maps if descending else -maps)
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places.expand_as(order))


def tied_share(maps: Tensor) -> Tensor:
    """Share of each map's pixels whose value another pixel has too: (B, H, W) -> (B,) float32 in [0, 1].

    These pixels come in an arbitrary (though fixed) order; a curve of a map with many ties says little.
    """
    ordered = maps.flatten(1).sort(dim=1).values
    equal = ordered[:, 1:] == ordered[:, :-1]  # [B, H*W - 1]
    return (F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))).float().mean(1)


def step_counts(total: int, *, steps: int | None = None, per_step: int | None = None) -> Tensor:
    """Return how many of `total` units are replaced at each point of a curve: (S + 1,) int64 from 0 to `total`.

    Args:
        total: number of pixels (or tiles).
        steps: S equal steps, rounded to whole units; at most `total`.
        per_step: units a step, as RISE counts; the last step takes what is left.

    Raises:
        ValueError: both or none given, a number below 1, more steps than units.
    """
    if (steps is None) == (per_step is None):
        raise ValueError(f"give either steps or pixels_per_step, got steps={steps} and pixels_per_step={per_step}")
    if per_step is not None:
        per_step = min(check_positive_int(per_step, "pixels_per_step"), total)
        steps = math.ceil(total / per_step)
        return (torch.arange(steps + 1, device="cpu") * per_step).clamp_max(total)
    steps = check_positive_int(steps, "steps")
    if steps > total:
        raise ValueError(f"steps must be at most {total}, the number of units to replace, got {steps}")
    return torch.div(torch.arange(steps + 1, device="cpu") * total + steps // 2, steps, rounding_mode="floor")


def _interpolation(side: int, extent: int, shifts: Tensor) -> Tensor:
    """Bilinear weights of `side` cells for each pixel along one axis, (M, extent, side)."""
    cell = math.ceil(extent / side)
    pixels = torch.arange(extent, device=shifts.device) + (shifts[:, None] * cell).floor()
    where = (pixels + 0.5) * side / ((side + 1) * cell) - 0.5  # in cells; 0 is the first one's centre
    # Beyond the outer cells' centres the grid is mirrored, as in the authors' code (scikit-image's "reflect").
    where = (side - 1 - (side - 1 - where.abs()).abs()).clamp_min(0)
    return (1 - (where[..., None] - torch.arange(side, device=shifts.device)).abs()).clamp_min(0)


def _gaussian(sigma: float) -> Tensor:
    radius = int(4 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu") / sigma) ** 2)
    return taps / taps.sum()


def _separable(x: Tensor, kernel: Tensor, padding: str) -> Tensor:
    channels, size = x.shape[1], kernel.numel()
    exact = x if x.dtype == torch.float64 else x.float()  # sums of half-precision images
    rows = kernel.to(exact).view(1, 1, size, 1).expand(channels, 1, size, 1)
    padded = F.pad(exact, (size // 2,) * 4, mode=padding)
    blurred = F.conv2d(padded, rows, groups=channels)
    return F.conv2d(blurred, rows.transpose(2, 3), groups=channels).to(x.dtype)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True).expand_as(x)


def _noise(x: Tensor, seed: int) -> Tensor:
    field = normal(generator_of(seed), *x.shape[1:]).to(x)
    return _mean(x) + x.std(dim=(2, 3), keepdim=True, correction=0) * field


FILLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "blur": lambda x, seed: rise_blur(x),
    "gaussian": lambda x, seed: gaussian_blur(x),
    "mean": lambda x, seed: _mean(x),
    "zero": lambda x, seed: torch.zeros_like(x),
    "noise": _noise,
}
