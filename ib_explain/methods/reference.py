"""Statistics of a site's features over reference images, for methods that measure against them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.checks import check_images
from ib_explain.hooks import capture, run_host, weights_state
from ib_explain.methods.base import ROWS, Call
from ib_explain.sites import Site
from ib_explain.statistics import RunningMean, RunningMoments
from ib_explain.stripes import probe_images

__all__ = ["Reference", "reference_statistics"]

NOISE_IMAGES = 32  # smooth noise where the user gives no images, the same as for `ib`
NOISE_SEED = 7


@dataclass(frozen=True)
class Reference:
    """What the features of a site are like over reference images, float32 on the images' device.

    Attributes:
        mean: (1, C, 1, 1), or (1, C, h, w) per element.
        std: unbiased standard deviation, of the same shape; may be 0.
        active: share of reference images in which the element is not zero, (1, C, h, w).
        side: means of what stands beside the grid, as `Layout.side_of` lists it.
    """

    mean: Tensor
    std: Tensor
    active: Tensor
    side: list[Tensor]


# The last statistics of each host: chunk after chunk of one data set asks for the same ones.
_LAST: weakref.WeakKeyDictionary[nn.Module, tuple[Any, weakref.ref[Tensor] | None, Reference]]
_LAST = weakref.WeakKeyDictionary()


def reference_statistics(call: Call, site: Site, images: Tensor | None, *, per_element: bool) -> Reference:
    """Mean and standard deviation of the features at `site`; the host runs only up to there.

    Args:
        call: host, input size, device, and rows of one forward pass.
        site: the layer.
        images: reference images (N, 3, H, W) of the explained images' size; None for 32 images of smooth noise,
            never the explained images themselves.
        per_element: a mean for each position and channel instead of one for each channel.

    Raises:
        ValueError: images of another size.
    """
    if images is not None:
        check_images(images, size=call.input_size, name="reference")
    # In-place changes of weights or images change the key, so that nothing stale is used.
    state = (weights_state(call.model), None if images is None else images._version)
    key = (site.name, call.input_size, per_element, state)
    last = _LAST.get(call.model)
    if last is not None and last[0] == key and (last[1] and last[1]()) is images:
        return last[2]
    found = _estimate(call, site, images, per_element)
    _LAST[call.model] = (key, None if images is None else weakref.ref(images), found)
    return found


def _estimate(call: Call, site: Site, images: Tensor | None, per_element: bool) -> Reference:
    moments, active, side = RunningMoments(per_element=per_element), RunningMean(), RunningMean()
    for output in _outputs(call, site, images):
        grid = site.layout.to_grid(output)
        moments.update(grid)
        active.update([(grid != 0).float()])
        side.update(site.layout.side_of(output))
    device = call.x.device
    return Reference(
        mean=moments.mean.float().to(device),
        std=(moments.squares / max(moments.count - 1, 1)).sqrt().float().to(device),
        active=active.result()[0].to(device),
        side=[s.to(device) for s in side.result()],
    )


def _outputs(call: Call, site: Site, images: Tensor | None) -> Iterator[Any]:
    if images is None:
        images = probe_images(NOISE_IMAGES, call.input_size, seed=NOISE_SEED)
    for part in images.split(call.batch_size or ROWS):
        with torch.no_grad(), capture(call.model, [site.name], stop=True) as seen:
            run_host(call.model, part.to(call.x))
        yield seen[site.name]
