"""Infidelity and maximum sensitivity as Captum has them, on batches, seeded, with one number per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ib_explain.checks import check_maps, check_number, check_positive_int
from ib_explain.lending import frozen
from ib_explain.metrics.base import Case, register_metric
from ib_explain.metrics.probe import Explain, Probe, check_explain
from ib_explain.randomness import generator_of, uniform
from ib_explain.targets import Target

__all__ = ["infidelity", "max_sensitivity"]


def infidelity(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    samples: int = 50,
    normalize: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Squared error of the map as a prediction of what hiding a square costs the target's logit. Lower is better.

    Yeh et al. 2019 (arXiv 1901.09392, definition 2.1), as Captum computes it, with squares set to 0: of side 1 to 10/28
    of the image's shorter side (their range on 28 x 28 digits), anywhere. The map's sum over the square stands against
    the fall of the logit. One difference: Captum's best factor may be negative, and a map then scores as its negative
    does; here it is at least 0, so a map that points the wrong way is no better than one of zeros.

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        maps: (B, 1, H, W) or (B, H, W).
        target: the explained classes; None is the host's top-1 on the intact images.
        samples: squares, the same for all images.
        normalize: scale each map by the factor >= 0 that predicts best, as maps have no common unit.
        seed: of the squares.
        batch_size: images in one forward pass, see `Probe`.

    Returns:
        (B,) float32, >= 0, in squared logits. A map of zeros predicts nothing and gets the mean squared fall itself.
    """
    return _infidelity(Probe(model, x, target, batch_size=batch_size), maps, samples, normalize, seed)


def max_sensitivity(
    model: nn.Module,
    x: Tensor,
    explain: Explain,
    target: Target = None,
    *,
    samples: int = 10,
    radius: float = 0.02,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Largest relative change of the map when the image changes a little. Lower is better.

    Yeh et al. 2019 (arXiv 1901.09392, definition 4.1), computed by Captum: the largest Euclidean norm of the map's
    change over images drawn from a box around x, by the norm of the map itself. The class stays that of the intact
    image. A method that draws at random must fix its seed, or its own noise is measured too.

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        explain: the method, (model, x, target (b,)) -> maps (b, 1, H, W) or (b, H, W). Called 1 + samples times an
            image.
        target: the explained classes; None is the host's top-1 on the intact images.
        samples: perturbed copies of an image, with the same noise for all images.
        radius: half the side of the box, in normalised units.
        seed: of the noise.
        batch_size: images in one call of `explain`, see `Probe`.

    Returns:
        (B,) float32, >= 0; NaN where the map of the intact image is all zero.
    """
    return _max_sensitivity(Probe(model, x, target, batch_size=batch_size), None, explain, samples, radius, seed)


def _infidelity(probe: Probe, maps: Tensor | None, samples: int, normalize: bool, seed: int) -> Tensor:
    maps = probe.check_maps(maps)
    samples = check_positive_int(samples, "samples")
    squares = _squares(samples, maps.shape[1], maps.shape[2], seed).to(maps.device)  # (S, 1, H, W)
    # The squares are the same for every map, so the host is asked once.
    falls = probe.keep((_infidelity, samples, seed), lambda: _falls(probe, squares))  # (B, S)
    if normalize:  # what is scaled anyway is brought to where nothing overflows or underflows
        largest = maps.abs().amax(dim=(1, 2), keepdim=True)
        maps = maps / torch.where(largest > 0, largest, 1)
    told = maps.double().flatten(1) @ squares.double().flatten(1).T  # (B, S)
    if normalize:
        power = told.square().sum(dim=1, keepdim=True)
        told = told * ((told * falls).sum(dim=1, keepdim=True) / power.clamp_min(1e-300)).clamp_min(0)
    return (told - falls).square().mean(dim=1).float()


def _falls(probe: Probe, squares: Tensor) -> Tensor:
    """What hiding each square costs the target's logit, (B, S) float64."""
    kept = 1 - squares
    hidden = probe.scores(len(squares), lambda image, square: probe.x[image] * kept[square].to(probe.x), "logit")
    return probe.intact("logit").double()[:, None] - hidden.double()


def _max_sensitivity(
    probe: Probe, _maps: Tensor | None, explain: Explain, samples: int, radius: float, seed: int
) -> Tensor:
    from captum.metrics import sensitivity_max

    check_explain(explain)
    samples = check_positive_int(samples, "samples")
    check_number(radius, "radius (in normalised units)", above=0)
    noise = uniform(generator_of(seed), samples, *probe.x.shape[1:])
    noise = radius * (2 * noise - 1)
    size, scores = probe.batch_size, []
    with frozen(probe.model) as host:
        # Captum needs all images of a call in one pass: no more of them than the batch size.
        for images, target in zip(probe.x.split(size), probe.target.split(size), strict=True):
            explained = _Explained(explain, host)
            score = sensitivity_max(
                explained,
                images,
                _Draws(noise, len(images)).shake,
                n_perturb_samples=samples,
                max_examples_per_batch=min(size, len(images) * samples),
                target=target,
            )
            scores.append(score.float().masked_fill(explained.empty, torch.nan))
    return torch.cat(scores)


class _Explained:
    """The method as Captum calls it, first with the intact images."""

    def __init__(self, explain: Explain, host: nn.Module) -> None:
        self.explain, self.host = explain, host
        self.called = False
        self.empty = torch.empty(0, dtype=torch.bool)
        """(b,) whether the map of an intact image is all zero: Captum divides by 1 then."""

    def __call__(self, copies: Tensor | tuple[Tensor], target: Tensor) -> tuple[Tensor, ...]:
        inputs = copies[0] if isinstance(copies, tuple) else copies  # a tuple in the first call
        with torch.enable_grad():  # which Captum has switched off
            found = self.explain(self.host, inputs, target.expand(len(inputs)))
        found = check_maps(found, batch=len(inputs)).double().contiguous()  # small norms underflow in float32
        if not self.called:
            self.called, self.empty = True, found.flatten(1).norm(dim=1) == 0
        return (found,)


class _Draws:
    """The same perturbations for all images, in the order in which Captum asks: image 0 n times, image 1, ..."""

    def __init__(self, draws: Tensor, images: int) -> None:
        self.draws, self.images, self.taken = draws, images, 0

    def shake(self, copies: Tensor) -> Tensor:
        """The copies plus the draws."""
        count = len(copies) // self.images
        draws = self.draws[self.taken : self.taken + count]
        self.taken += count
        return copies + draws.to(copies).repeat(self.images, 1, 1, 1)


def _squares(samples: int, height: int, width: int, seed: int) -> Tensor:
    """Random squares as masks (samples, 1, H, W) of 0 and 1."""
    side, top, left = uniform(generator_of(seed), 3, samples, 1)
    largest = max(1, round(10 / 28 * min(height, width)))
    side = 1 + (side * largest).long().clamp_max(largest - 1)
    top, left = (top * (height - side + 1)).long(), (left * (width - side + 1)).long()
    rows, columns = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[:, None]
    return inside[:, None].float()


@register_metric("infidelity", family="perturbation", unit="squared logit", higher_is_better=False)
def _infidelity_score(case: Case) -> Tensor:
    """Infidelity: squared error of the best-scaled map as a prediction of the logit lost by hiding random squares."""
    return case.once(_infidelity, samples=50, normalize=True, seed=case.seed)


@register_metric(
    "max_sensitivity", family="robustness", unit="relative change", higher_is_better=False, needs=("model", "explain")
)
def _max_sensitivity_score(case: Case) -> Tensor:
    """Maximum sensitivity: largest relative change of the map when the image changes by at most 0.02."""
    return case.once(_max_sensitivity, explain=case.explain, samples=10, radius=0.02, seed=case.seed)
