"""What maps are compared with: boxes as masks, fixations as pixels and densities, and the centred Gaussian.

One coordinate system throughout: x to the right, y down, 0 is the centre of the first pixel. Pixel j covers
[j - 0.5, j + 0.5), and an image of width W covers [-0.5, W - 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["boxes_to_masks", "centred_gaussian", "check_listed", "fixation_pixels", "fixations_to_density"]
__all__ += ["other_fixations"]

# Boxes that went through a resize touch the border only up to float32 rounding.
_SLACK = 1e-3


def boxes_to_masks(boxes: Tensor | Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Union of each image's boxes as a mask.

    Args:
        boxes: (B, 4), one box an image, or a sequence of B tensors (n_i, 4); columns xmin, ymin, xmax, ymax in pixels
            with both ends inside, so a box of one pixel has xmin = xmax. Fractions are allowed (resized boxes): a pixel
            is inside if its centre lies between the box's outer edges, xmin - 0.5 <= j < xmax + 0.5.
        size: (H, W) of the image.

    Returns:
        (B, 1, H, W) bool. An image without boxes, or whose box is so thin that it holds no pixel's centre, has an empty
        mask, for which every localisation score is NaN.

    Raises:
        TypeError: boxes are not tensors.
        ValueError: other shapes, a box with no area, or one that reaches outside of the image.
    """
    height, width = size
    rows = [boxes_of[None] if boxes_of.ndim == 1 else boxes_of for boxes_of in _tensors(boxes, "boxes")]
    if not rows:
        raise ValueError("boxes must hold at least one image, got none")
    for index, row in enumerate(rows):
        if row.ndim != 2 or row.shape[1] != 4:
            raise ValueError(f"boxes of image {index} must have shape (n, 4) or (4,), got {tuple(row.shape)}")
    padded, valid = _pad([row.double() for row in rows], columns=4)  # (B, n, 4), (B, n)
    _check_boxes(padded, valid, size)

    x = torch.arange(width, device=padded.device)
    y = torch.arange(height, device=padded.device)
    xmin, ymin, xmax, ymax = (side[..., None] for side in padded.unbind(-1))  # (B, n, 1) each
    columns = (x >= xmin - 0.5) & (x < xmax + 0.5) & valid[..., None]  # (B, n, W)
    lines = (y >= ymin - 0.5) & (y < ymax + 0.5)  # (B, n, H)
    return (lines[..., :, None] & columns[..., None, :]).any(dim=1, keepdim=True)


def fixation_pixels(fixations: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Nearest pixel of every fixation, padded to the longest list.

    Args:
        fixations: B tensors (n_i, 2) of (x, y); n_i may be 0, repeated points stay repeated.
        size: (H, W) of the image.

    Returns:
        Pixel indices y * W + x, (B, n) int64 (0 where padded), and which of them are fixations, (B, n) bool.

    Raises:
        TypeError: fixations are not tensors.
        ValueError: other shapes, NaN, or a fixation outside of the image (it names the first).
    """
    points, valid = _pack(fixations, size)
    x, y = (points + 0.5).floor().long().unbind(-1)
    return torch.where(valid, y * size[1] + x, 0), valid


def fixations_to_density(points: Sequence[Tensor], size: tuple[int, int], sigma: float) -> Tensor:
    """Density of fixations: the mean of one Gaussian a fixation, sampled at the pixels' centres.

    Gaussians stand at the exact coordinates, not at the nearest pixel. What falls outside of the image is lost, as with
    zero padding, before the whole is divided by its sum.

    Args:
        points: B tensors (n_i, 2) of (x, y).
        size: (H, W) of the image.
        sigma: standard deviation in pixels, > 0; one degree of visual angle is usual.

    Returns:
        (B, 1, H, W) float32, each image's sum is 1; all zero for an image without fixations.

    Raises:
        TypeError: points are not tensors.
        ValueError: sigma <= 0 or so small that nothing is left on any pixel, or what `fixation_pixels` refuses.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0 pixels, got {sigma}")
    packed, valid = _pack(points, size)
    x, y = packed.unbind(-1)
    height, width = size
    across = _bell(torch.arange(width, device=x.device) - x[..., None], sigma)  # (B, n, W)
    along = _bell(torch.arange(height, device=y.device) - y[..., None], sigma) * valid[..., None]  # (B, n, H)
    density = along.mT @ across  # (B, H, W)
    total = density.sum(dim=(1, 2), keepdim=True)
    if (valid.any(dim=1) & (total[:, 0, 0] == 0)).any():
        raise ValueError(f"sigma must not vanish between pixels, got {sigma} pixels; take 0.5 or more")
    return torch.where(total > 0, density / total, 0.0)[:, None].float()


def other_fixations(fixations: Sequence[Tensor]) -> list[Tensor]:
    """For each image the fixations of all others, repeated ones kept: the negatives of the shuffled AUC.

    The images must share one size: elsewhere scale the coordinates to each image first.
    """
    rows = _tensors(fixations, "fixations")
    return [torch.cat([*rows[:i], *rows[i + 1 :], rows[i][:0]]) for i in range(len(rows))]


def centred_gaussian(size: tuple[int, int], sigma: float = 0.2, *, device: torch.device | None = None) -> Tensor:
    """The centre prior: a Gaussian on the middle of the image.

    Args:
        size: (H, W).
        sigma: standard deviation as a share of each side, > 0. With 0.2 it reaches, on free-viewing gaze, AUC about
            0.7: what any map has to beat.
        device: where the result is made.

    Returns:
        (1, 1, H, W) float32 with sum 1.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0 (a share of each side), got {sigma}")
    # On the CPU: not every device has float64.
    along, across = (_bell(torch.arange(n, dtype=torch.float64, device="cpu") - (n - 1) / 2, sigma * n) for n in size)
    density = along[:, None] * across
    return (density / density.sum())[None, None].float().to(device or "cpu")


def _bell(distance: Tensor, sigma: float) -> Tensor:
    return torch.exp(-0.5 * (distance / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def check_listed(items: Any, name: str) -> None:
    """Refuse what holds no tensor for each image."""
    if not isinstance(items, Sequence | Tensor):
        raise TypeError(f"{name} must hold one torch.Tensor an image, got {type(items).__name__}")


def _tensors(items: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    check_listed(items, name)
    rows = list(items)
    for row in rows:
        if not isinstance(row, Tensor):
            raise TypeError(f"{name} must hold one torch.Tensor an image, got {type(row).__name__}")
    return rows


def _pad(rows: list[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """Rows (n_i, columns) to (B, n, columns) padded with 0, and which are no padding, (B, n) bool."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    if not int(lengths.max()):
        return rows[0].new_zeros(len(rows), 0, columns), lengths.new_zeros(len(rows), 0, dtype=torch.bool)
    padded = pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _pack(fixations: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Fixations as (B, n, 2) float64 (0 where padded) and which are no padding, checked against the image."""
    rows = _tensors(fixations, "fixations")
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size must be the image's (height, width), got {size!r}")
    if not rows:
        raise ValueError("fixations must hold one tensor an image, got an empty list")
    for index, row in enumerate(rows):
        if row.ndim != 2 or row.shape[1] != 2:
            raise ValueError(f"fixations of image {index} must have shape (n, 2) for (x, y), got {tuple(row.shape)}")
    points, valid = _pad([row.detach().double() for row in rows], columns=2)
    end = points.new_tensor([size[1] - 0.5, size[0] - 0.5])
    # Asked as "inside" and negated, NaN counts as outside.
    outside = (~((points >= -0.5) & (points < end)).all(dim=-1) & valid).nonzero()
    if len(outside):
        index, which = outside[0].tolist()
        x, y = points[index, which].tolist()
        raise ValueError(
            f"fixations must lie inside of the image, -0.5 <= x < {end[0]} and -0.5 <= y < {end[1]}, "
            f"got ({x:g}, {y:g}) for image {index} ({len(outside)} outside in all); drop or rescale them"
        )
    return points, valid


def _check_boxes(boxes: Tensor, valid: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    low, high = boxes[..., :2], boxes[..., 2:]
    last = boxes.new_tensor([width - 1, height - 1])
    inside = ((low >= -_SLACK) & (high <= last + _SLACK)).all(dim=-1)
    for problem, wrong in (
        (
            "must have an area, xmin < xmax + 1 and ymin < ymax + 1 (both ends are inside)",
            (high + 1 <= low).any(dim=-1),
        ),
        (f"must lie inside of the image, 0 <= x <= {width - 1} and 0 <= y <= {height - 1}", ~inside),
    ):
        found = (wrong & valid).nonzero()
        if len(found):
            index, which = found[0].tolist()
            corners = ", ".join(f"{value:g}" for value in boxes[index, which].tolist())
            raise ValueError(f"boxes {problem}, got ({corners}) for image {index}")
