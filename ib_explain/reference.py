"""Statistics of the features at a site over reference images, for methods without a fit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ib_explain.checks import check_images, warn_user
from ib_explain.facts import remembered
from ib_explain.hooks import capture
from ib_explain.lending import run_host
from ib_explain.modules import host_device, on_host
from ib_explain.sites import Site
from ib_explain.statistics import Moments, RunningMean, RunningMoments
from ib_explain.stripes import probe_images

__all__ = ["Reference", "reference_statistics", "warn_of_another_range"]

# Mean square of normalised features: 1 by definition, up to 8 for pictures by the statistics of noise at the default
# layers. At the last layers of a trained host, which noise hardly moves, it is in the hundreds and thousands.
UNLIKE = 50.0
NOISE_IMAGES = 32
NOISE_SEED = 7
ROWS = 32  # of one forward pass where the caller has no wish


@dataclass(frozen=True)
class Reference:
    """What the features of a site are like over reference images, float32 on the host's device.

    Attributes:
        moments: mean and floored standard deviation, (1, C, 1, 1), or (1, C, h, w) per element.
        std: the unbiased standard deviation itself, of the same shape; may be 0.
        varies: whether any feature does.
        active: share of reference images in which the element is not zero, (1, C, h, w).
        side: means of what stands beside the grid, as `Layout.side_of` lists it.
    """

    moments: Moments
    std: Tensor
    varies: bool
    active: Tensor
    side: list[Tensor]


def reference_statistics(
    host: nn.Module,
    site: Site,
    images: Tensor | None,
    *,
    per_element: bool,
    rows: int | None = None,
    args: tuple[Any, ...] = (),
) -> Reference:
    """Mean and standard deviation of the features at `site`; the host runs only up to there.

    The last ones of each site are remembered as long as one of the images looks the same: chunk after chunk of one data
    set asks for them.

    Args:
        host: the host, frozen by the caller.
        site: the layer.
        images: reference images (N, 3, H, W) of the explained images' size; None for 32 images of smooth noise,
            never the explained images themselves.
        per_element: a mean for each position and channel instead of one for each channel.
        rows: images of one forward pass.
        args: further arguments of the host's forward; what was found with some is not remembered.

    Raises:
        ValueError: images of another size.
    """
    if images is not None:
        check_images(images, size=site.input_size, name="reference")
    if args:
        return _estimate(host, site, _noise(site.input_size) if images is None else images, per_element, rows, args)
    last: dict[str, Any] = remembered(host, ("reference", site.name, site.input_size, per_element), dict)
    version = None if images is None else images._version  # which in-place changes raise
    # Not all that a host computes with shows in its state (its own attributes, hooks, `parameter.data`): one image is
    # looked at anew.
    asked_before = last and last["images"]() is images and last["version"] == version
    if asked_before and torch.equal(_grid(host, site, last["first"]), last["grid"]):
        return cast(Reference, last["found"])
    given = _noise(site.input_size) if images is None else images
    first = given[:1].clone()  # kept: noise is drawn for all images together
    last.update(
        images=(lambda: None) if images is None else weakref.ref(images),
        version=version,
        first=first,
        grid=_grid(host, site, first),
        found=_estimate(host, site, given, per_element, rows, args),
    )
    return cast(Reference, last["found"])


def _grid(host: nn.Module, site: Site, images: Tensor) -> Tensor:
    return torch.cat([site.layout.to_grid(output) for output in _outputs(host, site, images, ROWS, ())])


def _noise(size: tuple[int, int, int]) -> Tensor:
    return probe_images(NOISE_IMAGES, size, seed=NOISE_SEED)


def _estimate(
    host: nn.Module,
    site: Site,
    images: Tensor,
    per_element: bool,
    rows: int | None,
    args: tuple[Any, ...],
) -> Reference:
    moments, active, side = RunningMoments(per_element=per_element), RunningMean(), RunningMean()
    for output in _outputs(host, site, images, rows or ROWS, args):
        grid = site.layout.to_grid(output)
        moments.update(grid)
        active.update([(grid != 0).float()])
        side.update(site.layout.side_of(output))
    device = host_device(host)
    return Reference(
        moments=moments.result().to(device),
        std=(moments.squares / max(moments.count - 1, 1)).sqrt().float().to(device),
        varies=moments.varies,
        active=active.result()[0].to(device),
        side=[s.to(device) for s in side.result()],
    )


def _outputs(host: nn.Module, site: Site, images: Tensor, rows: int, args: tuple[Any, ...]) -> Iterator[Any]:
    for part in images.split(rows):
        with torch.no_grad(), capture(host, [site.name], stop=True) as seen:
            run_host(host, on_host(part, host), args)
        yield seen[site.name]


def warn_of_another_range(features: Tensor) -> None:
    """Statistics of noise of unit variance do not hold for a host that takes 0..255, say, and normalises by itself.

    Args:
        features: of images, normalised by the statistics of noise.
    """
    spread = float(features.square().mean())
    if spread > UNLIKE:
        warn_user(
            f"the images' features lie {spread**0.5:.0f} standard deviations from those of the noise that stands for "
            "data where nothing is fitted, so bits mean little; give reference=images as the model takes them, or fit"
        )
