"""How the tensors of a layer's output may be read as grids, and which reading the stripe probe speaks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ib_explain.layouts import Layout, unfold

__all__ = ["CERTAIN", "FEW", "STRIPES", "Reader", "choose", "finest_grid"]

FEW = 2  # images of the probe that run first
STRIPES = 10  # per direction; fewer loses 4-row grids, more costs images
VERIFIED = 0.85  # correlation of measured with assumed positions: wrong readings stay below .75, true ones above .78
CERTAIN = 0.95  # above it one draw of the probe is enough
PLAUSIBLE = 0.6
SHARP = 3.0  # strongest over mean answer of a position: below 2.1 where the probe drowns, above it speaks
MOST_PREFIX_TOKENS = 16
FEWEST_POSITIONS = 9  # with fewer, some wrong reading correlates by chance


def finest_grid(shape: tuple[int, ...], batch: int, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The finest grid that a tensor of this shape could hold for inputs of this size, or None; an upper bound."""
    if len(shape) < 2 or (len(shape) == 2 and shape[0] == batch):
        return None
    options: list[tuple[int, int]] = []
    if shape[0] % batch == 0:
        options += _possible_grids(shape[0] // batch, list(shape[1:]), input_size)
    if len(shape) > 2 and shape[1] == batch:  # sequence first
        options += _possible_grids(1, [shape[0], *shape[2:]], input_size)
    return max(options, key=math.prod, default=None)


def _possible_grids(fold: int, rest: list[int], input_size: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    if fold == 1 and len(rest) > 2:
        fitting = [pair for pair in itertools.permutations(rest, 2) if _fits(pair, input_size)]
        yield from fitting or (pair for pair in itertools.combinations(rest, 2) if min(pair) > 1)  # may be squashed
        return
    if fold > 1:
        counts = [fold * math.prod(c) for n in range(len(rest)) for c in itertools.combinations(rest, n)]
    else:
        counts = [length - beside for length in rest for beside in range(MOST_PREFIX_TOKENS + 1)]
    for count in counts:
        yield from _factorisations(count, input_size)


class Reader:
    """The answers of one leaf to the stripes, averaged over draws, and the readings that its shape allows."""

    def __init__(self, path: tuple[int | str, ...], batch_axis: int, fold: int, values: Tensor) -> None:
        self.path, self.batch_axis, self.fold = path, batch_axis, fold
        self.shape = tuple(values.shape[1:])  # without the batch, `fold` (if > 1) first
        change = (values[1:] - values[:1]).abs().unflatten(0, (2, STRIPES))
        # Each element casts one vote whatever its scale: loud channels would decide otherwise.
        share = change / change.sum(dim=1, keepdim=True).clamp_min(1e-30)
        self.response = torch.nan_to_num(share).cpu()  # share of each element's change that a stripe brings

    @classmethod
    def for_leaf(cls, path: tuple[int | str, ...], start: Tensor, rest: Tensor) -> Reader | None:
        """Read a leaf of which `start` holds the first FEW images; None if it does not follow batch and image."""
        count = 2 * STRIPES + 1 - FEW
        scaled = [axis for axis in range(start.ndim) if start.shape[axis] != rest.shape[axis]]
        if start.ndim != rest.ndim or len(scaled) != 1:
            return None
        axis = scaled[0]
        fold = start.shape[axis] // FEW
        if (start.shape[axis], rest.shape[axis]) != (FEW * fold, count * fold):
            return None
        values = unfold(torch.cat([start, rest], dim=axis), axis, fold).float()
        return cls(path, axis, fold, values) if bool((values != values[:1]).any()) else None

    def add(self, other: Reader) -> None:
        """Take in another draw of the same leaf."""
        self.response = self.response + other.response

    def positions(self, axes: tuple[int, ...]) -> Tensor:
        """Measured (y, x) of every position, in stripes: (2, P)."""
        votes = self._votes(axes)
        # Double centring removes what every position feels of a stripe (attention, squeeze-excite, pooled norms).
        votes = votes - votes.mean(dim=2, keepdim=True)
        votes = (votes - votes.median(dim=1, keepdim=True).values).clamp_min(0)
        total = votes.sum(dim=1)
        where = torch.arange(STRIPES, dtype=torch.float32, device="cpu")[None, :, None]
        centre = (votes * where).sum(dim=1) / total.clamp_min(1e-30)
        return torch.where(total > 0, centre, (STRIPES - 1) / 2)

    def sharpness(self, axes: tuple[int, ...]) -> float:
        """How much a position answers to one stripe rather than to all, between 1 and STRIPES."""
        votes = self._votes(axes)
        return float((votes.amax(dim=1) / votes.mean(dim=1).clamp_min(1e-12)).mean(dim=1).min())

    def _votes(self, axes: tuple[int, ...]) -> Tensor:
        """Answer of every position to every stripe, averaged over channels: (2, STRIPES, P)."""
        channels = [axis for axis in range(1, len(self.shape) + 1) if axis not in axes]
        votes = self.response.permute(0, 1, *(a + 1 for a in axes), *(c + 1 for c in channels))
        return (votes.flatten(2 + len(axes)).mean(dim=-1) if channels else votes).flatten(2)

    def covers_all(self, layout: Layout) -> bool:
        """Whether every stripe reaches some position, and every row and column of the grid sees some stripe."""
        reached = self.response.flatten(2).any(dim=2)
        seeing = self._votes(layout.axes).any(dim=1).any(dim=0)
        seeing = seeing[layout.prefix : len(seeing) - layout.suffix]
        seeing = (seeing if layout.order is None else seeing[list(layout.order)]).view(layout.grid)
        return bool(reached.all() and seeing.any(dim=0).all() and seeing.any(dim=1).all())

    def axis_pairs(self) -> list[tuple[int, int]]:
        """Pairs of axes that could hold the rows and columns of positions."""
        count = len(self.shape)
        # A leaf with two axes needs one for its channels.
        return list(itertools.combinations(range(1, count + 1), 2)) if self.fold == 1 and count > 2 else []

    def axis_sets(self) -> Iterator[tuple[int, ...]]:
        """Sets of axes that could hold the positions: pairs (both ways round), single axes."""
        for pair in self.axis_pairs():
            yield pair
            yield pair[::-1]
        if self.fold == 1:
            for axis in range(1, len(self.shape) + 1):
                yield (axis,)

    def scrambled_sets(self) -> Iterator[tuple[int, ...]]:
        count = len(self.shape)
        for size in range(1, count):
            for axes in itertools.combinations(range(1, count + 1), size):
                if self.fold == 1 or 1 in axes:
                    yield axes


@dataclass(frozen=True)
class _Reading:
    score: float
    rank: int  # ties: pair of axes, tokens, scrambled; then fewer tokens beside the grid
    layout: Layout
    reader: Reader


def choose(readers: list[Reader], input_size: tuple[int, int, int]) -> Layout | str:
    """The layout of an output from its leaves' responses, or a sentence that says why it is no grid."""
    grids = [reader for reader in readers if len(reader.shape) > 1]
    readings = [reading for reader in grids for reading in _plain_readings(reader, input_size)]
    if _verified(readings) is None:
        readings += [reading for reader in grids for reading in _squashed_readings(reader)]
    if _verified(readings) is None:
        readings += [reading for reader in grids for reading in _scrambled_readings(reader, input_size)]
    if not readings:
        return _refusal(readers, None, input_size)
    layout = _verified(readings) or _by_shape(readings, input_size)
    if layout is None:
        best = max(readings, key=lambda r: (math.prod(r.layout.grid) >= FEWEST_POSITIONS, r.score))
        return _refusal(readers, best, input_size)
    (reader,) = (r for r in grids if r.path == layout.path)
    others = tuple(r.path for r in readers if r.path != layout.path and r.batch_axis == 0)
    return replace(layout, others=others, aligned=reader.covers_all(layout) or min(input_size[1:]) < STRIPES)


def _refusal(readers: list[Reader], best: _Reading | None, input_size: tuple[int, int, int]) -> str:
    """What a grid must be, and what there is."""
    shapes = "; ".join(f"({', '.join(map(str, ('B', *reader.shape)))})" for reader in readers)
    if not shapes:
        return "expected a float tensor that follows the image, and its output holds none"
    if best is None:
        size = f"the {input_size[1]} x {input_size[2]} input"
        return (
            f"expected at least 2 x 2 positions in the aspect of {size}, or {FEWEST_POSITIONS} beside other tokens, "
            f"got {shapes}"
        )
    h, w = best.layout.grid
    return (
        f"expected at least {FEWEST_POSITIONS} positions that follow the input's with a correlation of {VERIFIED}, "
        f"got {best.score:.2f} at best, for {h} x {w} positions of {shapes}"
    )


def _verified(readings: list[_Reading]) -> Layout | None:
    """The reading with most positions among those that the probe agrees with about as well as with the best."""
    enough = max(PLAUSIBLE, 0.85 * max((r.score for r in readings), default=0.0))
    near = [r for r in readings if r.score >= enough and math.prod(r.layout.grid) >= FEWEST_POSITIONS]
    chosen = max(near, key=lambda r: (math.prod(r.layout.grid), -r.rank, r.score), default=None)
    return chosen.layout if chosen is not None and chosen.score >= VERIFIED else None


def _by_shape(readings: list[_Reading], input_size: tuple[int, int, int]) -> Layout | None:
    """The only reading that geometry allows, for layers in which the probe drowns (very deep, or global mixing).

    Where every position does answer to its own part of the image, in these axes or in others, and no reading agrees,
    the order is not known.
    """

    def natural(grid: tuple[int, int]) -> bool:
        steps = range(1, min(input_size[1:]) // 2 + 1)
        return any(abs(input_size[1] / s - grid[0]) < 1 and abs(input_size[2] / s - grid[1]) < 1 for s in steps)

    maps = [r for r in readings if len(r.layout.axes) == 2 and r.layout.order is None and natural(r.layout.grid)]
    maps = [r for r in maps if r.layout.axes in ((2, 3), (1, 2))]
    tokens = [r for r in readings if r.layout.axes == (1,) and r.layout.order is None and natural(r.layout.grid)]
    tokens = [r for r in tokens if r.layout.prefix == r.layout.suffix == 0 or r.score >= PLAUSIBLE]
    options = maps or tokens
    options = [r for r in options if r.score >= PLAUSIBLE or not _speaks(r)]
    if not options:
        return None
    chosen = options[0]
    if len({(r.layout.path, r.layout.axes, r.layout.prefix, r.layout.grid) for r in options}) > 1:
        if len({r.layout.path for r in options}) < len(options):  # two readings of one tensor: nothing decides
            return None
        chosen = min(options, key=lambda r: (-math.prod(r.layout.grid), r.rank))  # of several tensors the finest grid
    return replace(chosen.layout, verified="shape")


def _speaks(reading: _Reading) -> bool:
    """Whether positions do answer to their own part of the image, in some axes of the leaf."""
    sets = {reading.layout.axes, *reading.reader.axis_pairs()}
    return any(reading.reader.sharpness(axes) >= SHARP for axes in sets)


def _squashed_readings(reader: Reader) -> Iterator[_Reading]:
    """Grids of another aspect than the input's, as of a host that resizes its images: only where the probe is sure."""
    for axes in reader.axis_pairs():
        for pair in (axes, axes[::-1]):
            grid = (reader.shape[pair[0] - 1], reader.shape[pair[1] - 1])
            if min(grid) > 1 and math.prod(grid) >= FEWEST_POSITIONS:
                reading = _score(reader, pair, reader.positions(pair), grid, rank=30 if pair == axes else 65)
                if reading.score >= CERTAIN:
                    yield reading


def _plain_readings(reader: Reader, input_size: tuple[int, int, int]) -> Iterator[_Reading]:
    for axes in reader.axis_sets():
        sizes = [reader.shape[a - 1] for a in axes]
        if len(axes) == 2:
            if _fits((sizes[0], sizes[1]), input_size):
                rank = 0 if axes[0] < axes[1] else 60
                yield _score(reader, axes, reader.positions(axes), (sizes[0], sizes[1]), rank=rank)
            continue
        measured = None
        for prefix, suffix in [(p, 0) for p in range(MOST_PREFIX_TOKENS + 1)] + [(0, 1), (0, 2)]:
            for grid in _factorisations(sizes[0] - prefix - suffix, input_size):
                if prefix + suffix and math.prod(grid) < FEWEST_POSITIONS:
                    continue
                measured = reader.positions(axes) if measured is None else measured
                rank = 20 + prefix + 17 * suffix
                reading = _score(reader, axes, measured, grid, prefix=prefix, suffix=suffix, rank=rank)
                if len(reader.shape) < 3 or reading.score >= 0.9:  # a leaf with three axes has two for a real map
                    yield reading


def _score(
    reader: Reader,
    axes: tuple[int, ...],
    measured: Tensor,
    grid: tuple[int, int],
    *,
    rank: int,
    prefix: int = 0,
    suffix: int = 0,
    order: tuple[int, ...] | None = None,
) -> _Reading:
    measured = measured[:, prefix : measured.shape[1] - suffix]
    if order is not None:
        measured = measured[:, list(order)]
    rows, columns = torch.meshgrid(*(torch.arange(extent, device="cpu") for extent in grid), indexing="ij")
    score = min(_correlation(measured[0], rows.flatten().float()), _correlation(measured[1], columns.flatten().float()))
    channels = math.prod(reader.shape) // math.prod(reader.shape[a - 1] for a in axes)
    layout = Layout(
        reader.path,
        reader.batch_axis,
        reader.fold,
        axes,
        prefix,
        suffix,
        order,
        grid,
        channels,
        round(score, 4),
        "probe",
    )
    return _Reading(score, rank, layout, reader)


def _scrambled_readings(reader: Reader, input_size: tuple[int, int, int]) -> Iterator[_Reading]:
    """Positions whose index is a mixed-radix number with digits of y and x interleaved (windows, blocks, unfolding)."""
    for axes in reader.scrambled_sets():
        sizes = [reader.shape[a - 1] for a in axes]
        count = math.prod(sizes)
        if not any(True for _ in _factorisations(count, input_size)) or count > 65536:
            continue
        measured = reader.positions(axes)  # (2, P)
        for radices in itertools.islice(_digit_orders(sizes), 40):
            counters = [torch.arange(radix, device="cpu") for radix in radices]
            digits = torch.stack([d.flatten() for d in torch.meshgrid(*counters, indexing="ij")])
            slopes = [[_slope(measured[d], digit) for digit in digits] for d in (0, 1)]
            effects = torch.tensor(slopes, device="cpu")  # (2, digits)
            direction = effects.abs().argmax(dim=0)
            raster, extents = [], []
            for d in (0, 1):
                mine = [i for i in range(len(radices)) if direction[i] == d]
                mine.sort(key=lambda i: -float(effects[d, i]))
                index = torch.zeros(count, dtype=torch.long, device="cpu")
                for i in mine:
                    index = index * radices[i] + digits[i]
                raster.append(index)
                extents.append(math.prod(radices[i] for i in mine))
            grid = (extents[0], extents[1])
            if not _fits(grid, input_size):
                continue
            order = torch.argsort(raster[0] * grid[1] + raster[1])
            plain = torch.equal(order, torch.arange(count, device="cpu"))
            if plain and reader.fold == 1 and len(axes) == 1 and len(reader.shape) < 3:
                continue  # already tried
            yield _score(reader, axes, measured, grid, order=tuple(order.tolist()), rank=40)


def _digit_orders(sizes: list[int]) -> Iterator[list[int]]:
    per_axis = [sorted(set(itertools.islice(itertools.permutations(_primes(size)), 5040))) for size in sizes]
    for combination in itertools.product(*(orders[:20] for orders in per_axis)):
        yield [radix for digits in combination for radix in digits]


def _primes(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors or [1]


def _slope(values: Tensor, digit: Tensor) -> float:
    centred = digit.float() - digit.float().mean()
    return float((values * centred).sum() / (centred * centred).sum().clamp_min(1e-12))


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


def _fits(grid: tuple[int, int], input_size: tuple[int, int, int]) -> bool:
    """At least 2x2, not finer than the input, with the input's aspect up to one cell (valid padding loses cells)."""
    (h, w), (_, height, width) = grid, input_size
    return 2 <= h <= height and 2 <= w <= width and abs(h * width / height - w) <= 1 + 0.02 * w


def _factorisations(count: int, input_size: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    for h in range(2, min(count // 2, input_size[1]) + 1):
        if count % h == 0 and _fits((h, count // h), input_size):
            yield h, count // h
