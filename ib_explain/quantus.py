"""The explainer that Quantus (Hedström et al. 2023) calls: every method of this package under every metric of Quantus.

>>> import quantus
>>> from ib_explain import quantus_explain
>>> score = quantus.PointingGame()(  # doctest: +SKIP
...     model, x_batch=x, y_batch=y, s_batch=masks, explain_func=quantus_explain, explain_func_kwargs={"method": "ib"}
... )
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ib_explain.attribution import attribute
from ib_explain.modules import host_device, host_dtype

__all__ = ["quantus_explain"]


def quantus_explain(model: nn.Module, inputs: Any, targets: Any = None, **kwargs: Any) -> np.ndarray:
    """Maps as Quantus's `explain_func` is to return them.

    Each call explains the model that it is given. That matters in Quantus's randomisation tests, which hand in copies
    with other weights: a method given by name starts anew for each copy ("ib" optimises its attention for it), while a
    fitted `IBAttention` belongs to its own host and refuses any other one. To test a fitted bottleneck, pass a
    function that fits one for the model it gets.

    Args:
        model: the host, a bare nn.Module; where it is decides the device.
        inputs: (N, C, H, W) array or tensor, normalised.
        targets: (N,) class indices; None is the model's own top-1.
        **kwargs: from `explain_func_kwargs`: `method` (any that `ib_explain.attribute` takes, "ib" by default),
            `layer`, `batch_size`, `seed`, and the method's own options. Quantus's `device` must be the model's.

    Returns:
        (N, 1, H, W) float32.

    Raises:
        ValueError: another device than the model's; an `IBAttention` of another model; as `ib_explain.attribute`.
        TypeError: an option that the method does not have.
    """
    device = host_device(model)
    asked = kwargs.pop("device", None)
    if asked is not None and torch.device(asked).type != device.type:
        raise ValueError(f"device must be the model's, {device}, got {asked}; move the model before")
    method = kwargs.pop("method", "ib")
    x = inputs if isinstance(inputs, torch.Tensor) else torch.from_numpy(np.asarray(inputs))
    target = None if targets is None else np.asarray(targets)
    return attribute(model, x.to(device, host_dtype(model)), target=target, method=method, **kwargs).cpu().numpy()
