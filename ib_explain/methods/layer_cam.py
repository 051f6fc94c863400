"""LayerCAM: Jiang et al., IEEE TIP 2021, doi 10.1109/TIP.2021.3089943, section III."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import glance

__all__ = ["LayerCAM", "layer_cam_map"]


@register_method("layer_cam")
@dataclass(frozen=True)
class LayerCAM:
    """LayerCAM: positive gradient times feature at each position, fit for shallow layers too (Jiang et al. 2021).

    Non-negative, after the paper's ReLU. About one forward pass; the default layer is `cam_layer`.
    """

    unit: ClassVar[str] = "gradient x feature"
    resolves_target: ClassVar[bool] = True

    def __call__(self, call: Call) -> Tensor:
        seen = glance(call)
        return resize(layer_cam_map(seen.features, seen.gradient).clamp_min(0), call.size)


def layer_cam_map(features: Tensor, gradient: Tensor) -> Tensor:
    """sum_c relu(g_c) A_c, before the outer ReLU: (B, C, h, w) twice -> (B, 1, h, w)."""
    return (gradient.clamp_min(0) * features).sum(dim=1, keepdim=True)
