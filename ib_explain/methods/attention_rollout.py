"""Attention rollout (Abnar and Zuidema 2020) and its gradient-weighted form (Chefer et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ib_explain.maps import resize
from ib_explain.methods.attention import read_attention
from ib_explain.methods.base import Call, register_method

__all__ = ["AttentionGradientRollout", "AttentionRollout", "gradient_rollout", "rollout"]


@register_method("attention_rollout")
@dataclass(frozen=True)
class AttentionRollout:
    """Attention rollout: attention multiplied through all layers, the same for every class (Abnar and Zuidema 2020).

    Non-negative, the share of a patch in the token or tokens that the classifier reads (arXiv 2005.00928, section 4).
    About one forward pass, with unfused attention. For transformers whose attention matrices can be read, as timm's;
    all layers take part, so it takes no layer.
    """

    unit: ClassVar[str] = "attention"
    resolves_target: ClassVar[bool] = True

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("attention_rollout")
        seen = read_attention(call, gradients=False)
        return resize(seen.to_map(rollout(seen.matrices)), call.size)


@register_method("attention_gradient_rollout")
@dataclass(frozen=True)
class AttentionGradientRollout:
    """Rollout of attention times the positive gradient of the target's logit (Chefer et al. 2021, arXiv 2103.15679).

    Non-negative; what speaks for the target (section 3.1, equations 5 and 6 for self-attention). One forward and one
    backward pass, with unfused attention. For the same transformers as `attention_rollout`; takes no layer.
    """

    unit: ClassVar[str] = "gradient x attention"
    resolves_target: ClassVar[bool] = True

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("attention_gradient_rollout")
        seen = read_attention(call, gradients=True)
        relevance = gradient_rollout(seen.matrices, seen.gradients)
        own = torch.eye(relevance.shape[1], device=relevance.device)  # what a token brings by itself, before any layer
        return resize(seen.to_map(relevance - own), call.size)


def rollout(matrices: list[Tensor]) -> Tensor:
    """prod_l (A_l + I) / 2 with A the mean over heads, later layers to the left: (B, heads, T, T) each -> (B, T, T)."""
    own = torch.eye(matrices[0].shape[-1], device=matrices[0].device)
    total = own.expand(len(matrices[0]), -1, -1)
    for matrix in matrices:
        total = (matrix.mean(dim=1) + own) / 2 @ total
    return total


def gradient_rollout(matrices: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """R = I, then R += mean over heads of relu(A * gradient) @ R, layer by layer: -> (B, T, T)."""
    total = torch.eye(matrices[0].shape[-1], device=matrices[0].device).expand(len(matrices[0]), -1, -1)
    for matrix, gradient in zip(matrices, gradients, strict=True):
        total = total + (matrix * gradient).clamp_min(0).mean(dim=1) @ total
    return total
