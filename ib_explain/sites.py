"""Sites: layers that were probed. What may carry a bottleneck, how well it cuts, and which one is the default.

A site must be a cut: when its grid carries nothing, the logits must not depend on the image. Candidates come from the
structure of the computation (`ib_explain.survey`: a tensor through which every path from input to logits leads), each
is then measured (`ib_explain.cuts`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ib_explain.cuts import ANSWERS_DIFFER, CleanPass, answers_differ
from ib_explain.facts import remembered
from ib_explain.hooks import LayerError
from ib_explain.hosts import input_size_of, timm_config
from ib_explain.layouts import Layout
from ib_explain.modules import find_module, module_name, unwrap
from ib_explain.stripes import find_layouts
from ib_explain.survey import Candidate, Survey, survey

__all__ = ["Site", "candidate_layers", "default_layer", "deeper_sites", "input_size_of", "layouts_of", "resolve_site"]
__all__ += ["sites"]

FINE_ENOUGH = 14 * 14  # cells beyond which a finer grid brings little and costs depth
EFFECT_POWER = 4.5  # on two trained ViTs 4 to 4.9 take the block that is best for the maps, less takes later ones
STEM_SHARE, STEM = 0.05, 0.01  # of the depth, and what a layer there counts: in an untrained ViT the effect falls fast
LEAK_LIMIT = 0.05
EFFECT_LIMIT = 0.01
SHAPE_ONLY = 0.5  # what a layout counts that no probe confirmed
POOLED = 0.5  # what a layer counts behind which positions are only averaged
POOLED_TRIES = 4  # as many pooled layers in a row tell of a host in which positions hardly meet, an untrained one, say
ALIKE = 0.9  # of the best score: within it the layer with the shorter name is the default
GROUP = 8  # layers that share a probe; their outputs are in memory together


@dataclass(frozen=True, repr=False)
class Site:
    """A layer whose output was probed for inputs of one size.

    Attributes:
        name: dotted name of the layer.
        layout: how its output is read as features (B, C, h, w).
        input_size: (3, H, W) of the probe.
        depth: share of the host's module calls that are done when the layer returns, in (0, 1].
        leak: share of the logits' spread over images that is left when the grid holds the same noise for every image
            and all that stands beside it is held at its mean; 0 is a perfect cut, 1 no cut, NaN if logits are constant.
            Of a head of zeros, as untrained hosts may have, what enters it stands for the logits.
        effect: share of the logits' spread that is left when only the grid differs between images (the rest held at
            its mean): what a bottleneck on the grid can keep.
        reached: share of the grid's positions that the logits' gradient reaches.
        pooled: behind the layer positions do not meet but in a mean: nothing deeper is left to read.
        skippable: what comes before the layer need not run again (verified: the logits stay the same).
    """

    name: str
    layout: Layout
    input_size: tuple[int, int, int]
    depth: float
    leak: float
    effect: float
    reached: float
    pooled: bool
    skippable: bool

    def __repr__(self) -> str:
        (h, w), shares = self.grid, f"depth {self.depth:.2f}, leak {self.leak:.2f}, effect {self.effect:.2f}"
        return f"<Site {self.name!r}: grid {h}x{w} of {self.channels} channels, {shares}>"

    @property
    def grid(self) -> tuple[int, int]:
        return self.layout.grid

    @property
    def channels(self) -> int:
        return self.layout.channels

    @property
    def prefix(self) -> int:
        """Tokens before the grid, such as class and register tokens."""
        return self.layout.prefix

    @property
    def usable(self) -> bool:
        """Whether a bottleneck here can say where evidence is: it cuts, and the logits read the grid."""
        return not (self.leak > LEAK_LIMIT or self.reached == 0 or self.effect <= EFFECT_LIMIT)


def default_layer(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> str:
    """Choose the layer for the bottleneck.

    The rule maximises `fineness * depth * effect^4.5 * (1 - leak)` over the layers that are cuts:
    fineness is min(1, h * w / 14^2), since a map cannot show what its grid cannot hold, and beyond 14 cells a side more
    cells help less than more depth; depth is the share of the host that has run, since deep features know classes (in
    the first twentieth, the stem, nothing does: it counts a hundredth there);
    effect is what the grid alone carries (a class token that has read the image takes from it); leak is what flows
    around. A layer whose order of positions could not be measured counts half, and so does one behind which positions
    are only averaged: it leaves the attention nothing deeper to read. Layers from whose grid nothing reaches the
    logits are left out (the last block of a class-token transformer, which reads the class token only). Among
    layers of one grid within 10 % of the best the one highest in the module tree wins: a whole stage rather than the
    norm behind it.

    Args:
        model: the host.
        input_size: (3, H, W); by default what the host's own data config says, else (3, 224, 224).

    Returns:
        The dotted name of the layer.

    Raises:
        ValueError: if no layer qualifies, with the best that was seen; an `input_size` that is no (3, H, W).
    """
    with _assumed_size_told(model, input_size):
        return resolve_site(model, None, _size(model, input_size)).name


def sites(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[Site]:
    """All layers that may carry a bottleneck, in the order in which they run, each measured.

    Args:
        model: the host.
        input_size: (3, H, W); by default what the host's own data config says, else (3, 224, 224).
    """
    size = _size(model, input_size)
    host = unwrap(model)
    names = candidate_layers(host, input_size)
    result: list[Site] = []
    for start in range(0, len(names), GROUP):
        group = names[start : start + GROUP]
        grids = {name: found for name, found in layouts_of(host, group, size).items() if isinstance(found, Layout)}
        result += _measure(host, grids, size, ())
    return result


def candidate_layers(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[str]:
    """Names of the layers that `sites` measures, in the order in which they run; costs one forward pass.

    These are the layers through whose output every path from the input to the logits leads, and those that return
    several tensors, of which only a measurement tells. Of layers that return the same tensor (a stage and its last
    block) the one highest in the module tree stands for all.
    """
    with _assumed_size_told(model, input_size):
        return [c.name for c in _survey(unwrap(model), _size(model, input_size), ()).candidates]


def resolve_site(
    model: nn.Module,
    layer: str | nn.Module | None,
    input_size: tuple[int, int, int],
    args: tuple[Any, ...] = (),
) -> Site:
    """Probe one layer for inputs of one size; known sites are remembered while the host and its weights stay.

    Args:
        model: the host.
        layer: dotted name, module of the host, or None for the default layer.
        input_size: (3, H, W).
        args: further arguments of the host's forward.

    Raises:
        ValueError: no such layer (with the nearest names), or its output holds no grid (with what was seen).
        LayerError: the layer does not run, or runs more than once.
    """
    host = unwrap(model)
    if layer is None:
        return remembered(host, ("default", input_size, _kind(args)), lambda: _best_site(host, input_size, args))
    name = module_name(host, layer if isinstance(layer, nn.Module) else find_module(host, layer))
    runs = _survey(host, input_size, args).runs[name]
    if runs != 1:
        what = "does not run" if runs == 0 else f"runs {runs} times"
        inside = [c.name for c in _survey(host, input_size, args).candidates if c.name.startswith(f"{name}.")]
        such = f", such as {inside[-1]!r}" if inside else ""
        raise LayerError(f"layer {name!r} {what} in one forward pass; name a layer that runs once{such}")
    layout = layouts_of(host, [name], input_size, args)[name]
    if not isinstance(layout, Layout):
        raise ValueError(f"layer {name!r} has no spatial grid: {layout}")
    return _measure(host, {name: layout}, input_size, args)[0]


def deeper_sites(model: nn.Module, site: Site, args: tuple[Any, ...] = ()) -> list[tuple[str, Layout]]:
    """Where the host's later evidence can be read in the same pass: up to three layers behind `site`.

    One layer for each grid size behind the site (its last), and for hosts of one grid size the layer half way and the
    last one. They are read, not cut, so their leak does not matter.
    """
    host = unwrap(model)
    behind = [c.name for c in _survey(host, site.input_size, args).candidates if c.depth > site.depth]
    found = layouts_of(host, behind, site.input_size, args)
    by_size: dict[tuple[int, int], list[tuple[str, Layout]]] = {}
    for name in behind:
        if isinstance(layout := found[name], Layout):
            by_size.setdefault(layout.grid, []).append((name, layout))
    chosen: list[tuple[str, Layout]] = []
    for group in by_size.values():
        if len(by_size) == 1 and len(group) > 2:
            chosen.append(group[len(group) // 2])
        chosen.append(group[-1])
    return chosen[-3:]


@contextlib.contextmanager
def _assumed_size_told(model: nn.Module, given: Any) -> Iterator[None]:
    """An error for a size that was neither given nor configured says how to name another."""
    try:
        yield
    except ValueError as error:
        if given is None and not timm_config(model).get("input_size"):
            told = f"{error}; {input_size_of(model)} is assumed for a model that tells no size, pass input_size="
            raise ValueError(told) from error
        raise


def _size(model: nn.Module, given: Any) -> tuple[int, int, int]:
    if given is None:
        return input_size_of(model)
    size = tuple(given) if isinstance(given, tuple | list) else ()
    if len(size) != 3 or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in size):
        raise ValueError(f"input_size must be (channels, height, width), such as (3, 224, 224), got {given!r}")
    return int(size[0]), int(size[1]), int(size[2])


def _survey(host: nn.Module, size: tuple[int, int, int], args: tuple[Any, ...]) -> Survey:
    return remembered(host, ("survey", size, _kind(args)), lambda: survey(host, size, args))


def _kind(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of further arguments may decide which layers run and how: flags and numbers, and the shapes of tensors."""

    def of(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return (arg.dtype, tuple(arg.shape[1:])) if arg.ndim else (arg.dtype, arg.item())
        return arg if arg is None or isinstance(arg, bool | int | float | str) else type(arg)

    return tuple(of(arg) for arg in args)


def layouts_of(
    model: nn.Module, names: list[str], size: tuple[int, int, int], args: tuple[Any, ...] = ()
) -> dict[str, Layout | str]:
    """Layouts of these layers, or what was seen of one without a grid; one probe for those that are not known yet."""
    host = unwrap(model)
    known: dict[str, Layout | str] = remembered(host, ("layouts", size, _kind(args)), dict)
    if new := [name for name in names if name not in known]:
        known.update(find_layouts(host, new, size, args))
    return {name: known[name] for name in names}


def _fineness(grid: tuple[int, int]) -> float:
    return min(1.0, grid[0] * grid[1] / FINE_ENOUGH)


def _depth_factor(depth: float) -> float:
    """What the depth counts: as it is, and next to nothing in the stem, where nothing tells a class yet."""
    return depth if depth >= STEM_SHARE else STEM * depth


def _best_possible_score(candidate: Candidate) -> float:
    """The score that its shapes and its depth allow at best."""
    return _fineness(candidate.grid) * _depth_factor(candidate.depth)


def _effect_factor(effect: float) -> float:
    """What the effect counts: a power, for what has left the grid is neither shown nor there to be fitted."""
    return min(1.0, effect) ** EFFECT_POWER


def _score_as_perfect_cut(layout: Layout, depth: float) -> float:
    """The score of a perfect cut with this layout."""
    return _fineness(layout.grid) * _depth_factor(depth) * (1.0 if layout.verified == "probe" else SHAPE_ONLY)


def _best_site(host: nn.Module, size: tuple[int, int, int], args: tuple[Any, ...]) -> Site:
    """The default layer.

    Candidates are taken in the order of what they could score at best, until no later one can win.
    """
    waiting = sorted(_survey(host, size, args).candidates, key=lambda c: -_best_possible_score(c))
    scores: dict[str, float] = {}
    layouts: dict[str, Layout] = {}
    passed_over: list[Candidate] = []
    pooled: list[Site] = []
    rejected: list[Site] = []
    while True:
        best = max(scores.values(), default=0.0)
        if waiting and _best_possible_score(waiting[0]) > ALIKE * best:
            # What lies behind the best bet is likely to be read later: its layouts cost nothing in the same probe.
            behind = [c for c in waiting[GROUP:] if c.depth > waiting[0].depth]
            group = waiting[:GROUP] + behind
            waiting = [c for c in waiting[GROUP:] if c not in behind]
            found = layouts_of(host, [c.name for c in group], size, args)
            layouts |= {name: layout for name, layout in found.items() if isinstance(layout, Layout)}
            scores |= _scores(host, [c for c in group if c.name in layouts], layouts, best, size, args)
            passed_over += [c for c in group if c.name not in scores]
            continue
        if best == 0:
            seen = min(rejected, key=lambda s: s.leak, default=None)
            raise ValueError(_no_default(host, size, args, seen))
        name = _leader(scores, layouts)
        (site,) = _measure(host, {name: layouts[name]}, size, args)
        if not site.usable:
            rejected.append(site)
            del scores[name]
            continue
        if not site.pooled or site in pooled:  # one that leads with its lowered score as well is the best there is
            return site
        pooled.append(site)
        if len(pooled) == POOLED_TRIES:
            return pooled[0]
        scores[name] *= POOLED  # others have another chance
        waiting, passed_over = sorted([*waiting, *passed_over], key=lambda c: -_best_possible_score(c)), []


def _leader(scores: dict[str, float], layouts: dict[str, Layout]) -> str:
    """Of the layers with about the best score, and the grid of the best, the one highest in the tree of modules."""
    best = max(scores, key=lambda n: scores[n])
    alike = [n for n, s in scores.items() if s >= ALIKE * scores[best] and layouts[n].grid == layouts[best].grid]
    return min(alike, key=lambda n: (n.count("."), -scores[n]))


def _no_default(host: nn.Module, size: tuple[int, int, int], args: tuple[Any, ...], seen: Site | None) -> str:
    what = f"no layer of this {type(host).__name__} is a cut with a spatial grid for inputs of size {size}"
    if seen is None and not _survey(host, size, args).differentiable:
        return f"{what}: no gradient of the logits reaches the images; does its forward run under no_grad, or detach?"
    if seen is None:
        several = "a model that runs its layers several times, or side by side, can be explained at an nn.Identity() "
        return f"{what}; name a layer, or try larger images; {several}put first in it"
    if math.isnan(seen.leak):
        return f"{what}: its logits are the same for all images, as with a head of zeros; name a layer"
    if answers_differ(host, size, args):
        return f"{what}: {ANSWERS_DIFFER}"
    wanted = f"expected leak <= {LEAK_LIMIT}, effect > {EFFECT_LIMIT} and reached > 0"
    got = f"got {seen.leak:.2f}, {seen.effect:.2f} and {seen.reached:.2f} at {seen.name!r}"
    return f"{what}; {wanted}, {got}; name a layer"


def _scores(
    host: nn.Module,
    group: list[Candidate],
    layouts: dict[str, Layout],
    best: float,
    size: tuple[int, int, int],
    args: tuple[Any, ...],
) -> dict[str, float]:
    """Scores of the candidates that could still win, with no more passes than that takes.

    A cut whose tensor is all grid has effect 1 and leak 0. Tokens beside the grid take from the effect; only with
    several tensors does the leak have to be measured too.
    """
    mixed = [c.name for c in group if layouts[c.name].has_side or not c.cut]
    clean = CleanPass(host, mixed, size, args) if mixed else None
    scores: dict[str, float] = {}
    for candidate in group:
        layout = layouts[candidate.name]
        score = _score_as_perfect_cut(layout, candidate.depth)
        if clean is not None and candidate.name in mixed and score > ALIKE * best:
            effect = clean.effect(candidate.name, layout)
            score *= 0.0 if effect <= EFFECT_LIMIT else _effect_factor(effect)
            if not candidate.cut and score > ALIKE * best:
                leak = clean.leak(candidate.name, layout)
                score *= 0.0 if leak > LEAK_LIMIT else 1 - leak
        if score > ALIKE * best:
            scores[candidate.name] = score
            best = max(best, score)
    return scores


def _measure(
    host: nn.Module, layouts: dict[str, Layout], size: tuple[int, int, int], args: tuple[Any, ...]
) -> list[Site]:
    """Measure layers with their layouts; one clean pass serves all that were not measured before."""
    known: dict[str, Site] = remembered(host, ("sites", size, _kind(args)), dict)
    if new := [name for name in layouts if name not in known]:
        clean, depths = CleanPass(host, new, size, args), _survey(host, size, args).depths
        for name in new:
            known[name] = Site(name, layouts[name], size, depths[name], *clean.figures(name, layouts[name]))
    return [known[name] for name in layouts]
