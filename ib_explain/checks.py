"""Errors at the door: what was expected, what came, the nearest name. One line each.

Every public entry checks its arguments with these, so the same mistake reads the same everywhere.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_bool", "check_images", "check_maps", "check_number", "check_positive_int", "check_shares"]
__all__ += ["did_you_mean", "take_options", "warn_user"]

LISTED = 12  # known names that an error shows
ONE_CLASS = (
    "model must tell at least 2 classes, got 1; wrap a single logit z as torch.cat([torch.zeros_like(z), z], dim=1), "
    "whose softmax has sigmoid(z)"
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'? known: ..." for an error about an unknown `name`."""
    known = list(known)
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    squashed = name.lower().replace("_", "").replace("-", "")
    near = [k for k in lowered if k.replace("_", "") == squashed] or near
    hint = f"; did you mean {' or '.join(repr(lowered[n]) for n in near)}?" if near else ""
    shown = ", ".join(known[:LISTED]) + (f", ... ({len(known)} in all)" if len(known) > LISTED else "")
    return f"{hint} known: {shown}" if hint else f"; known: {shown}"


def check_images(
    x: Any,
    *,
    channels: int | None = None,
    size: tuple[int, int, int] | None = None,
    device: torch.device | None = None,
    name: str = "x",
    inference: bool = False,
) -> Tensor:
    """Check a batch of normalised float images and return it unchanged.

    Args:
        x: expected (B, C, H, W), floating point, finite, B >= 1.
        channels: expected C, if known.
        size: expected (C, H, W), if it must be that of other images.
        device: where the host's parameters live; the images must be there too.
        name: what the error calls the argument.
        inference: tensors made under inference_mode will do.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: wrong number of axes, empty, NaN or infinite, wrong C or size, other device, made under
            inference_mode.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (B, C, H, W), got {type(x).__name__}")
    if x.ndim != 4:
        hint = f"; add a batch axis: {name}[None]" if x.ndim == 3 else ""
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be normalised floating-point images, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{name} must hold at least one image, got shape {tuple(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        wanted = f"{channels} channel{'s' * (channels > 1)}"
        raise ValueError(f"{name} must have {wanted}, got {x.shape[1]} (shape {tuple(x.shape)})")
    if size is not None and tuple(x.shape[1:]) != size:
        raise ValueError(f"{name} must hold images of size {size}, got {tuple(x.shape[1:])}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device} but the model is on {device}; move it with {name}.to('{device}')")
    if x.is_inference() and not inference:
        told = f"{name} came from torch.inference_mode() and cannot be differentiated"
        raise ValueError(f"{told}; pass a {name}.clone() made outside of it")
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device: it has a shape and no values")
    _check_finite(x, name)
    return x


def check_maps(
    maps: Any, *, size: tuple[int, int] | None = None, batch: int | None = None, finite: bool = True
) -> Tensor:
    """Check maps of shape (B, 1, H, W) or (B, H, W) and return them as (B, H, W) float32, detached.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: other axes, other batch or size than expected, NaN or infinite (unless `finite` is False).
    """
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps must be a torch.Tensor of shape (B, 1, H, W) or (B, H, W), got {type(maps).__name__}")
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"maps must have shape (B, 1, H, W) or (B, H, W), got {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating point, got {maps.dtype}")
    if batch is not None and maps.shape[0] != batch:
        raise ValueError(f"maps must hold one map for each of the {batch} images, got {maps.shape[0]}")
    if size is not None and tuple(maps.shape[1:]) != tuple(size):
        raise ValueError(f"maps must have the images' size {tuple(size)}, got {tuple(maps.shape[1:])}")
    if finite:
        _check_finite(maps, "maps")
    return maps.detach().float()


def _check_finite(values: Tensor, name: str) -> None:
    # The extremes hold a NaN or an infinity if any value does, and take a tenth of the time that counting takes.
    if not torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")


def check_bool(value: Any, name: str) -> bool:
    """Return `value` if it is True or False, or say what came instead: "no" and 1 are neither."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_positive_int(value: Any, name: str) -> int:
    """Return `value` as an int >= 1, or say what came instead (bool is refused)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer >= 1, got {value!r}")
    number = value.__index__()
    if not 1 <= number < 2**63:  # beyond that torch counts no further
        raise ValueError(f"{name} must be an integer >= 1, got {number}")
    return number


def check_number(value: Any, name: str, *, above: float | None = None, at_least: float | None = None) -> float:
    """Return `value` as a finite float beyond the bound, or say what came instead (bool is refused)."""
    bound = f" > {above:g}" if above is not None else f" >= {at_least:g}" if at_least is not None else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{bound}, got {value!r}")
    number = float(value)
    beyond = (above is None or number > above) and (at_least is None or number >= at_least)
    if not (beyond and math.isfinite(number)):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def check_shares(values: Any, name: str) -> tuple[float, ...]:
    """Return one or more numbers in (0, 1) as a tuple, or say what came instead (a single number is refused)."""
    if isinstance(values, np.ndarray | Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers in (0, 1), such as (0.1, 0.5), got {values!r}")
    shares = tuple(check_number(value, f"each of {name}") for value in values)
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"{name} must be one or more numbers in (0, 1), got {shares}")
    return shares


def take_options(options: Mapping[str, Any], known: Iterable[str], owner: str) -> dict[str, Any]:
    """Refuse an option that `owner` does not have; return the options as a dict.

    Raises:
        TypeError: naming the unknown option, the nearest known one and all that exist.
    """
    known = list(known)
    for name in options:
        if name not in known:
            listed = did_you_mean(name, known) if known else "; it has no options"
            raise TypeError(f"{owner} has no option {name!r}{listed}")
    return dict(options)


def warn_user(text: str) -> None:
    """Warn at the user's line that led here: the first one outside of this package and of what it runs through."""
    through = (*(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)), functools.__file__)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(through):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
