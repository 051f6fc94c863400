"""Scores of many masked variants of each image, in passes of bounded size: Score-CAM and RISE."""

from __future__ import annotations

from torch import Tensor, nn

from ib_explain.lending import run_host
from ib_explain.targets import target_scores

__all__ = ["masked_scores"]


def masked_scores(host: nn.Module, x: Tensor, masks: Tensor, classes: Tensor, *, probability: bool = False) -> Tensor:
    """Score of each image's class on its masked variants, in one forward pass of B * M rows.

    Args:
        host: the host, frozen by the caller.
        x: images (B, 3, H, W); masked pixels become 0, the mean colour of normalised inputs.
        masks: (B, M, H, W), or (1, M, H, W) for the same masks on all images, in [0, 1].
        classes: (B,).
        probability: softmax probability instead of the logit.

    Returns:
        (B, M) float32.
    """
    variants = x[:, None] * masks[:, :, None].to(x.dtype)  # (B, M, 3, H, W)
    logits = run_host(host, variants.flatten(0, 1)).float()
    scores = logits.softmax(dim=1) if probability else logits
    return target_scores(scores, classes.repeat_interleave(variants.shape[1])).unflatten(0, variants.shape[:2])
