"""IBA, the per-sample bottleneck as published: Schulz et al., ICLR 2020, arXiv 2001.00396; here for whole batches."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.checks import check_number, check_positive_int
from ib_explain.facts import remembered
from ib_explain.hooks import capture
from ib_explain.layouts import Layout, leaves
from ib_explain.lending import frozen, run_host
from ib_explain.maps import resize
from ib_explain.methods.base import Call, NotApplicable, check_reference, default_site, register_method
from ib_explain.modules import unwrap
from ib_explain.observation import Observation, observe
from ib_explain.randomness import generator_of, normal
from ib_explain.reference import Reference, reference_statistics
from ib_explain.sites import candidate_layers, input_size_of, resolve_site
from ib_explain.stripes import find_layouts, probe_batch
from ib_explain.targets import resolve_target

__all__ = ["IBA", "iba_layer"]

STRIDE = 8  # a 28x28 grid for 224 px, the published choice
STEM = 0.15
LEAST_STD = 0.01
LEAST_ACTIVE = 0.01


@register_method("iba")
@dataclass(frozen=True)
class IBA:
    """IBA as published: per-channel noise masks optimised for each image, in bits (Schulz et al. 2020).

    Non-negative: information that a position keeps, in bits per pixel. About `steps * copies` forward and backward
    passes through the part behind the layer, by default `iba_layer`. With the authors' library: alpha of shape
    C x h x w starts at 5, sigmoid, 5x5 Gaussian smoothing (sigma 1, reflected), Adam, elements that are zero in 99 % of
    the reference images left out. Images do not disturb each other: the loss is their sum, and all see the same noise.
    Tokens beside the grid are held at their reference mean.

    Attributes:
        reference: images (N, 3, H, W) of the explained images' size for mean and standard deviation of each element;
            the authors advise 10,000 training images and warn below 1,000. None takes 32 images of smooth noise.
        beta: weight of the mean nats per feature element.
        steps: Adam steps; the map is that of the last step's forward pass, before its update.
        lr: Adam's learning rate.
        copies: noise samples of each image in a step.
    """

    unit: ClassVar[str] = "bits"
    resolves_target: ClassVar[bool] = True
    reference: Tensor | None = None
    beta: float = 10.0
    steps: int = 10
    lr: float = 1.0
    copies: int = 10

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")
        check_positive_int(self.copies, "copies")
        check_number(self.lr, "lr", above=0)
        check_number(self.beta, "beta", at_least=0)
        check_reference(self.reference)

    def __call__(self, call: Call) -> Tensor:
        layer = iba_layer(call.model, call.input_size) if call.layer is None else call.layer
        site = resolve_site(call.model, layer, call.input_size)
        if min(site.grid) < 3:
            raise NotApplicable(f"IBA smooths with a 5x5 kernel and needs a 3x3 grid, {site.name!r} has {site.grid}")
        statistics = reference_statistics(call.model, site, self.reference, per_element=True, rows=call.batch_size)
        # Copies go through the host together as far as the rows of one pass allow.
        at_once = max(n for n in range(1, self.copies + 1) if self.copies % n == 0 and n <= call.copies_per_pass)
        count = len(call.x)
        seen = observe(
            call.model,
            site,
            call.x.repeat(at_once, 1, 1, 1),
            lambda logits: resolve_target(call.target, logits[:count]).repeat(at_once),
        )
        bits = self._fit(seen, site.layout, statistics, count, call.seed) / math.log(2)
        area = site.grid[0] * site.grid[1] / (call.size[0] * call.size[1])
        return resize(bits.sum(dim=1, keepdim=True) * area, call.size)

    def _fit(self, seen: Observation, layout: Layout, known: Reference, count: int, seed: int) -> Tensor:
        """Nats of each element after `steps - 1` updates, (count, C, h, w)."""
        features = seen.features[:count].float()
        std, active = known.std.clamp_min(LEAST_STD), known.active > LEAST_ACTIVE
        normalised = (features - known.moments.mean) / std
        alpha = torch.full_like(features, 5.0).requires_grad_()
        optimiser = torch.optim.Adam([alpha], lr=self.lr)
        generator = generator_of(seed, features.device)
        at_once = len(seen.features) // count
        with torch.enable_grad():
            for _ in range(self.steps - 1):
                noise = normal(generator, self.copies, *features.shape[1:])
                alpha.grad = torch.zeros_like(alpha)
                for part in noise.split(at_once):
                    closed = _closed(alpha)  # 1 - lambda
                    replaced = known.moments.mean + std * part[:, None]  # (at_once, 1, C, h, w)
                    mixed = ((1 - closed) * features + closed * replaced) * active
                    logits = seen.tail(layout.with_grid(seen.output, mixed.flatten(0, 1), known.side))
                    loss = F.cross_entropy(logits.float(), seen.target, reduction="sum")
                    nats = (_nats(closed, normalised) * active).mean(dim=(1, 2, 3)).sum()
                    loss = loss / self.copies + self.beta * nats * (at_once / self.copies)
                    alpha.grad += torch.autograd.grad(loss, alpha)[0]
                optimiser.step()
            return (_nats(_closed(alpha), normalised) * active).detach()


def iba_layer(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> str:
    """The layer that the authors' choices come down to: the end of the last stage on about a 28x28 grid for 224 px.

    Grids are tried from the one whose stride is nearest to 8 pixels. On it the deepest layer that cuts is taken, unless
    it lies inside a module that goes on to another grid or in the first 15 % of the host, the stem. Once the turn comes
    to the grid of `default_layer` it is that one (transformers, whose blocks all share one grid).

    Raises:
        NotApplicable: no layer of the host cuts.
    """
    host = unwrap(model)
    size = input_size or input_size_of(host)
    return remembered(host, ("iba_layer", size), lambda: _nearest(host, size))


def _nearest(host: nn.Module, size: tuple[int, int, int]) -> str:
    preferred = default_site(host, size)

    def distance(grid: tuple[int, int]) -> float:
        return abs(math.log(math.sqrt(size[1] * size[2] / (grid[0] * grid[1])) / STRIDE))

    grids = _grids(host, size)
    for grid in sorted(set(grids.values()), key=distance):
        if distance(preferred.grid) <= distance(grid):
            break
        for name in reversed(grids):
            if grids[name] == grid and not _inside_reducing(host, name, grids):
                with contextlib.suppress(ValueError):  # alike in shape to a layer with a grid, but without one
                    site = resolve_site(host, name, size)
                    if site.usable and site.depth >= STEM:
                        return name
    return preferred.name


def _inside_reducing(host: nn.Module, name: str, grids: dict[str, tuple[int, int]]) -> bool:
    """Whether a layer lies in a module, other than a mere sequence, that ends on another grid."""
    parts = name.split(".")
    parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(
        grids.get(parent, grids[name]) != grids[name] and not isinstance(host.get_submodule(parent), nn.Sequential)
        for parent in parents
    )


def _grids(host: nn.Module, size: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """The grid of every candidate layer in the order of running; layers of one shape are probed once."""
    shapes: dict[str, tuple[Any, ...]] = {}

    def note(name: str, output: Any) -> None:
        shapes[name] = tuple((path, tuple(leaf.shape)) for path, leaf in leaves(output))

    names = candidate_layers(host, size)
    with frozen(host), torch.no_grad(), capture(host, names, once=False, at=note):
        run_host(host, probe_batch(host, 1, size))
    last = {shape: name for name, shape in shapes.items()}
    found = find_layouts(host, last.values(), size)
    layouts = {name: found[last[shape]] for name, shape in shapes.items()}
    return {name: layout.grid for name, layout in layouts.items() if isinstance(layout, Layout)}


def _closed(alpha: Tensor) -> Tensor:
    """1 - lambda = Gaussian smoothing of sigmoid(-alpha): accurate where lambda is nearly 1, (B, C, h, w)."""
    kernel = torch.exp(-0.5 * torch.arange(-2.0, 3.0, device=alpha.device).square())
    kernel = kernel / kernel.sum()
    batch, channels, h, w = alpha.shape
    padded = F.pad(torch.sigmoid(-alpha).reshape(batch * channels, 1, h, w), (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :]).reshape(alpha.shape)


def _nats(closed: Tensor, normalised: Tensor) -> Tensor:
    """KL( N(lambda r, (1 - lambda)^2) || N(0, 1) ) of each element, with 1 - lambda = `closed`."""
    return 0.5 * (((1 - closed) * normalised).square() + closed.square() - 1) - closed.log()
