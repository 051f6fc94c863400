"""Grad-CAM: Selvaraju et al., ICCV 2017, arXiv 1610.02391, section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_explain.checks import check_bool
from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import glance

__all__ = ["GradCAM", "grad_cam_map"]


@register_method("grad_cam")
@dataclass(frozen=True)
class GradCAM:
    """Grad-CAM: features weighted by the mean gradient of the target's logit (Selvaraju et al. 2017).

    Positive values speak for the target. About one forward pass: the backward pass ends at the layer, by default
    `cam_layer`.

    Attributes:
        relu: keep only what speaks for the target, as in the paper; False shows both signs.
    """

    unit: ClassVar[str] = "gradient x feature"
    resolves_target: ClassVar[bool] = True
    relu: bool = True

    def __post_init__(self) -> None:
        check_bool(self.relu, "relu")

    def __call__(self, call: Call) -> Tensor:
        seen = glance(call)
        heat = grad_cam_map(seen.features, seen.gradient)
        return resize(heat.clamp_min(0) if self.relu else heat, call.size)


def grad_cam_map(features: Tensor, gradient: Tensor) -> Tensor:
    """sum_c mean_p(g_c) A_c, before the ReLU: (B, C, h, w) twice -> (B, 1, h, w)."""
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * features).sum(dim=1, keepdim=True)
