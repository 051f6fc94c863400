"""How a layer's output is read as features (B, C, h, w) and put back: `Layout`.

All other files see (B, C, h, w) only. Which layout an output has is found in `ib_explain.stripes`.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "LayoutChanged", "leaves", "map_tensors", "unfold"]


class LayoutChanged(ValueError):
    """A layer's output has another shape than when it was probed: the host was changed since."""


@dataclass(frozen=True)
class Layout:
    """How to read one tensor of a layer's output as a grid.

    Attributes:
        path: keys that lead to the tensor inside nested tuples, lists and dicts; () for a plain tensor.
        batch_axis: the axis of the batch; its size is B * fold.
        fold: windows or patches folded into the batch axis, batch-major; 1 for none.
        axes: the axes over which positions run, slowest first, counted with the batch first and `fold` (if > 1) as
            axis 1. All remaining axes are channels.
        prefix: tokens before the grid (class and register tokens).
        suffix: tokens behind it.
        order: for every raster position its index among the positions, if they do not run in raster order.
        grid: (h, w).
        channels: C.
        score: correlation of the measured with the assumed positions, in [-1, 1].
        others: paths of the other float tensors of the output that have the batch on their first axis.
        verified: "probe" (score >= 0.85 over at least 9 positions), or "shape" where the probe could not tell and
            only one reading fits.
        aligned: the grid and the image cover the same area. False where a tenth of the image's rows or columns reaches
            no position, or a row or column of the grid sees nothing: the host crops or pads its images.
    """

    path: tuple[int | str, ...]
    batch_axis: int
    fold: int
    axes: tuple[int, ...]
    prefix: int
    suffix: int
    order: tuple[int, ...] | None
    grid: tuple[int, int]
    channels: int
    score: float
    verified: str
    others: tuple[tuple[int | str, ...], ...] = ()
    aligned: bool = True

    @property
    def has_side(self) -> bool:
        """Whether anything stands beside the grid that could carry the image around it."""
        return bool(self.prefix or self.suffix or self.others)

    @property
    def kind(self) -> str:
        """Short name for people: NCHW, NHWC, NLC, NCL, or what is unusual about it."""
        words = []
        if self.batch_axis:
            words.append(f"batch on axis {self.batch_axis}")
        if self.fold > 1:
            words.append(f"{self.fold} folded into the batch")
        if self.order is not None:
            words.append("permuted")
        plain = {(2, 3): "NCHW", (1, 2): "NHWC", (3, 2): "NCWH", (2, 1): "NWHC", (1,): "NLC", (2,): "NCL"}
        if not words or self.fold == 1:
            words.insert(0, plain.get(self.axes, f"positions on axes {self.axes}"))
        if self.prefix or self.suffix:
            words.append(f"{self.prefix + self.suffix} token{'s' * (self.prefix + self.suffix > 1)} beside the grid")
        if self.path:
            words.append("tensor " + ".".join(map(str, self.path)) + " of several")
        return ", ".join(words)

    def to_grid(self, output: Any) -> Tensor:
        """Read the features (B, C, h, w) out of a layer's output (a view where that is possible).

        Raises:
            LayoutChanged: it does not fit.
        """
        if not self.fits(output):
            shapes = ", ".join(str(tuple(leaf.shape)) for _, leaf in leaves(output)) or type(output).__name__
            had = f"{self.kind} with {self.channels} channels on a grid of {self.grid} when it was probed"
            raise LayoutChanged(f"it returns {shapes}, but was {had}; the model was changed since")
        return self.read(self.tensor(output))

    def tensor(self, output: Any) -> Tensor:
        """The tensor of the output that holds the grid."""
        return _pick(output, self.path)

    def fits(self, output: Any) -> bool:
        """Whether a layer's output still has the shape that was probed."""
        try:
            tensor = self.tensor(output)
        except (IndexError, KeyError, TypeError):
            return False
        if (
            not isinstance(tensor, Tensor)
            or tensor.ndim <= self.batch_axis
            or tensor.shape[self.batch_axis] % self.fold
        ):
            return False
        shape = list(unfold(tensor, self.batch_axis, self.fold).shape)
        if max(self.axes) >= len(shape):
            return False
        positions = [shape[axis] for axis in self.axes]
        channels = math.prod(n for axis, n in enumerate(shape) if axis > 0 and axis not in self.axes)
        tokens = math.prod(self.grid) + self.prefix + self.suffix
        plain = len(positions) == 2 and self.fold == 1 and self.order is None and not (self.prefix or self.suffix)
        if plain and tuple(positions) != self.grid:
            return False
        return math.prod(positions) == tokens and channels == self.channels

    def read(self, tensor: Tensor) -> Tensor:
        """Read (B, C, h, w) out of that tensor, or out of its gradient."""
        tokens = self._tokens(tensor)
        tokens = tokens[:, self.prefix : tokens.shape[1] - self.suffix]  # (B, h*w, C)
        if self.order is not None:
            tokens = tokens[:, self._raster.to(tokens.device)]
        return tokens.reshape(tokens.shape[0], *self.grid, -1).permute(0, 3, 1, 2)

    def with_grid(self, output: Any, features: Tensor, side: list[Tensor] | None = None) -> Any:
        """Return a copy of `output` whose grid holds `features` (B, C, h, w).

        Args:
            output: what the layer returned; left unchanged.
            features: the new grid.
            side: what stands beside the grid instead of the original, as `side_of` lists it, batch axis 1 or B.
        """
        leaf = self.tensor(output)
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2).to(leaf.dtype)  # (B, h*w, C)
        if self.order is not None:
            tokens = tokens[:, self._raster.argsort().to(tokens.device)]
        held = None if side is None else [s.to(leaf.dtype) for s in side]
        if self.prefix or self.suffix:
            beside = self._beside(output) if held is None else held[0].expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([beside[:, : self.prefix], tokens, beside[:, self.prefix :]], dim=1)
        new_leaf = self._from_tokens(tokens, leaf)
        if held is None:
            return _replace(output, {self.path: new_leaf})
        held = held[1:] if self.prefix or self.suffix else held
        changed: dict[tuple[int | str, ...], Tensor] = {self.path: new_leaf}
        for path, mean in zip(self.others, held, strict=True):
            other = _pick(output, path)
            shape = other.unflatten(0, (len(tokens), -1)).shape
            changed[path] = _of_size(mean.to(other.dtype), shape).reshape(other.shape)
        return _replace(output, changed)

    def side_of(self, output: Any) -> list[Tensor]:
        """All that stands beside the grid: tokens (B, P, C) if any, then every other tensor as (B, r, ...)."""
        batch = self._tokens(self.tensor(output)).shape[0]
        tokens = [self._beside(output)] if self.prefix or self.suffix else []
        return tokens + [_pick(output, path).unflatten(0, (batch, -1)) for path in self.others]

    @functools.cached_property
    def _raster(self) -> Tensor:
        return torch.tensor(self.order, device="cpu")

    def _beside(self, output: Any) -> Tensor:
        tokens = self._tokens(self.tensor(output))
        return torch.cat([tokens[:, : self.prefix], tokens[:, tokens.shape[1] - self.suffix :]], dim=1)

    def _tokens(self, tensor: Tensor) -> Tensor:
        unfolded = unfold(tensor, self.batch_axis, self.fold)
        channels = [axis for axis in range(1, unfolded.ndim) if axis not in self.axes]
        moved = unfolded.permute(0, *self.axes, *channels)
        return moved.flatten(1 + len(self.axes)).flatten(1, len(self.axes)) if channels else moved.flatten(1)[..., None]

    def _from_tokens(self, tokens: Tensor, leaf: Tensor) -> Tensor:
        shape = unfold(leaf, self.batch_axis, self.fold).shape
        channels = [axis for axis in range(1, len(shape)) if axis not in self.axes]
        order = [0, *self.axes, *channels]
        moved = tokens.reshape(tokens.shape[0], *(shape[axis] for axis in order[1:]))
        unfolded = moved.permute(*(order.index(axis) for axis in range(len(shape))))
        folded = unfolded.flatten(0, 1) if self.fold > 1 else unfolded
        return folded.movedim(0, self.batch_axis)


def _of_size(mean: Tensor, shape: torch.Size) -> Tensor:
    """A mean over images, (1, ...), for all images; for inputs of another size also over the axes that differ."""
    others = [axis for axis in range(1, mean.ndim) if mean.shape[axis] != shape[axis]]
    return (mean.mean(others, keepdim=True) if others else mean).expand(shape)


def leaves(output: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """Float tensors with a batch axis in a nested output, with their paths."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim >= 1:
            yield path, output
    elif isinstance(output, tuple | list):
        for index, value in enumerate(output):
            yield from leaves(value, (*path, index))
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from leaves(value, (*path, key))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dicts; other values stay as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(item, change)
        return changed
    return value


def unfold(leaf: Tensor, batch_axis: int, fold: int) -> Tensor:
    """The batch first, and what is folded into it, if anything, as axis 1."""
    leaf = leaf.movedim(batch_axis, 0)
    return leaf.unflatten(0, (leaf.shape[0] // fold, fold)) if fold > 1 else leaf


def _pick(output: Any, path: tuple[int | str, ...]) -> Tensor:
    for key in path:
        output = output[key]
    return output


def _replace(output: Any, changes: dict[tuple[int | str, ...], Tensor], path: tuple[int | str, ...] = ()) -> Any:
    """A copy of a nested output with other tensors at the given paths; containers keep their types."""
    if path in changes:
        return changes[path]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_replace(v, changes, (*path, i)) for i, v in enumerate(output)))
    if isinstance(output, tuple | list):
        return type(output)(_replace(v, changes, (*path, i)) for i, v in enumerate(output))
    if isinstance(output, dict):
        changed = copy.copy(output)
        for key, value in output.items():
            changed[key] = _replace(value, changes, (*path, key))
        return changed
    return output
