"""Noisy linear imputation: removed pixels from their neighbours, for ROAD (Rong et al. 2022, arXiv 2202.00449).

All removed pixels of a batch are solved for at once, on the images' device, by a preconditioned conjugate-gradient
method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ib_explain.checks import check_images, check_number
from ib_explain.randomness import generator_of, normal

__all__ = ["Imputer", "noisy_linear_imputation"]


def noisy_linear_imputation(
    x: Tensor, removed: Tensor, *, noise: float = 0.01, seed: int = 0, tolerance: float = 1e-2
) -> Tensor:
    """Replace removed pixels by the weighted mean of their eight neighbours, all at once, plus Gaussian noise.

    Rong et al. 2022 (arXiv 2202.00449), sec. 4.2: weights 1/6 for edge and 1/12 for corner neighbours, neighbours
    outside of the image left out and the others scaled up; each channel is a linear system over its removed pixels.

    Args:
        x: (B, C, H, W).
        removed: (B, H, W) bool, at least one pixel of each image must be left.
        noise: standard deviation, in the units of x; 0 for none.
        seed: of the noise, which is the same for all images.
        tolerance: the solver stops when one more iteration moved no pixel of the images that it holds (four at a time
            on a CPU) by more than this, in the units of x. For the holes that maps make what is left is about half of
            it at the worst pixel, in images of 16 to 32 px up to twice it, in smaller ones up to three times; for
            regular ones in images of a few rows it can be far more.

    Returns:
        (B, C, H, W), equal to x where nothing was removed.

    Raises:
        TypeError, ValueError: other tensors than these, shapes that do not fit, an image without a pixel left.
    """
    check_number(tolerance, "tolerance", above=0)
    return Imputer(noise, seed, tolerance)(check_images(x).detach(), removed)


class Imputer:
    """`noisy_linear_imputation` with its settings, called again and again in the same memory."""

    def __init__(self, noise: float, seed: int, tolerance: float = 1e-2) -> None:
        check_number(noise, "noise (a standard deviation in the units of x)", at_least=0)
        self.noise, self.seed, self.tolerance = noise, seed, tolerance
        self.solver: _Solver | None = None

    def __call__(self, x: Tensor, removed: Tensor) -> Tensor:
        expected = (len(x), *x.shape[2:])
        if not isinstance(removed, Tensor):
            raise TypeError(f"removed must be a bool tensor of shape {expected}, got {type(removed).__name__}")
        if removed.dtype != torch.bool or removed.shape != expected:
            raise ValueError(f"removed must be bool of shape {expected}, got {removed.dtype} of {tuple(removed.shape)}")
        empty = int(removed.flatten(1).all(1).sum())
        if empty:
            raise ValueError(f"at least one pixel of each image must be left, got {empty} images with none")
        field = normal(generator_of(self.seed), *x.shape[1:]).to(x)
        filled = torch.empty_like(x)
        # On a CPU, a few images at a time stay in its cache.
        size = _IMAGES_AT_ONCE if x.device.type == "cpu" else len(x)
        for images, holes, result in zip(x.split(size), removed.split(size), filled.split(size), strict=True):
            if self.solver is None or self.solver.shape != images.shape:
                self.solver = _Solver(images.shape, x.device)
            solved = self.solver.solve(images, holes, self.tolerance).add_(field, alpha=self.noise)
            result.copy_(torch.where(holes[:, None], solved, images))
        return filled


# The solver. Times 12, the equations say at each removed pixel: 12 v (less at the borders of the image) minus the
# neighbours, with weights 2 and 1, is 0. The matrix is symmetric and positive definite, a Laplacian with the kept
# pixels as its boundary: conjugate gradients. The preconditioner adds to a twelfth of the residual what a multigrid
# cycle finds on the grids of 2, 4, 8, ... pixels, on cells that are wholly removed: the size of a hole hardly matters.

_IMAGES_AT_ONCE = 4
_MAX_ITERATIONS = 1000  # far above the 5 to 15 that masks take; a bound against endless loops, not a setting


class _Grid:
    """The equations on one grid. All is written into its own memory: on a CPU, fresh pages cost more than the sums."""

    def __init__(self, images: int, channels: int, inside: Tensor) -> None:
        height, width = inside.shape[2:]

        def field(rows: int, columns: int) -> Tensor:
            return torch.zeros(images, channels, rows, columns, device=inside.device)

        self.residual, self.step = field(height, width), field(height, width)
        self.half = field(height // 2, width)
        self.framed = field(height + 2, width + 2)
        self.field = self.framed[..., 1:-1, 1:-1]  # what the equations are applied to; its frame stays 0
        space = images * channels * (height + 1) * (width + 2)
        self.sums = [torch.empty(space, device=inside.device) for _ in range(2)]
        self.field.copy_(inside)
        self.centre = self.neighbours()[:1, :1] * inside  # 16 inside of the image, less at its borders
        self.mask = self.inside = inside  # `mask`: where the equations hold, set for each batch

    def neighbours(self) -> Tensor:
        """Sums of `field` over 3 x 3 pixels, weights 1 2 1, 2 4 2, 1 2 1: (b, C, H, W), valid until the next call."""
        images, channels, height, width = self.framed.shape

        def space(flat: Tensor, rows: int, columns: int) -> Tensor:
            return flat[: images * channels * rows * columns].view(images, channels, rows, columns)

        one, two = self.sums
        sums = torch.add(self.framed[..., 1:, :], self.framed[..., :-1, :], out=space(one, height - 1, width))
        sums = torch.add(sums[..., 1:, :], sums[..., :-1, :], out=space(two, height - 2, width))
        sums = torch.add(sums[..., 1:], sums[..., :-1], out=space(one, height - 2, width - 1))
        return torch.add(sums[..., 1:], sums[..., :-1], out=space(two, height - 2, width - 2))

    def defect(self) -> Tensor:
        """What the equations lack at `field`, outside of the holes too: valid until the next call."""
        return self.neighbours().addcmul_(self.centre, self.field, value=-1)

    def smooth(self) -> None:
        """One Jacobi step towards the residual."""
        self.field.addcmul_(self.defect().add_(self.residual), self.mask, value=1 / 12)


class _Solver:
    """Conjugate gradients for all channels of images of one shape (b, C, H, W), called again and again."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.shape = shape
        images, channels, height, width = shape
        self.depth = max(0, min(height, width).bit_length() - 4)  # the coarsest grid has 8 to 16 cells a side
        self.padding = (0, -width % (1 << self.depth), 0, -height % (1 << self.depth))
        inside = F.pad(torch.ones(1, 1, height, width, device=device), self.padding)
        self.grids: list[_Grid] = []
        for _ in range(self.depth + 1):
            self.grids.append(_Grid(images, channels, inside))
            inside = (_cells(inside) > 0).float() if len(self.grids) <= self.depth else inside
        self.values = torch.empty_like(self.grids[0].residual)

    def solve(self, x: Tensor, removed: Tensor, tolerance: float) -> Tensor:
        """Solve x (b, C, H, W) for removed (b, H, W); the answer lies in the solver's memory until the next call."""
        grid, values, (height, width) = self.grids[0], self.values, x.shape[2:]
        mask = F.pad(removed[:, None].float(), self.padding)
        self._guess(F.pad(x.float(), self.padding), F.pad(1 - removed[:, None].float(), self.padding))
        last = self._mark(mask)
        direction, residual, step = grid.field, grid.residual, grid.step
        direction.copy_(values)
        torch.mul(grid.defect(), mask, out=residual)
        direction.zero_()
        tiny = torch.finfo(torch.float32).tiny
        before = torch.ones_like(values[..., :1, :1])
        for _ in range(_MAX_ITERATIONS):
            self._precondition(last)
            energy = self._dot(residual, step)  # [b, C, 1, 1]
            direction.mul_(energy / before).add_(step)
            image = grid.defect().mul_(mask)
            length = energy / (-self._dot(image, direction)).clamp_min(tiny)
            values.addcmul_(direction, length)
            furthest = torch.abs(direction, out=step).amax((2, 3), keepdim=True)
            if float((furthest * length).max()) <= tolerance:
                return values[..., :height, :width]
            residual.addcmul_(image, length)
            before = energy.clamp_min(tiny)
        raise RuntimeError(f"imputation did not settle to {tolerance} within {_MAX_ITERATIONS} iterations")

    def _guess(self, x: Tensor, kept: Tensor) -> None:
        """Fill removed pixels from the means of ever larger cells, into `values`; kept is (b, 1, H, W)."""
        torch.mul(x, kept, out=self.grids[0].residual)
        weights = [kept]
        for finer, coarser in zip(self.grids, self.grids[1:], strict=False):
            weight = _cells(weights[-1])
            _cells(finer.residual, finer.half, coarser.residual).div_(weight.clamp_min(1))
            weights.append((weight > 0).float())
        known = self.grids[-1].residual
        mean = known.sum((2, 3), keepdim=True) / weights[-1].sum((2, 3), keepdim=True)
        filled = torch.addcmul(known, mean, 1 - weights[-1])
        for grid, weight in zip(self.grids[-2::-1], weights[-2::-1], strict=True):
            _refine(filled, grid.half, grid.step)
            filled = grid.step.mul_(1 - weight).add_(grid.residual)
        torch.mul(filled, self.grids[0].inside, out=self.values)

    def _mark(self, mask: Tensor) -> int:
        """Give each grid the mask of its wholly removed cells; return the last that holds a good part of the holes."""
        self.grids[0].mask = mask
        total = mask.sum((1, 2, 3)).clamp_min(1)
        for k in range(1, self.depth + 1):
            mask = (_cells(mask) == _cells(self.grids[k - 1].inside)) * self.grids[k].inside
            if float((mask.sum((1, 2, 3)) / total).max()) * 4**k < 0.2:  # small holes need no coarse grids
                return k - 1
            self.grids[k].mask = mask
        return self.depth

    def _precondition(self, last: int) -> None:
        """From the residual to the step of the finest grid."""
        grid = self.grids[0]
        if last:
            _coarsen(grid.residual, grid.half, self.grids[1].residual)
            self._cycle(1, last)
            _refine(self.grids[1].field, grid.half, grid.step)
            grid.step.add_(grid.residual, alpha=1 / 12).mul_(grid.mask)
        else:
            grid.step.copy_(grid.residual)

    def _cycle(self, k: int, last: int) -> None:
        """A symmetric V-cycle from grid k down: from its residual to its field."""
        grid = self.grids[k]
        torch.mul(grid.residual, grid.mask, out=grid.field).mul_(1 / 12)
        if k < last:
            coarser = self.grids[k + 1]
            _coarsen(grid.defect().add_(grid.residual).mul_(grid.mask), grid.half, coarser.residual)
            self._cycle(k + 1, last)
            _refine(coarser.field, grid.half, grid.step)
            grid.field.addcmul_(grid.step, grid.mask)
        for _ in range(1 if k < last else 5):  # the coarsest is small enough for a few steps to solve it
            grid.smooth()

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        product = torch.mul(a, b, out=self.grids[0].sums[0][: a.numel()].view(a.shape))
        return product.sum((2, 3), keepdim=True)


def _cells(values: Tensor, half: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Sum over cells of 2 x 2 pixels."""
    rows = torch.add(values[..., ::2, :], values[..., 1::2, :], out=half)
    return torch.add(rows[..., ::2], rows[..., 1::2], out=out)


def _refine(coarse: Tensor, half: Tensor, fine: Tensor) -> None:
    """Bilinear interpolation (b, C, h, w) -> (b, C, 2h, 2w), as `F.interpolate`, which is much slower on the CPU."""
    half[..., 0], half[..., -1] = coarse[..., 0], coarse[..., -1]
    torch.lerp(coarse[..., 1:], coarse[..., :-1], 0.25, out=half[..., 2::2])
    torch.lerp(coarse[..., :-1], coarse[..., 1:], 0.25, out=half[..., 1:-1:2])
    fine[..., 0, :], fine[..., -1, :] = half[..., 0, :], half[..., -1, :]
    torch.lerp(half[..., 1:, :], half[..., :-1, :], 0.25, out=fine[..., 2::2, :])
    torch.lerp(half[..., :-1, :], half[..., 1:, :], 0.25, out=fine[..., 1:-1:2, :])


def _coarsen(fine: Tensor, half: Tensor, coarse: Tensor) -> None:
    """Transpose of `_refine`."""
    even, odd = fine[..., ::2, :], fine[..., 1::2, :]
    torch.add(even, odd, out=half).mul_(0.75)
    half[..., 1:, :].add_(odd[..., :-1, :], alpha=0.25)
    half[..., :-1, :].add_(even[..., 1:, :], alpha=0.25)
    half[..., 0, :].add_(even[..., 0, :], alpha=0.25)
    half[..., -1, :].add_(odd[..., -1, :], alpha=0.25)
    even, odd = half[..., ::2], half[..., 1::2]
    torch.add(even, odd, out=coarse).mul_(0.75)
    coarse[..., 1:].add_(odd[..., :-1], alpha=0.25)
    coarse[..., :-1].add_(even[..., 1:], alpha=0.25)
    coarse[..., 0].add_(even[..., 0], alpha=0.25)
    coarse[..., -1].add_(odd[..., -1], alpha=0.25)
