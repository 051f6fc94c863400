"""What a metric is given (`Case`), what a curve is (`Curve`), and where metrics are filed (`METRICS`).

To add one: a function from a `Case` to scores (B,), NaN where undefined, under `register_metric`; a plain function of
tensors, by `register_function`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from ib_explain.checks import did_you_mean
from ib_explain.metrics.probe import Explain, Probe
from ib_explain.registry import Registry
from ib_explain.targets import Target

__all__ = ["FAMILIES", "METRICS", "NEEDS", "Case", "Curve", "Metric", "register_function", "register_metric"]

FAMILIES = ("perturbation", "localisation", "human", "sanity", "robustness", "complexity", "cost")
NEEDS = ("model", "x", "maps", "explain", "masks", "density", "fixations", "other", "baseline")
"""Fields of a `Case` that may be None; a metric names those that it reads."""


@dataclass(frozen=True)
class Curve:
    """What is measured while an image is taken apart or put together: mostly the host's score of the target class.

    Attributes:
        fractions: (S+1,) float32 in [0, 1]: share of the pixels (or tiles) that were replaced or, for insertion, put
            back.
        scores: (B, S+1) float32, at the fractions: with both end points but for ROAD (only 0) and `sensitivity_n`
            (neither, and correlations).
        auc: (B,) float32: one number an image; the function that made the curve says by which rule.
        tied: (B,) float32 in [0, 1]: share of pixels (or tiles) whose value another has too, so that their order is
            arbitrary (by pixel index).
    """

    fractions: Tensor
    scores: Tensor
    auc: Tensor
    tied: Tensor


@dataclass(frozen=True)
class Case:
    """A batch of images with their maps: all that any metric may ask for.

    What several metrics share (the host's scores of the intact and of the fully replaced images, whole curves) is
    computed once per case.

    Attributes:
        model: the host; None where only metrics without it are asked.
        x: (B, C, H, W) normalised images.
        maps: (B, 1, H, W) or (B, H, W).
        target: the explained classes; None is the host's top-1.
        explain: the method itself, (model, x, target) -> maps, for metrics that explain perturbed images.
        masks: (B, 1, H, W) bool, where the object is.
        density: (B, 1, H, W), a human fixation density.
        fixations: B tensors (n_i, 2), human fixation points as (x, y) in pixels.
        other: B tensors (n_i, 2), fixations on other images, for shuffled measures.
        baseline: (B, 1, H, W) or (1, 1, H, W), the density (a centre bias) that information gain is held against.
        seed: of what a metric draws at random.
        batch_size: images in one forward pass, see `Probe`.
        kept: what the batches of a run share, see `keep`.
    """

    model: nn.Module | None = None
    x: Tensor | None = None
    maps: Tensor | None = None
    target: Target = None
    explain: Explain | None = None
    masks: Tensor | None = None
    density: Tensor | None = None
    fixations: Sequence[Tensor] | None = None
    other: Sequence[Tensor] | None = None
    baseline: Tensor | None = None
    seed: int = 0
    batch_size: int | None = None
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.model is None) != (self.x is None):
            raise ValueError("give model and x together, or neither")

    def has(self, need: str) -> bool:
        """Whether this case holds what a metric's `needs` names."""
        return getattr(self, need) is not None

    @functools.cached_property
    def probe(self) -> Probe:
        """The host with these images and targets, asked once about what several metrics share."""
        if self.model is None or self.x is None:
            raise ValueError("this metric needs the model and its images, and the case holds none")
        return Probe(self.model, self.x, self.target, batch_size=self.batch_size)

    def with_maps(self, maps: Tensor, explain: Explain) -> Case:
        """The same images and classes under another method; what no map enters is not computed again."""
        case = replace(self, maps=maps, target=self.probe.target, explain=explain)
        vars(case)["probe"] = self.probe
        return case

    def spared(self) -> Case:
        """The same with tensors of its own, for code that may write into them."""
        names = ("x", "maps", "masks", "density", "baseline")
        own: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else t.clone() for name in names}
        if self.fixations is not None:
            own["fixations"] = [points.clone() for points in self.fixations]
        case = replace(self, **own)
        vars(case)["probe"] = self.probe
        return case

    def once(self, function: Callable[..., Any], **settings: Any) -> Any:
        """Return `function(probe, maps, **settings)`, computed the first time only."""
        key = (function, *sorted(settings.items()))
        if key not in self._memo:
            self._memo[key] = function(self.probe, self.maps, **settings)
        return self._memo[key]

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave when a case of this run first asked for it; for what no image and no map enters."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


@dataclass(frozen=True)
class Metric:
    """One row of the registry: called with a `Case`, it returns scores (B,) float32, NaN where undefined.

    Attributes:
        name: in the registry and in tables.
        family: one of `FAMILIES`; a benchmark ranks all of them, `summary.COUNTED` count in the mean rank.
        unit: of a score.
        higher_is_better: direction.
        needs: the fields of `Case` it reads, of `NEEDS`.
        score: the function itself.
        derived: another metric's score by another scale, which does not count in the mean rank a second time.
    """

    name: str
    family: str
    unit: str
    higher_is_better: bool
    needs: tuple[str, ...]
    score: Callable[[Case], Tensor]
    derived: bool = False

    def __post_init__(self) -> None:
        # The registry lists entries by their docstring: the function's, not this class's.
        object.__setattr__(self, "__doc__", self.score.__doc__)

    def __call__(self, case: Case) -> Tensor:
        missing = [need for need in self.needs if not case.has(need)]
        if missing:
            raise ValueError(f"metric {self.name!r} needs {', '.join(self.needs)}; the case lacks {', '.join(missing)}")
        return self.score(case)


METRICS: Registry[Metric] = Registry("metric", rank=lambda metric: FAMILIES.index(metric.family))


def register_metric(
    name: str,
    *,
    family: str,
    unit: str,
    higher_is_better: bool,
    needs: tuple[str, ...] = ("model", "maps"),
    derived: bool = False,
) -> Callable[[Callable[[Case], Tensor]], Callable[[Case], Tensor]]:
    """Decorator that files a function from a `Case` to scores (B,) under `name`; its first doc line is the summary.

    Args:
        name: under which `benchmark` finds it.
        family: of `FAMILIES`; decides whether it counts in the mean rank (`ib_explain.summary.COUNTED`).
        unit: of a score.
        higher_is_better: direction.
        needs: fields of `Case` that it reads, of `NEEDS`; target, seed and batch_size are always there.
        derived: it is another metric's score by another scale and does not count a second time.

    Raises:
        ValueError: a second owner of the name, an unknown family, or a need that is not in `NEEDS`.
        TypeError: no name, needs that are one string, or what is no function.
    """
    METRICS.check_name(name)
    if isinstance(needs, str):
        raise TypeError(f"metric {name!r} takes needs as a tuple of names, got the string {needs!r}")
    if family not in FAMILIES:
        raise ValueError(f"metric {name!r} has the unknown family {family!r}{did_you_mean(family, FAMILIES)}")
    unknown = [need for need in needs if need not in NEEDS]
    if unknown:
        there = {field.name for field in fields(Case)} - {*NEEDS}
        told = "which is always there and is not named" if unknown[0] in there else "which a Case has not"
        raise ValueError(f"metric {name!r} needs {unknown[0]!r}, {told}; known: {', '.join(NEEDS)}")

    def file(score: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
        if not callable(score):
            raise TypeError(f"metric {name!r} must be a function of a Case, got {score!r}")
        METRICS.register(name, origin=score)(Metric(name, family, unit, higher_is_better, needs, score, derived))
        return score

    return file


def register_function(
    function: Callable[..., Tensor],
    *,
    family: str,
    unit: str,
    needs: tuple[str, ...],
    higher_is_better: bool = True,
    suffix: str = "",
    derived: bool = False,
) -> None:
    """File a plain function of tensors under its own name; its first doc line is the summary.

    Args:
        function: called with the fields `needs` of the case, in that order, returns scores (B,).
        family: as in `register_metric`.
        unit: of the scores.
        needs: fields of `Case`.
        higher_is_better: direction.
        suffix: put behind the function's name.
        derived: as in `register_metric`.
    """

    @functools.wraps(function)
    def score(case: Case) -> Tensor:
        return function(*(getattr(case, need) for need in needs))

    name = function.__name__ + suffix
    file = register_metric(
        name, family=family, unit=unit, higher_is_better=higher_is_better, needs=needs, derived=derived
    )
    file(score)
