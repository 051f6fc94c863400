"""Score-CAM: Wang et al., CVPR workshops 2020, arXiv 1910.01279, section 3 and algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ib_explain.maps import resize
from ib_explain.methods.base import Call, register_method
from ib_explain.methods.cam import cam_site, grid_and_classes
from ib_explain.methods.masking import masked_scores

__all__ = ["ScoreCAM", "score_cam_weights"]


@register_method("score_cam")
@dataclass(frozen=True)
class ScoreCAM:
    """Score-CAM: features weighted by the score of the image seen through each of them (Wang et al. 2020).

    Non-negative, after the paper's ReLU. One forward pass for each channel of the layer, by default `cam_layer`.
    """

    unit: ClassVar[str] = "feature"
    resolves_target: ClassVar[bool] = True

    def __call__(self, call: Call) -> Tensor:
        features, classes = grid_and_classes(call, cam_site(call))
        weights = score_cam_weights(call.model, call.x, features, classes, call.copies_per_pass)
        return resize((weights[:, :, None, None] * features).sum(dim=1, keepdim=True).clamp_min(0), call.size)


def score_cam_weights(host: nn.Module, x: Tensor, features: Tensor, classes: Tensor, channels_per_pass: int) -> Tensor:
    """Weight of each channel, (B, C): softmax over channels of the target's logit on the masked image.

    The mask is the channel resized to the input and brought to [0, 1] by its own minimum and maximum. The baseline's
    score, which the paper subtracts, cancels in the softmax.
    """
    scores = []
    with torch.no_grad():
        for part in features.split(channels_per_pass, dim=1):
            batch, count = part.shape[:2]
            fine = resize(part.flatten(0, 1)[:, None], (int(x.shape[2]), int(x.shape[3])))[:, 0]
            low, high = fine.amin(dim=(1, 2), keepdim=True), fine.amax(dim=(1, 2), keepdim=True)
            masks = ((fine - low) / (high - low + 1e-8)).unflatten(0, (batch, count))
            scores.append(masked_scores(host, x, masks, classes))
    return torch.cat(scores, dim=1).softmax(dim=1)
