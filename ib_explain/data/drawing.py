"""How the synthetic pictures are drawn: outlines, textures, backgrounds, and randomness that is a hash of the index."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ib_explain.maps import resize

__all__ = ["CLASS_NAMES", "draw_pictures"]

CLASS_NAMES = ("disc", "ring", "square", "triangle", "cross", "star", "stripes", "checker")

_CLUTTER = 4  # distractors a picture
_OUTWARDS = 0.6  # 0: centres uniform, 1: all at the border; at 0.6 the middle pixel is evidence in 2 % of pictures


# Outlines: signed distance in units of the object's scale, negative inside, for local coordinates x, y ---------------


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _disc(x: Tensor, y: Tensor, radius: float = 0.59) -> Tensor:
    return (x * x + y * y).sqrt() - radius


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, 0.47).abs() - 0.125


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.525, 0.525)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) - 0.45


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.7, 0.23), _box(x, y, 0.23, 0.7))


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Folded into one tenth by two mirrors; there the outline is one straight edge from the tip (0, r) to the notch.
    x = x.abs()
    for mirror_x, mirror_y in ((0.809017, -0.587785), (-0.809017, -0.587785)):
        beyond = 2 * (mirror_x * x + mirror_y * y).clamp_min(0)
        x, y = x - mirror_x * beyond, y - mirror_y * beyond
    tip, notch = 0.87, 0.87 * 0.45
    notch_x, notch_y = notch * 0.587785, notch * 0.809017
    edge_x, edge_y = notch_x, notch_y - tip
    length = (edge_x**2 + edge_y**2) ** 0.5
    return (edge_x * (y - tip) - edge_y * x.abs()) / length


def _blob(x: Tensor, y: Tensor) -> Tensor:
    squared = (x * x + y * y).clamp_min(1e-6)
    lobes = 0.16 * (x * x - y * y) / squared + 0.1 * y * (3 * x * x - y * y) / squared**1.5
    return squared.sqrt() - 0.58 * (1 + lobes)


def _ellipse(x: Tensor, y: Tensor) -> Tensor:
    return ((0.48 * x) ** 2 + (1.15 * y) ** 2).sqrt() - 0.38


def _half_disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disc(x, y, 0.75), -y - 0.08)


def _arc(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disc(x, y, 0.6).abs() - 0.125, x.abs() - y)


def _rod(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.8, 0.17)


def _corner(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_box(x, y, 0.54, 0.54), -_box(x - 0.36, y - 0.36, 0.6, 0.6))


_OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict(zip(CLASS_NAMES, (_disc, _ring, _square, _triangle, _cross, _star, _blob, _blob), strict=True)),
    "ellipse": _ellipse,
    "half disc": _half_disc,
    "arc": _arc,
    "rod": _rod,
    "corner": _corner,
    "blob": _blob,  # the outline of stripes and checker without their texture
    "speckled blob": _blob,
}
_KINDS = tuple(_OUTLINES)
_STRIPES, _CHECKER, _SPECKLED = (_KINDS.index(name) for name in ("stripes", "checker", "speckled blob"))
_FILLED = {_KINDS.index("ring"): 0.595}  # radius of the silhouette where the evidence is more than what is painted


# Drawing -------------------------------------------------------------------------------------------------------------


def draw_pictures(indices: np.ndarray, size: int, seed: int, objects: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw these pictures of a seed, of `objects` objects each.

    Args:
        indices: (B,) uint64, which pictures.
        size: pixels a side.
        seed: of all randomness, with the index.
        objects: 1 or 2.

    Returns:
        Pixels (B, 3, H, W) float32 in [0, 1] in steps of 1 / 255, classes (B, objects) int64, evidence
        (B, objects, H, W) bool.
    """

    def draw(stream: int, *shape: int) -> Tensor:
        return _uniform(seed, indices, stream, int(np.prod(shape))).view(len(indices), *shape)

    batch, classes, items = len(indices), len(CLASS_NAMES), objects + _CLUTTER
    label = _labels(seed, indices, objects)
    decoys = (classes + draw(1, _CLUTTER) * (len(_KINDS) - classes)).long()
    kind = torch.cat([label, decoys], dim=1)  # (B, items), the objects first

    scale = 0.23 + 0.1 * draw(2, items)  # of the picture's side
    turn = 2 * torch.pi * draw(3, items)
    place = _places(scale, draw(4, items, 12, 2), objects)

    canvas = _background(draw, size)
    colours = draw(5, items, 2, 3)
    colours = _away_from(colours, canvas.mean(dim=(2, 3)))

    axis = (torch.arange(size, device="cpu") + 0.5) / size
    x = axis - place[..., 0, None]  # (B, items, W)
    y = axis - place[..., 1, None]  # (B, items, H)
    cos, sin = (turn.cos() / scale)[..., None], (turn.sin() / scale)[..., None]
    local_x = (cos * x)[:, :, None, :] + (sin * y)[:, :, :, None]  # (B, items, H, W), in units of the item's scale
    local_y = (cos * y)[:, :, :, None] - (sin * x)[:, :, None, :]
    grain = resize(draw(6, 1, 24, 24), (size, size))[:, 0]

    mask = torch.zeros(batch, objects, size, size, dtype=torch.bool, device="cpu")
    phase = 2 * torch.pi * draw(7, items, 2)
    present = draw(8, items) < 0.85  # the number of distractors varies
    present[:, :objects] = True
    for item in reversed(range(items)):  # objects last: nothing covers the evidence
        local = local_x[:, item], local_y[:, item]
        shares, blend, silhouette = _item(kind[:, item], *local, scale[:, item] * size, phase[:, item], grain)
        first, second = colours[:, item, :, :, None, None].unbind(dim=1)
        paint = first + (second - first) * blend[:, None]
        canvas += (paint - canvas) * (shares * present[:, item, None, None])[:, None]
        if item < objects:
            mask[:, item] = silhouette
    if objects == 2:
        mask[:, 1] &= ~mask[:, 0]  # the first object is painted over the second where they touch

    noise = draw(9, 3, size, size) - 0.5
    canvas += noise * (0.04 + 0.12 * draw(10, 1, 1, 1))
    return (canvas.clamp(0, 1) * 255).round() / 255, label, mask


def _item(
    kind: Tensor, x: Tensor, y: Tensor, pixels: Tensor, phase: Tensor, grain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one item of each picture.

    Args:
        kind: (B,) index into _KINDS.
        x, y: (B, H, W) coordinates in units of the item's scale.
        pixels: (B,) that scale in pixels.
        phase: (B, 2) of the texture, radians.
        grain: (B, H, W) coarse noise in [0, 1], the texture of speckled blobs.

    Returns:
        Share of each pixel that is covered, share of the second colour there, and silhouette (bool); (B, H, W) each.
    """
    shares, blend, silhouette = torch.empty_like(x), 0.15 * x, torch.empty_like(x, dtype=torch.bool)  # a faint shading
    for k in kind.unique().tolist():
        rows = kind == k
        lx, ly = x[rows], y[rows]
        covered = (0.5 - _OUTLINES[_KINDS[k]](lx, ly) * pixels[rows, None, None]).clamp(0, 1)  # edges one pixel wide
        shares[rows] = covered
        silhouette[rows] = _disc(lx, ly, _FILLED[k]) <= 0 if k in _FILLED else covered >= 0.5
        if k in (_STRIPES, _CHECKER, _SPECKLED):
            px, py = phase[rows, :, None, None].unbind(dim=1)
            if k == _STRIPES:
                wave = torch.sin(15 * lx + px)
            elif k == _CHECKER:
                wave = torch.sin(9 * lx + px) * torch.sin(9 * ly + py)
            else:
                wave = grain[rows] - 0.5
            blend[rows] = (0.5 + 4 * wave).clamp(0, 1)
    return shares, blend, silhouette


def _background(draw: Callable[..., Tensor], size: int) -> Tensor:
    """Colour clouds at two scales, two gratings and three lines: (B, 3, H, W), roughly in [0, 1]."""
    canvas = 0.5 + 0.5 * (resize(draw(20, 3, 4, 4), (size, size)) - 0.5)
    canvas += 0.35 * draw(21, 1, 1, 1) * (resize(draw(22, 3, 14, 14), (size, size)) - 0.5)
    axis = (torch.arange(size, device="cpu") + 0.5) / size - 0.5
    turn = 2 * torch.pi * draw(23, 5, 1, 1)
    across = turn.cos() * axis + turn.sin() * axis[:, None]  # (B, 5, H, W)
    frequency, phase, tint = 25 + 75 * draw(24, 2, 1, 1), 6.28 * draw(25, 2, 1, 1), draw(26, 5, 3, 1, 1) - 0.5
    for k in range(2):
        canvas += 0.18 * tint[:, k] * torch.sin(frequency[:, k, None] * across[:, k, None] + phase[:, k, None])
    offset, width = 0.8 * (draw(27, 3, 1, 1) - 0.5), 0.006 + 0.014 * draw(28, 3, 1, 1)
    shares = (0.5 + (width - (across[:, 2:] - offset).abs()) * size).clamp(0, 1)
    for k in range(3):
        canvas += (0.5 + tint[:, 2 + k] - canvas) * 0.8 * shares[:, k, None]
    return canvas


def _places(scale: Tensor, u: Tensor, objects: int) -> Tensor:
    """Centres (B, items, 2) in [0, 1] from candidates `u` (B, items, tries, 2): each item where it has most room.

    Items are placed in turn. The first takes its first candidate: its place depends on nothing but its scale.
    """
    centred = 2 * u - 1  # uniform in the square
    # Pushed outwards along the rays from the middle: as objects lie within the picture, uniform centres would let a map
    # that knows nothing but the middle point at the object more than twice as often as chance.
    centred = centred / centred.abs().amax(dim=-1, keepdim=True).clamp_min(1e-6) ** _OUTWARDS
    candidates = 0.5 + (0.5 - 0.66 * scale[:, :, None, None]) * centred
    places = candidates[:, :, 0].clone()
    rows = torch.arange(len(scale), device="cpu")
    for item in range(1, scale.shape[1]):
        apart = (candidates[:, item, :, None] - places[:, None, :item]).norm(dim=-1)  # (B, tries, items before)
        room = apart - 0.75 * (scale[:, item, None, None] + scale[:, None, :item])
        # Any place with room will do; clearance from an object counts before clearance from other distractors.
        room[:, :, objects:] *= 0.25
        places[:, item] = candidates[rows, item, room.amin(dim=2).clamp_max(0.02).argmax(dim=1)]
    return places


def _away_from(colours: Tensor, mean: Tensor) -> Tensor:
    """Make colours (B, items, 2, 3) legible: the first against the background's mean (B, 3), the second against it."""
    first = _push(colours[:, :, 0], mean[:, None], 0.45)
    second = _push(colours[:, :, 1], first, 0.6)
    return torch.stack([first, second], dim=2)


def _push(colours: Tensor, reference: Tensor, least: float) -> Tensor:
    """Move `colours` away from `reference` to a distance of `least` (RGB, each in [0, 1]) where they are closer."""
    apart = colours - reference
    distance = apart.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    moved = reference + apart * (least / distance).clamp_min(1)
    # Where the cube ends, go the other way.
    mirrored = reference - apart * (least / distance).clamp_min(1)
    outside = ((moved < 0) | (moved > 1)).any(dim=-1, keepdim=True)
    return torch.where(outside, mirrored, moved).clamp(0, 1)


# Randomness ----------------------------------------------------------------------------------------------------------


def _labels(seed: int, indices: np.ndarray, objects: int) -> Tensor:
    """Distinct classes (B, objects): the first runs through a fresh permutation of all classes every K pictures."""
    classes = len(CLASS_NAMES)
    order = _uniform(seed, indices // np.uint64(classes), 100, classes).argsort(dim=1)
    first = order.gather(1, torch.from_numpy((indices % np.uint64(classes)).astype(np.int64))[:, None])
    step = 1 + (_uniform(seed, indices, 101, 1) * (classes - 1)).long()
    return torch.cat([first, (first + step) % classes], dim=1)[:, :objects]


def _uniform(seed: int, indices: np.ndarray, stream: int, count: int) -> Tensor:
    """(B, count) float32 in [0, 1), an integer hash (SplitMix64) of seed, index, stream and column."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = _mix(_mix(_mix(np.full_like(indices, seed)) + indices) + np.uint64(stream))
        columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(key[:, None] + columns)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
