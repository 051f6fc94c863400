"""Eigen-CAM: Muhammad and Yeasin, IJCNN 2020, arXiv 2008.00299."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import cam_site, grid_features

__all__ = ["EigenCAM", "eigen_cam_map"]


@register_method("eigen_cam")
@dataclass(frozen=True)
class EigenCAM:
    """Eigen-CAM: features projected on their first principal component; the same for every class (Muhammad 2020).

    Signed: positive on the side where features are stronger. At most one forward pass; the default layer is
    `cam_layer`.
    """

    unit: ClassVar[str] = "feature"

    def __call__(self, call: Call) -> Tensor:
        return resize(eigen_cam_map(grid_features(call, cam_site(call))), call.size)


def eigen_cam_map(features: Tensor) -> Tensor:
    """Projection of centred features on their first principal direction, (B, C, h, w) -> (B, 1, h, w).

    Features are centred over positions, as in pytorch-grad-cam. A principal direction has no sign of its own: it is
    turned so that the projection is positively correlated with the features' norm.
    """
    batch, channels, h, w = features.shape
    rows = features.flatten(2).transpose(1, 2).double()  # (B, h*w, C)
    norms = rows.norm(dim=2)
    rows = rows - rows.mean(dim=1, keepdim=True)
    if channels <= h * w:  # the smaller of the two Gram matrices has the same leading direction
        direction = torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors[..., -1]
        projection = (rows @ direction[..., None])[..., 0]  # (B, h*w)
    else:
        values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
        projection = vectors[..., -1] * values[..., -1:].clamp_min(0).sqrt()
    side = (projection * norms).sum(dim=1, keepdim=True)
    return (projection * torch.where(side < 0, -1.0, 1.0)).float().reshape(batch, 1, h, w)
