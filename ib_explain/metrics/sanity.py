"""Sanity: does the map depend on what it claims to explain, the host's weights, its labels, the class, and on no seed?

These checks can reject a method, they cannot approve one: an uninformative map that changes with the weights passes the
randomisation tests, and rank correlations of maps with large even regions are mostly those regions' noise. Read every
figure beside those of the controls (`random`, `edges`, `center_gaussian`).

`explain` is the method, (model, x, target (b,)) -> maps (b, 1, H, W) or (b, H, W). It must explain the model that it is
given: one that is bound to another host, as a fitted bottleneck is, has to be fitted again inside of it, or its maps
cannot follow the weights. A method that chooses its layer by the host's weights should be given the layer. Hosts are
lent in eval mode without parameter gradients and handed back as they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from ib_explain.metrics.base import Case, register_metric
from ib_explain.metrics.localisation import energy_inside
from ib_explain.metrics.probe import Explain, Probe
from ib_explain.metrics.random_weights import randomisable_layers, randomise, randomised_twin, twin_of
from ib_explain.metrics.similarity import rank_correlation, ssim
from ib_explain.modules import find_module
from ib_explain.targets import Target, resolve_target

__all__ = ["Randomisation", "TargetSensitivity", "cascading_randomisation", "label_randomisation"]
__all__ += ["seed_correlation", "target_sensitivity"]


@dataclass(frozen=True)
class Randomisation:
    """Similarity of the host's maps with those of the host whose layers up to this one were randomised.

    Attributes:
        layers: L names, in the order in which they were randomised; "" stands for parameters that the host itself
            holds.
        rank_correlation: (L, B) float32 in [-1, 1], Spearman; NaN where a map is constant or not finite.
        ssim: (L, B) float32 in [-1, 1]; NaN likewise.
    """

    layers: tuple[str, ...]
    rank_correlation: Tensor
    ssim: Tensor


@dataclass(frozen=True)
class TargetSensitivity:
    """How maps differ between two classes.

    Attributes:
        change: (B,) float32 in [0, 2]: 1 - rank correlation of the two maps, 0 if the class changes nothing. NaN where
            one is constant.
        towards: (B,) float32 in [-1, 1]: by how much the share of the positive energy on an object grows when the map
            is asked for that object's class instead of the other's, mean of both objects. None without masks; NaN where
            a mask is empty or a map has no positive value.
    """

    change: Tensor
    towards: Tensor | None


def cascading_randomisation(
    model: nn.Module,
    x: Tensor,
    explain: Explain,
    target: Target = None,
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Randomisation:
    """Randomise layer after layer, from the output to the input, and compare each time with the host's own maps.

    The cascading model parameter randomisation test of Adebayo et al. 2018 (arXiv 1810.03292, sec. 3.1). Similarity
    should fall: a map that stays says nothing about what the host has learned. The explained class stays that of the
    intact host. All happens on a deep copy, the host itself is not touched.

    A module without children is initialised again by its own `reset_parameters`, batch norms with their running
    statistics too; parameters held elsewhere (a class token, a position embedding, attention's joint projection) are
    shuffled, which keeps their mean and deviation. The draws depend on the seed and the module's place in the host
    alone, not on the device nor on the layers chosen.

    Args:
        model: the host.
        x: (B, C, H, W), normalised, at least 11 pixels a side.
        explain: the method, called 1 + L times an image.
        target: the explained classes; None is the host's top-1 on the intact images.
        layers: dotted names in the order of randomisation, a container stands for all that is inside; None is
            `randomisable_layers`.
        seed: of the new weights.
        batch_size: images in one call of `explain`, see `Probe`.

    Raises:
        TypeError: a single name in place of a list.
        ValueError: no layers, or one that the host does not have, or without parameters.
    """
    if isinstance(layers, str):
        raise TypeError(f"layers must be a list of names, got the string {layers!r}; write [{layers!r}]")
    probe = Probe(model, x, target, batch_size=batch_size)
    names = randomisable_layers(model, probe.x) if layers is None else list(layers)
    if not names:
        raise ValueError("layers must name at least one layer with parameters, got none")
    twin = twin_of(model)
    for name in names:
        if next((find_module(twin, name) if name else twin).parameters(recurse=bool(name)), None) is None:
            raise ValueError(f"layer {name!r} has no parameters to randomise")
    intact = probe.explained(explain)
    ranks, structures = [], []
    for name in names:
        randomise(twin, [name], seed)
        maps = probe.explained(explain, model=twin, finite=False)
        ranks.append(rank_correlation(intact, maps))
        structures.append(ssim(intact, maps))
    return Randomisation(tuple(names), torch.stack(ranks), torch.stack(structures))


def label_randomisation(
    model: nn.Module,
    other: nn.Module,
    x: Tensor,
    explain: Explain,
    target: Target = None,
    *,
    batch_size: int | None = None,
) -> Randomisation:
    """Compare the host's maps with those of a host of the same kind that was trained on random labels.

    The data randomisation test of Adebayo et al. 2018 (arXiv 1810.03292, sec. 4). The second host is the user's to
    train; one whose head alone was drawn anew is a weaker stand-in. Both are asked for the same class.

    Args:
        model: the host.
        other: the host with random labels, on the same device.
        x, explain, target, batch_size: as for `cascading_randomisation`; target None is the top-1 of `model`.

    Returns:
        Randomisation of a single row, whose layer is called "labels".
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    intact = probe.explained(explain)
    maps = probe.explained(explain, model=other, finite=False)
    return Randomisation(("labels",), rank_correlation(intact, maps)[None], ssim(intact, maps)[None])


def target_sensitivity(
    model: nn.Module,
    x: Tensor,
    explain: Explain,
    target: Target = None,
    *,
    other: Target = None,
    masks: Tensor | None = None,
    batch_size: int | None = None,
) -> TargetSensitivity:
    """Does the map change with the class, and does it move to that class's object? Higher is better.

    The change is 1 - Spearman's rank correlation of the two maps. Where the picture shows an object of each class, the
    change can be judged: with e(c, k) the share of the positive energy of the map for class c on object k
    (`energy_inside`), `towards` is the mean of e(0, 0) - e(1, 0) and e(1, 1) - e(0, 1). The first is a plain
    class-sensitivity check, the second the energy form of the pointing game on two-object images (cf. Zhang et al.
    2018, arXiv 1608.00507, and the grid pointing game of Boehle et al. 2021, arXiv 2104.00032).

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        explain: the method, called twice an image.
        target: the first class; None is the host's top-1.
        other: the second class; None is the best scored one beside the first.
        masks: (B, 2, H, W) bool, the objects of the first and of the second class.
        batch_size: images in one call of `explain`, see `Probe`.

    Raises:
        ValueError: the two classes of an image are the same one, a host with a single class, masks of another shape.
        TypeError: masks are not bool.
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    maps = probe.explained(explain)
    return _target_sensitivity(probe, maps, explain, other, masks)


def seed_correlation(
    model: nn.Module,
    x: Tensor,
    explains: Sequence[Explain],
    target: Target = None,
    *,
    batch_size: int | None = None,
) -> Tensor:
    """Rank correlation between the maps of one method under several seeds, mean over all pairs. Higher is better.

    1 for a deterministic method. A map whose order of pixels is the seed's doing should not be read pixel by pixel.

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        explains: the method once for each seed, at least two; `functools.partial` binds a seed.
        target: the explained classes; None is the host's top-1.
        batch_size: images in one call of a method, see `Probe`.

    Returns:
        (B,) float32 in [-1, 1]; NaN where a map is constant.
    """
    if callable(explains) or len(explains) < 2:
        came = type(explains).__name__ if callable(explains) else f"{len(explains)} of them"
        raise ValueError(f"explains must be a sequence of two or more callables, one for each seed, got {came}")
    probe = Probe(model, x, target, batch_size=batch_size)
    maps = [probe.explained(explain) for explain in explains]
    return torch.stack([rank_correlation(first, second) for first, second in combinations(maps, 2)]).mean(0)


def _target_sensitivity(
    probe: Probe, maps: Tensor | None, explain: Explain, other: Target = None, masks: Tensor | None = None
) -> TargetSensitivity:
    first = probe.check_maps(maps)
    if masks is not None:
        _check_pairs(masks, probe.x)
    classes = _other_classes(probe, other)
    second = probe.explained(explain, target=classes)
    change = 1 - rank_correlation(first, second)
    if masks is None:
        return TargetSensitivity(change, None)
    gains = [
        energy_inside(asked, masks[:, k]) - energy_inside(unasked, masks[:, k])
        for k, (asked, unasked) in enumerate(((first, second), (second, first)))
    ]
    return TargetSensitivity(change, (gains[0] + gains[1]) / 2)


def _other_classes(probe: Probe, other: Target) -> Tensor:
    if probe.logits.shape[1] < 2:
        raise ValueError("target sensitivity needs a model of two or more classes, got 1")
    if other is None:
        return probe.logits.scatter(1, probe.target[:, None], -torch.inf).argmax(dim=1)
    classes = resolve_target(other, probe.logits)
    if same := int((classes == probe.target).sum()):
        raise ValueError(f"other must differ from target in every image, got the same class in {same}")
    return classes


def _check_pairs(masks: Tensor, x: Tensor) -> None:
    expected = (len(x), 2, *x.shape[2:])
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        came = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a bool tensor of shape {expected}, got {came}")
    if tuple(masks.shape) != expected:
        raise ValueError(f"masks must have shape {expected}, one for each of the two classes, got {tuple(masks.shape)}")


def _model_randomisation(probe: Probe, maps: Tensor | None, explain: Explain, twin: nn.Module) -> Tensor:
    intact = probe.check_maps(maps)
    return rank_correlation(intact, probe.explained(explain, model=twin, finite=False))


@register_metric(
    "model_randomisation",
    family="sanity",
    unit="rank correlation",
    higher_is_better=False,
    needs=("model", "maps", "explain"),
)
def _model_randomisation_score(case: Case) -> Tensor:
    """Model randomisation: rank correlation with the map of the host with all weights drawn anew; 0 is unrelated."""
    # Signed: the absolute value of two unrelated maps grows with their coarseness, 0.01 at 64 pixels, 0.2 on a 4 x 4
    # grid, and would favour methods with fine maps. The mean of the signed one is 0 for all of them.
    # One for all methods and batches: what is found out about it, such as its layers, is found once.
    twin = case.keep(("randomised", case.seed), lambda: randomised_twin(case.probe.model, case.seed))
    return case.once(_model_randomisation, explain=case.explain, twin=twin)


@register_metric(
    "target_sensitivity",
    family="sanity",
    unit="1 - rank correlation",
    higher_is_better=True,
    needs=("model", "maps", "explain"),
)
def _target_sensitivity_score(case: Case) -> Tensor:
    """Target sensitivity: how much the order of the map's pixels changes when the runner-up class is explained."""
    return case.once(_target_sensitivity, explain=case.explain).change
