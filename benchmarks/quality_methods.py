"""What `quality.py` compares: the methods with their layers, the controls of our maps, and the measures' settings.

The measures are the package's own, some with fewer steps, under names that tell them: 500 images and 20 methods are to
fit a few hours of one processor core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain import IBAttention
from ib_explain.maps import resize, spread
from ib_explain.methods import METHODS
from ib_explain.methods.base import Call
from ib_explain.methods.cam import cam_layer
from ib_explain.methods.controls import Random
from ib_explain.methods.grad_cam import GradCAM
from ib_explain.metrics import Case, count_passes, degradation_area, register_metric, road_combined
from ib_explain.perturb import gaussian_blur
from ib_explain.sites import input_size_of, resolve_site, sites

TILE, TILE_STEPS = 8, 10
ROAD_SHARES = (0.2, 0.5, 0.8)
SEVEN = (
    "insertion",
    "deletion",
    "degradation_10_steps",
    "road_3_shares",
    "energy_inside",
    "pointing_game",
    "effective_heat_ratio",
)
METRICS = (*SEVEN, "lattice", "passes")
REFINE = 10
RISE_MASKS = 4000
RISE = f"rise {RISE_MASKS}"
HOST_FREE = ("center_gaussian", "edges", "random")
COUNTS = {"own": 9, "baselines": 13, "core": 21, "all": 40}  # methods of a run with one seed; each further seed has two
ENOUGH_REACHED = 0.5  # share of a layer's grid that the logits must read for a class activation map


# Measures -------------------------------------------------------------------------------------------------------------


@register_metric("degradation_10_steps", family="perturbation", unit="normalised probability", higher_is_better=True)
def degradation_10_steps(case: Case) -> Tensor:
    """`degradation_8` in 10 steps instead of up to 100: area between the LeRF and MoRF curves on 8-pixel tiles."""
    probe = case.probe
    settings = {"tile": TILE, "steps": TILE_STEPS, "seed": case.seed, "batch_size": case.batch_size}
    return degradation_area(probe.model, probe.x, case.maps, probe.target, **settings)


@register_metric("road_3_shares", family="perturbation", unit="probability", higher_is_better=True)
def road_3_shares(case: Case) -> Tensor:
    """`road` at 20, 50 and 80 % instead of nine shares: half the gap between imputing LeRF and MoRF first."""
    probe = case.probe
    settings = {"fractions": ROAD_SHARES, "seed": case.seed, "batch_size": case.batch_size}
    return road_combined(probe.model, probe.x, case.maps, probe.target, **settings)


@register_metric("lattice", family="complexity", unit="share of energy", higher_is_better=False)
def lattice(case: Case) -> Tensor:
    """Energy of the map at the Nyquist frequencies of the default layer's grid, as a share of all but the mean's."""
    x = case.probe.x
    size = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    return nyquist_share(on_grid(case.maps, resolve_site(case.probe.model, None, size).grid))


@register_metric(
    "passes", family="cost", unit="forward and backward passes", higher_is_better=False, needs=("model", "explain")
)
def passes(case: Case) -> Tensor:
    """Forward plus backward passes for a map, counted by their arithmetic; a backward pass takes about a forward's."""
    probe, few = case.probe, slice(2)  # arithmetic is the same for every image, so two are enough
    spent = sum(count_passes(probe.model, probe.x[few], case.explain, probe.target[few]))
    return torch.full((len(probe.x),), spent)


def on_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo the bilinear resize from a grid: (B, 1, H, W) -> (B, h, w), least squares where a map came otherwise.

    Averaging over cells would halve just the highest frequencies.
    """
    along, across = (
        torch.linalg.pinv(resize(torch.eye(n)[None, None], (side, n))[0, 0].to(maps))
        for n, side in zip(grid, maps.shape[-2:], strict=True)
    )
    return along @ maps.flatten(0, -3) @ across.mT


def nyquist_share(values: Tensor) -> Tensor:
    """Share of (B, h, w) values' energy where either frequency is the highest, the mean aside: (B,), NaN if constant.

    White noise has (h + w - 1) / (h w - 1).
    """
    power = torch.fft.fft2(values.double()).abs().square()
    power[:, 0, 0] = 0
    rows, columns = (torch.fft.fftfreq(n, device=values.device).abs() for n in values.shape[1:])
    highest = (rows == rows.max())[:, None] | (columns == columns.max())
    total = power.sum(dim=(1, 2))
    return torch.where(total > 0, (power * highest).sum(dim=(1, 2)) / total, torch.nan).float()


# Layers ---------------------------------------------------------------------------------------------------------------


def stage_layers(host: nn.Module) -> list[str]:
    """Three layers for class activation maps, from shallow to deep.

    They are the last layers of the three coarsest grids; for a host of one grid size the deepest one that the logits
    read, and those at three quarters and at half of its depth.
    """
    read = [site for site in sites(host) if site.reached >= ENOUGH_REACHED]
    last = {site.grid: site for site in read}
    if len(last) >= 3:
        return [site.name for site in last.values()][-3:]
    deepest = read[-1].depth
    nearest = [min(read, key=lambda s, at=at: abs(s.depth - at * deepest)) for at in (0.5, 0.75, 1)]
    return list(dict.fromkeys(site.name for site in nearest))


def one_stage_earlier(host: nn.Module) -> str:
    """The last layer of the next finer grid than the default layer's; in a host of one grid size the block before."""
    here = resolve_site(host, None, input_size_of(host))
    before = [site for site in sites(host) if site.depth < here.depth]
    finer = [site for site in before if site.grid != here.grid]
    return (finer or before)[-1].name


def coarse_grid(host: nn.Module, ib: IBAttention) -> tuple[int, int]:
    """The deepest stage's grid, or half of the bottleneck's where the host has one grid size."""
    h, w = resolve_site(host, cam_layer(host), input_size_of(host)).grid
    own_h, own_w = ib.site.grid
    return (h, w) if h < own_h else (max(1, own_h // 2), max(1, own_w // 2))


# Methods --------------------------------------------------------------------------------------------------------------


def grad_cams(layers: Sequence[str]) -> dict[str, Any]:
    """Grad-CAM at each of these layers."""
    return {f"grad_cam {layer}": ("grad_cam", {"layer": layer}) for layer in layers}


def baselines(layers: Sequence[str], best: str, examples: Tensor) -> dict[str, Any]:
    """Methods of up to about two passes, those of the CAM family at Grad-CAM's best layer, and the package's controls.

    Args:
        layers: from shallow to deep; LayerCAM is for the shallower ones.
        best: the layer at which Grad-CAM is best.
        examples: images that the bottleneck was fitted on, for statistics.
    """
    return {
        **{f"layer_cam {layer}": ("layer_cam", {"layer": layer}) for layer in layers[:2]},
        f"hires_cam {best}": ("hires_cam", {"layer": best}),
        f"grad_cam_pp {best}": ("grad_cam_pp", {"layer": best}),
        "input_x_gradient": "input_x_gradient",
        "activation_energy": ("activation_energy", {"reference": examples[:256]}),
        **{name: name for name in HOST_FREE},
    }


def deep_energy(best: str, examples: Tensor) -> dict[str, Any]:
    """The control of loud features once more, where Grad-CAM is best: in some hosts it tells more there."""
    return {f"activation_energy {best}": ("activation_energy", {"layer": best, "reference": examples[:256]})}


def controls(host: nn.Module, ib: IBAttention, best: str, examples: Tensor) -> dict[str, Any]:
    """What is left of our map's gain without its detail, without the image, with its mass anywhere, and by drawing."""
    heat = torch.cat([ib.attribute(part) for part in examples[:256].split(32)])
    heat = heat / heat.sum(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    grid = coarse_grid(host, ib)
    return {
        f"ib pooled to {grid[0]}x{grid[1]}": Pooled(ib, grid),
        f"grad_cam {best} x mean ib": Patterned(best, heat.mean(dim=0, keepdim=True)),
        f"grad_cam {best} drawn as ib": Redrawn(best, resolve_site(host, best, input_size_of(host)).grid),
        "ib scattered": Scattered(ib),
    }


def extras(best: str, examples: Tensor, size: int) -> dict[str, Any]:
    """All further methods of the package, about from cheap to dear; blurred forms of those that are noise by pixel.

    Args:
        best: layer for the CAM family.
        examples: images that the bottleneck was fitted on, for statistics.
        size: side of the images in pixels.
    """
    cheap = ("br_npa", "am", "saliency", "guided_grad_cam", "deep_lift", "lrp", "attention_rollout")
    noisy = ("integrated_gradients", "smooth_grad")
    return {
        **{name: name for name in (*cheap, "attention_gradient_rollout")},
        f"eigen_cam {best}": ("eigen_cam", {"layer": best}),
        "iba": ("iba", {"reference": examples}),
        "ib per image": ("ib", {"reference": examples[:64]}),
        **{name: name for name in (*noisy, "gradient_shap")},
        **{f"{name} blurred": Blurred(name, size / 32) for name in noisy},
        "feature_ablation": "feature_ablation",
        f"score_cam {best}": ("score_cam", {"layer": best}),
        "occlusion": "occlusion",
        RISE: ("rise", {"masks": RISE_MASKS}),
    }


@dataclass(frozen=True)
class Pooled:
    """Control: our map averaged over the cells of a coarse grid, so that only coarse placement is left."""

    unit: ClassVar[str] = "bits"
    ib: IBAttention
    grid: tuple[int, int]

    def __call__(self, call: Call) -> Tensor:
        return resize(F.adaptive_avg_pool2d(_maps(self.ib, call), self.grid), call.size)


@dataclass(frozen=True)
class Scattered:
    """Control: our map's mass, in parts of a grid cell of its layer, at random cells of the image."""

    unit: ClassVar[str] = "bits"
    ib: IBAttention

    def __call__(self, call: Call) -> Tensor:
        h, w = self.ib.site.grid
        cells = F.adaptive_avg_pool2d(_maps(self.ib, call), (h, w))
        mass = cells * (call.size[0] * call.size[1] / (h * w))
        order = Random()(replace(call, layer=None))[:, :, :h, :w].flatten(1).argsort(dim=1)  # each image has its own
        return spread(mass.flatten(1).gather(1, order).view_as(cells), call.size)


@dataclass(frozen=True)
class Patterned:
    """Control: Grad-CAM times the mean of our maps over images; what a fixed pattern adds, such as a lattice."""

    unit: ClassVar[str] = "gradient x feature"
    layer: str
    pattern: Tensor

    def __call__(self, call: Call) -> Tensor:
        return GradCAM()(replace(call, layer=self.layer)) * self.pattern.to(call.x.device)


@dataclass(frozen=True)
class Redrawn:
    """Control: Grad-CAM brought from its grid to the image's size as our maps are."""

    unit: ClassVar[str] = "gradient x feature"
    layer: str
    grid: tuple[int, int]

    def __call__(self, call: Call) -> Tensor:
        coarse = on_grid(GradCAM()(replace(call, layer=self.layer)), self.grid)
        return spread(coarse.clamp_min(0)[:, None], call.size)


@dataclass(frozen=True)
class Blurred:
    """A registered method's map behind a Gaussian blur: noise between neighbours gone."""

    method: str
    sigma: float

    @property
    def unit(self) -> str:
        return METHODS.get(self.method).unit

    def __call__(self, call: Call) -> Tensor:
        return gaussian_blur(METHODS.get(self.method)()(call), sigma=self.sigma)


def _maps(ib: IBAttention, call: Call) -> Tensor:
    maps = ib.attribute(call.x, call.target)
    assert isinstance(maps, Tensor)
    return maps
