"""BR-NPA: Gomez et al., Pattern Recognition 2022, arXiv 2106.02566; its maps on a frozen host, without its new head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ib_explain.checks import check_images, check_positive_int, did_you_mean
from ib_explain.lending import frozen
from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import cam_site, grid_features
from ib_explain.modules import host_device

__all__ = ["BRNPA", "Parts", "br_npa_maps", "br_npa_parts", "br_npa_ranked_maps"]

EPS = 1e-5  # added to each norm by the authors
EXHAUSTED = 1e-4  # of the largest norm: what is left is rounding, a further seed would be arbitrary
COMBINE = ("share", "mean", "first")


@register_method("br_npa")
@dataclass(frozen=True)
class BRNPA:
    """BR-NPA: positions grouped by similarity to the strongest ones, the same for every class (Gomez et al. 2022).

    Non-negative, in units of the features' norm. The paper trains a new head on these groups; here the host stays
    frozen, so the maps tell what its features group into, not the decision. At most one forward pass; the default
    layer is `cam_layer`. `am` is its control.

    Attributes:
        maps: number of ranked maps N.
        combine: how they become one: "share" weighs each by its seed's share of the remaining activity, "mean" takes
            the mean of the maps divided by their maxima, "first" the first map alone, as the authors' own evaluation.
    """

    unit: ClassVar[str] = "weighted feature norm"
    maps: int = 3
    combine: str = "share"

    def __post_init__(self) -> None:
        check_positive_int(self.maps, "maps")
        if self.combine not in COMBINE:
            raise ValueError(f"unknown combine {self.combine!r}{did_you_mean(str(self.combine), COMBINE)}")

    def __call__(self, call: Call) -> Tensor:
        parts = br_npa_parts(grid_features(call, cam_site(call)), self.maps)
        saliency = parts.attention * parts.norms  # (B, N, h, w)
        if self.combine == "first":
            heat = saliency[:, :1]
        elif self.combine == "mean":
            peak = saliency.amax(dim=(2, 3), keepdim=True)
            heat = torch.where(peak > 0, saliency / peak.where(peak > 0, 1), 0).mean(dim=1, keepdim=True)
        else:
            total = parts.residuals.sum(dim=1, keepdim=True)
            shares = parts.residuals / total.where(total > 0, 1)
            heat = (shares[:, :, None, None] * saliency).sum(dim=1, keepdim=True)
        return resize(heat, call.size)


@dataclass(frozen=True)
class Parts:
    """The ranked groups of an image's positions.

    Attributes:
        attention: alpha, similarity to each seed divided by its sum, (B, N, h, w); zero maps where nothing was left.
        norms: activity of each position, (B, 1, h, w); zero where all features are.
        residuals: activity that was left at each seed when it was chosen, (B, N), not increasing.
        seeds: index of each seed among the h*w positions, (B, N).
    """

    attention: Tensor
    norms: Tensor
    residuals: Tensor
    seeds: Tensor


def br_npa_ranked_maps(model: nn.Module, x: Tensor, *, layer: str | nn.Module | None = None, maps: int = 3) -> Tensor:
    """All N ranked maps of images, strongest group first; `attribute(method="br_npa")` joins them into one.

    Args:
        model: the host, handed back as it came.
        x: images (B, 3, H, W).
        layer: where to look; None for `cam_layer`.
        maps: N.

    Returns:
        (B, N, H, W) float32, non-negative; zero maps where nothing was left to group.
    """
    check_images(x, device=host_device(model))
    with frozen(model) as host, torch.no_grad():
        call = Call(host, x, None, layer, seed=0, batch_size=None)
        return resize(br_npa_maps(grid_features(call, cam_site(call)), maps), call.size)


def br_npa_maps(features: Tensor, maps: int = 3) -> Tensor:
    """The N ranked maps of features (B, C, h, w), as (B, N, h, w), non-negative and finite.

    Each is multiplied by the norm of the features, which decides what a position contributes; see `br_npa_parts`.

    Args:
        features: of any layer.
        maps: N.
    """
    parts = br_npa_parts(features, maps)
    return parts.attention * parts.norms


def br_npa_parts(features: Tensor, maps: int = 3) -> Parts:
    """Group positions around seeds, the strongest first (section 3 of the paper).

    Activity n_p = |f_p| + 1e-5 of the image's largest value, so that scaled features give the same groups. N times: the
    seed is the position with the most activity left (the first of equals); s_p is the cosine to it, alpha = s / sum(s),
    and the activity left is multiplied by 1 - s. Negative cosines count as 0, which changes nothing behind a ReLU:
    elsewhere opposite features would be promoted. Where less than 1e-4 of the largest norm is left, the map is zero.
    """
    check_positive_int(maps, "maps")
    batch, _, h, w = features.shape
    rows = features.float().flatten(2)  # (B, C, P)
    largest = rows.abs().amax(dim=(1, 2))[:, None]  # (B, 1)
    rows = rows / largest.where(largest > 0, 1)[:, None]
    plain = rows.norm(dim=1)
    norms = torch.where(largest > 0, plain + EPS, 0)
    divisor = plain + EPS
    left, least = norms, EXHAUSTED * norms.amax(dim=1)
    attention, residuals, seeds = [], [], []
    for _ in range(maps):
        residual, seed = left.amax(dim=1), left.argmax(dim=1)  # the first of equals
        which = seed[:, None, None].expand(-1, rows.shape[1], 1)
        cosine = (rows * rows.gather(2, which)).sum(dim=1) / (divisor * divisor.gather(1, seed[:, None]))
        cosine = cosine.clamp_min(0)
        alive = (residual > 0) & (residual >= least)
        total = cosine.sum(dim=1, keepdim=True)
        attention.append(torch.where(alive[:, None], cosine / total.where(total > 0, 1), 0))
        residuals.append(torch.where(alive, residual, 0))
        seeds.append(seed)
        left = left * (1 - cosine).clamp_min(0)
    return Parts(
        attention=torch.stack(attention, dim=1).reshape(batch, maps, h, w),
        norms=(norms * largest).reshape(batch, 1, h, w),
        residuals=torch.stack(residuals, dim=1) * largest,
        seeds=torch.stack(seeds, dim=1),
    )
