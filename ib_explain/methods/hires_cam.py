"""HiResCAM: Draelos and Carin 2020, arXiv 2011.08891, section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_explain.checks import check_bool
from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import glance

__all__ = ["HiResCAM", "hires_cam_map"]


@register_method("hires_cam")
@dataclass(frozen=True)
class HiResCAM:
    """HiResCAM: gradient times feature at each position, without averaging the gradient (Draelos and Carin 2020).

    Positive values speak for the target. About one forward pass; the default layer is `cam_layer`.

    Attributes:
        relu: keep only what speaks for the target; False shows both signs.
    """

    unit: ClassVar[str] = "gradient x feature"
    resolves_target: ClassVar[bool] = True
    relu: bool = True

    def __post_init__(self) -> None:
        check_bool(self.relu, "relu")

    def __call__(self, call: Call) -> Tensor:
        seen = glance(call)
        heat = hires_cam_map(seen.features, seen.gradient)
        return resize(heat.clamp_min(0) if self.relu else heat, call.size)


def hires_cam_map(features: Tensor, gradient: Tensor) -> Tensor:
    """sum_c g_c A_c, before the ReLU: (B, C, h, w) twice -> (B, 1, h, w)."""
    return (gradient * features).sum(dim=1, keepdim=True)
