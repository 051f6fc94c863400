"""Input-modification consistency: if a change of the image leaves the prediction alone, is the map left alone too?

The interpretability check of Lai et al., "Information Bottleneck Approach to Spatial Attention Learning" (IJCAI 2021,
arXiv 2108.03418), as a measure for maps of any host: patches of one colour, and the low or the high spatial frequencies
alone. Theirs is the cosine of the plain maps; any two nearly even maps have a cosine of nearly 1, so here the maps are
centred first, and the changed window is left out. A blurry map and one that ignores the image still score high
(`center_gaussian` gets 1): read it beside the controls and beside a measure of faithfulness.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ib_explain.checks import check_positive_int, did_you_mean
from ib_explain.lending import outside_inference_mode
from ib_explain.metrics.base import Case, register_metric
from ib_explain.metrics.probe import Explain, Probe
from ib_explain.metrics.values import is_constant
from ib_explain.randomness import generator_of, uniform
from ib_explain.targets import Target, resolve_target

__all__ = ["MODIFICATIONS", "THRESHOLDS", "Consistency", "input_modification_consistency", "modified_images"]

MODIFICATIONS = {"patch": 8 / 32, "low_frequency": 4 / 32, "high_frequency": 4 / 32}
"""Each modification with its usual strength, the paper's on images of 32 pixels."""

THRESHOLDS = (0.85, 0.90, 0.95)

_RESIDUE = 1e-5  # of the image's range: what the rounding of a Fourier transform leaves of a channel


@dataclass(frozen=True)
class Consistency:
    """Maps before and after a modification, image by image; batches are joined by joining the tensors.

    Attributes:
        cosine: (D, B) float32 in [-1, 1], cosine of the centred maps outside of the changed window; NaN where the
            prediction changed or a map is constant.
        kept: (D, B) bool, the host predicts what it predicted for the intact image.
        correct: (D, B) float32, 1 where the prediction on the modified image is the label, else 0; NaN without labels.
    """

    cosine: Tensor
    kept: Tensor
    correct: Tensor

    @property
    def number(self) -> int:
        """Images (times draws) that kept their prediction."""
        return int(self.kept.sum())

    @property
    def mean(self) -> float:
        """Mean cosine over those that kept their prediction and have maps that are not constant."""
        return float(self.cosine.nanmean())

    @property
    def shares(self) -> dict[float, float]:
        """Share of those with a cosine of at least 0.85, 0.90 and 0.95: attention-consistent images."""
        defined = self.cosine[~self.cosine.isnan()]
        return {threshold: float((defined >= threshold).float().mean()) for threshold in THRESHOLDS}

    @property
    def accuracy(self) -> float:
        """Accuracy under the modification; NaN without labels."""
        return float(self.correct.mean())


def input_modification_consistency(
    model: nn.Module,
    x: Tensor,
    explain: Explain,
    target: Target = None,
    *,
    modification: str = "patch",
    strength: float | None = None,
    draws: int = 4,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Consistency:
    """Compare the maps of images and of modified images on which the host predicts the same class.

    Args:
        model: the host.
        x: (B, C, H, W), normalised.
        explain: the method, (model, x, target) -> maps; called for the intact and for the kept modified images.
        target: the explained class, before and after; None is the host's top-1 on the intact images, as in the paper.
        modification: "patch", "low_frequency" or "high_frequency", see `modified_images`.
        strength: see `modified_images`; None is the paper's.
        draws: patches (place and colour), the same for all images; frequencies have a single draw.
        labels: (B,) the true classes, for the accuracy under the modification.
        seed: of the patches.
        batch_size: images in one call of `explain` and in one forward pass, see `Probe`.

    Raises:
        ValueError: an unknown modification (with the nearest name), a strength outside of (0, 1).
    """
    probe = Probe(model, x, target, batch_size=batch_size)
    maps = probe.explained(explain)
    return _consistency(probe, maps, explain, modification, strength, draws, labels, seed)


def modified_images(
    x: Tensor, modification: str = "patch", *, strength: float | None = None, draw: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the modified images (B, C, H, W) and where pixels were overwritten, (H, W) bool.

    Args:
        x: (B, C, H, W).
        modification: "patch": a square of one colour, drawn evenly between each channel's smallest and largest value
            in the image. "low_frequency", "high_frequency": only frequencies of fewer, or of no fewer, cycles an image
            than a radius; each channel is then stretched back to the range it had (the authors stretch to 0..255).
        strength: side of the square, or that radius, as a share of the image's shorter side; None is 1/4 or 1/8.
        draw: number of the patch.
        seed: of the patches.
    """
    if modification not in MODIFICATIONS:
        raise ValueError(f"unknown modification {modification!r}{did_you_mean(str(modification), MODIFICATIONS)}")
    share = MODIFICATIONS[modification] if strength is None else strength
    if not 0 < share < 1:
        raise ValueError(f"strength must be a share of the image's side in (0, 1), got {strength}")
    height, width = x.shape[2:]
    if modification == "patch":
        return _patched(x, max(1, round(share * min(height, width))), seed * 1_000_003 + draw)
    untouched = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    return _filtered(x, share * min(height, width), low=modification == "low_frequency"), untouched


@outside_inference_mode()  # methods take gradients of the modified images
def _consistency(
    probe: Probe,
    maps: Tensor | None,
    explain: Explain,
    modification: str,
    strength: float | None,
    draws: int,
    labels: Tensor | None,
    seed: int,
) -> Consistency:
    before = probe.check_maps(maps)
    draws = check_positive_int(draws, "draws") if modification == "patch" else 1
    truth = None if labels is None else resolve_target(labels, probe.logits)
    cosine = before.new_full((draws, len(before)), torch.nan)
    kept = torch.zeros_like(cosine, dtype=torch.bool)
    correct = torch.full_like(cosine, torch.nan)
    for draw in range(draws):
        images, window = modified_images(probe.x, modification, strength=strength, draw=draw, seed=seed)
        # Asked once for all maps; the images are cheaper to make again than to keep.
        key = ("predicted", modification, strength, draw, seed)
        predicted = probe.keep(key, functools.partial(probe.predicted, images))
        kept[draw] = predicted == probe.logits.argmax(dim=1)
        if truth is not None:
            correct[draw] = (predicted == truth).float()
        if same := kept[draw].nonzero()[:, 0].tolist():
            after = probe.explained(explain, x=images[same], target=probe.target[same])
            cosine[draw, same] = _centred_cosine(before[same][:, ~window], after[:, ~window])
    return Consistency(cosine, kept, correct)


def _centred_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of rows (B, N), NaN where one is constant."""
    constant = is_constant(first) | is_constant(second)
    first, second = (v.double() - v.double().mean(dim=1, keepdim=True) for v in (first, second))
    cosine = (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1))
    return cosine.clamp(-1, 1).masked_fill(constant, torch.nan).float()


def _patched(x: Tensor, side: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = generator_of(seed)
    height, width = x.shape[2:]
    top = int(torch.randint(height - side + 1, (), generator=generator, device="cpu"))
    left = int(torch.randint(width - side + 1, (), generator=generator, device="cpu"))
    window = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    window[top : top + side, left : left + side] = True
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    shade = uniform(generator, x.shape[1], 1, 1).to(x)
    return torch.where(window, low + (high - low) * shade, x), window


def _filtered(x: Tensor, radius: float, *, low: bool) -> Tensor:
    height, width = x.shape[2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=x.device)  # cycles an image
    columns = torch.fft.rfftfreq(width, 1 / width, device=x.device)
    within = (rows[:, None] ** 2 + columns**2).sqrt() < radius
    kept = torch.fft.irfft2(torch.fft.rfft2(x.float()) * (within if low else ~within), s=(height, width))
    return _stretched(kept, x).to(x.dtype)


def _stretched(images: Tensor, like: Tensor) -> Tensor:
    """Give each channel the range that it has in `like`; a channel of which nothing is left stays at its mean there."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    floor, ceiling = like.float().amin((2, 3), keepdim=True), like.float().amax((2, 3), keepdim=True)
    even = high - low <= _RESIDUE * (ceiling - floor)
    share = (images - low) / torch.where(even, 1, high - low)
    return torch.where(even, like.float().mean((2, 3), keepdim=True), floor + (ceiling - floor) * share)


def _registered(case: Case, modification: str) -> Tensor:
    settings = {"strength": None, "draws": 4, "labels": None, "seed": case.seed}
    found = case.once(_consistency, explain=case.explain, modification=modification, **settings)
    return found.cosine.nanmean(dim=0)


_NEEDS = ("model", "maps", "explain")


@register_metric("consistency_patch", family="sanity", unit="cosine", higher_is_better=True, needs=_NEEDS)
def _patch_score(case: Case) -> Tensor:
    """Consistency under patches: centred cosine of the maps before and after, where the prediction stays."""
    return _registered(case, "patch")


@register_metric("consistency_low_frequency", family="sanity", unit="cosine", higher_is_better=True, needs=_NEEDS)
def _low_frequency_score(case: Case) -> Tensor:
    """Consistency without high frequencies: centred cosine of the maps, where the prediction stays."""
    return _registered(case, "low_frequency")


@register_metric("consistency_high_frequency", family="sanity", unit="cosine", higher_is_better=True, needs=_NEEDS)
def _high_frequency_score(case: Case) -> Tensor:
    """Consistency without low frequencies: centred cosine of the maps, where the prediction stays."""
    return _registered(case, "high_frequency")
