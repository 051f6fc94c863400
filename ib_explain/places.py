"""A place: the site of a bottleneck and the deeper layers that its attention reads, for inputs of one size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ib_explain.checks import warn_user
from ib_explain.cuts import ANSWERS_DIFFER, answers_differ
from ib_explain.io import layout_from_json
from ib_explain.layouts import Layout
from ib_explain.sites import Site, candidate_layers, deeper_sites, layouts_of, resolve_site

__all__ = ["Place", "check_reached", "find_place", "warn_of_leak", "warn_of_window"]

LEAK_WORTH_A_WARNING = 0.05


@dataclass(frozen=True)
class Place:
    """Where a bottleneck sits and where it reads.

    Attributes:
        site: the probed layer.
        deeper: names and layouts of the layers behind it that are read.
    """

    site: Site
    deeper: tuple[tuple[str, Layout], ...]

    @property
    def input_size(self) -> tuple[int, int, int]:
        return self.site.input_size

    @property
    def strided(self) -> bool:
        """Whether the host goes on to a coarser grid behind the site."""
        return any(layout.grid[0] < self.site.grid[0] for _, layout in self.deeper)

    def at_size(self, model: nn.Module, size: tuple[int, int, int], args: tuple[Any, ...] = ()) -> Place:
        """The same layers for inputs of another size.

        Raises:
            ValueError: the layers hold other features there.
        """
        if size == self.input_size:
            return self
        site = resolve_site(model, self.site.name, size, args)
        ours, theirs = self.site.layout, site.layout
        if (ours.channels, ours.prefix, ours.suffix, ours.path) != (
            theirs.channels,
            theirs.prefix,
            theirs.suffix,
            theirs.path,
        ):
            raise ValueError(
                f"inputs of size {size} give {site.name!r} {theirs.kind} with {theirs.channels} channels, "
                f"but at {self.input_size} it is {ours.kind} with {ours.channels}"
            )
        found = layouts_of(model, [name for name, _ in self.deeper], size, args)
        for name, layout in found.items():
            if not isinstance(layout, Layout):
                raise ValueError(
                    f"inputs of size {size} leave no grid at {name!r}, which the bottleneck at {site.name!r} reads as "
                    f"well; take larger images, or fit at this size: {layout}"
                )
        deeper = tuple((name, layout) for name, layout in found.items() if isinstance(layout, Layout))
        return Place(site, deeper)

    def to_json(self) -> dict[str, Any]:
        """For a config file."""
        return {
            "layer": self.site.name,
            "input_size": list(self.input_size),
            "layout": asdict(self.site.layout),
            "deeper": [[name, asdict(layout)] for name, layout in self.deeper],
        }

    def as_stored(self, stored: dict[str, Any]) -> Place:
        """This place, reading the deeper layers of a config file.

        Raises:
            ValueError: the stored site has another shape than this one.
        """
        layout, here = layout_from_json(stored["layout"]), self.site.layout
        if (layout.grid, layout.channels, layout.prefix) != (here.grid, here.channels, here.prefix):
            raise ValueError(
                f"it was fitted to {self.site.name!r} with {layout.channels} channels on {layout.grid}, "
                f"here the layer has {here.channels} channels on {here.grid}"
            )
        return replace(self, deeper=tuple((name, layout_from_json(fields)) for name, fields in stored["deeper"]))


def find_place(
    model: nn.Module, layer: str | None, size: tuple[int, int, int], args: tuple[Any, ...] = (), *, read: bool = True
) -> Place:
    """Resolve a layer (None: the default one) and, if asked, the layers to read behind it."""
    site = resolve_site(model, layer, size, args)
    return Place(site, tuple(deeper_sites(model, site, args)) if read else ())


def check_reached(site: Site) -> None:
    """Refuse a layer that nothing can be fitted at."""
    if site.reached == 0 and not math.isnan(site.leak):  # NaN: the same logits for all images
        raise ValueError(
            f"no gradient of the logits reaches the grid of layer {site.name!r}: they do not depend on it, or the "
            "model's forward runs behind it under no_grad or detaches, or runs it inside torch.utils.checkpoint; name "
            "an earlier layer"
        )


def warn_of_window(host: nn.Module, site: Site, args: tuple[Any, ...]) -> None:
    """Warn of a host that crops or pads its images, whose grid is drawn over all of the image nevertheless."""
    if site.layout.aligned:
        return
    # Deep in an untrained host branches that start at zero leave strides alone, which skip what lies between: the first
    # layer tells.
    first = layouts_of(host, candidate_layers(host, site.input_size)[:1], site.input_size, args)
    if not any(isinstance(layout, Layout) and layout.aligned for layout in first.values()):
        told = f"the grid of layer {site.name!r} does not cover the image as it is given: the model crops or pads it"
        warn_user(f"{told}, and maps are stretched over all of it; crop or pad before the model instead")


def warn_of_leak(host: nn.Module, site: Site, args: tuple[Any, ...]) -> None:
    """Warn of a layer that is no cut, or of a host that is not the same in every pass."""
    if site.leak <= LEAK_WORTH_A_WARNING:
        return
    if answers_differ(host, site.input_size, args):
        warn_user(f"{ANSWERS_DIFFER}: no map can tell what they come from")
        return
    told = f"layer {site.name!r} is no cut: {site.leak:.0%} of the logits' spread flows around its grid"
    warn_user(f"{told}, so its bits do not bound what the model uses")
