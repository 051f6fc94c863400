"""Which class is explained: turns None, an int, a list or a tensor into class indices (B,); scores of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ib_explain.randomness import generator_of, normal

__all__ = ["Target", "class_rows", "resolve_target", "spread_target", "target_scores"]

Target = int | Sequence[int] | Tensor | np.ndarray | None


def resolve_target(target: Target, logits: Tensor) -> Tensor:
    """Return the class index of every image.

    Args:
        target: None for the host's own top-1; an int (or NumPy integer, or 0-d tensor) for all images; a list,
            1-D array or 1-D integer tensor with one index an image. Negative indices count from the end, as in Captum.
        logits: the host's output on the intact images, (B, K).

    Returns:
        (B,) int64 on the logits' device, in [0, K).

    Raises:
        TypeError: bool, float or anything that is no integer.
        ValueError: another length than B, or more than one axis.
        IndexError: a class outside the host's K.
    """
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    indices = spread_target(target, batch).to(logits.device)
    outside = indices[(indices >= classes) | (indices < -classes)]
    if outside.numel():
        raise IndexError(f"target class {int(outside[0])} is out of range for a model with {classes} classes")
    return torch.where(indices < 0, indices + classes, indices)


def spread_target(target: Target, batch: int) -> Tensor:
    """One index for each image, (B,) int64, from any form but None; neither range nor sign is checked yet.

    Raises:
        TypeError, ValueError: as `resolve_target`.
    """
    indices = _as_int64(target, batch)
    if indices.numel() == 1 and indices.ndim == 0:
        indices = indices.expand(batch)
    if indices.shape != (batch,):
        raise ValueError(f"target must hold one class for each of the {batch} images, got {tuple(indices.shape)}")
    return indices


def target_scores(values: Tensor, indices: Tensor) -> Tensor:
    """Value of each image's class, such as its logit: (B, K), (B,) -> (B,)."""
    return values.gather(1, indices[:, None])[:, 0]


def class_rows(model: nn.Module, classes: int, seed: int = 0) -> Tensor:
    """One row for each class, (K, D): the last linear layer's weight with K rows, else fixed random codes."""
    rows = [
        module.weight.flatten(1)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == classes
    ]
    if rows:
        return rows[-1].detach().float().clone()
    return normal(generator_of(seed), classes, 64)


def _as_int64(target: Any, batch: int) -> Tensor:
    expected = "target must be None, an int, a list of ints or a 1-D integer tensor"
    if isinstance(target, bool | np.bool_):
        raise TypeError(f"{expected}, got the bool {target}")
    if isinstance(target, int | np.integer):
        return torch.tensor(_in_int64(int(target)), device="cpu")
    if isinstance(target, np.ndarray):
        if not np.issubdtype(target.dtype, np.integer):
            raise TypeError(f"{expected}, got an array of {target.dtype}")
        target = torch.from_numpy(np.ascontiguousarray(target).astype(np.int64))
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"{expected}, got a tensor of {target.dtype}")
        target = target.detach().to(torch.int64)
        if target.numel() == 1 and (target.ndim == 0 or batch != 1):
            return target.reshape(())  # as Captum: one element means one class for all images
        return target
    if isinstance(target, Sequence) and not isinstance(target, str | bytes):
        wrong = [t for t in target if isinstance(t, bool | np.bool_) or not hasattr(t, "__index__")]
        if wrong:
            raise TypeError(f"{expected}, got a list with {wrong[0]!r}")
        return torch.tensor([_in_int64(t.__index__()) for t in target], dtype=torch.int64, device="cpu")
    raise TypeError(f"{expected}, got {type(target).__name__}")


def _in_int64(target: int) -> int:
    if not -(2**63) <= target < 2**63:
        raise IndexError(f"target class {target} is out of range for any model")
    return target
