"""AM, the activation map: the features' norm; the control of BR-NPA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import cam_site, grid_features

__all__ = ["ActivationMap"]


@register_method("am")
@dataclass(frozen=True)
class ActivationMap:
    """Activation map: L2 norm of the features at each position, the same for every class (control of br_npa).

    Non-negative. At most one forward pass; the default layer is `cam_layer`.
    """

    unit: ClassVar[str] = "feature norm"

    def __call__(self, call: Call) -> Tensor:
        return resize(grid_features(call, cam_site(call)).norm(dim=1, keepdim=True), call.size)
