"""Grad-CAM++: Chattopadhay et al., WACV 2018, arXiv 1710.11063, section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import glance

__all__ = ["GradCAMPlusPlus", "grad_cam_pp_map"]


@register_method("grad_cam_pp")
@dataclass(frozen=True)
class GradCAMPlusPlus:
    """Grad-CAM++: positive gradients weighted so that every instance of the class counts (Chattopadhay et al. 2018).

    Non-negative, after the paper's ReLU. About one forward pass; the default layer is `cam_layer`.
    """

    unit: ClassVar[str] = "summed gradient x feature"
    resolves_target: ClassVar[bool] = True

    def __call__(self, call: Call) -> Tensor:
        seen = glance(call)
        return resize(grad_cam_pp_map(seen.features, seen.gradient).clamp_min(0), call.size)


def grad_cam_pp_map(features: Tensor, gradient: Tensor) -> Tensor:
    """sum_c w_c A_c, before the ReLU: (B, C, h, w) twice -> (B, 1, h, w).

    w_c = sum_p a_cp relu(g_cp), a = g^2 / (2 g^2 + sum_p A_cp g^3) (the paper's equation 19, g the gradient of the
    score, whose exponential is differentiated), 0 where g is 0.
    """
    total = features.sum(dim=(2, 3), keepdim=True)
    # One g^2 is cancelled, which keeps tiny gradients from underflowing; the sign of the divisor may be negative.
    divisor = 2 + total * gradient
    share = (divisor != 0) / divisor.where(divisor != 0, 1)
    weights = (share * gradient.clamp_min(0)).sum(dim=(2, 3), keepdim=True)
    return (weights * features).sum(dim=1, keepdim=True)
