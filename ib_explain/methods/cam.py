"""What the CAM family shares: the layer its papers look at, and one pass that reads features and gradient there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.facts import remembered
from ib_explain.hooks import capture
from ib_explain.layouts import leaves, map_tensors
from ib_explain.lending import frozen, run_host
from ib_explain.methods.base import Call, NotApplicable
from ib_explain.modules import unwrap
from ib_explain.observation import observe
from ib_explain.sites import Site, candidate_layers, input_size_of, resolve_site
from ib_explain.stripes import probe_batch
from ib_explain.targets import resolve_target, target_scores

__all__ = ["Glance", "cam_layer", "cam_site", "glance", "grid_and_classes", "grid_features"]

ENOUGH = 0.5  # share of the grid's positions that the gradient must reach


def cam_layer(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> str:
    """Choose the layer for class activation maps, as their papers do: the deepest one that holds a grid.

    The rule walks from the logits back to the input over the layers through which every path leads, and takes the
    first whose output has a verified spatial grid that the logits' gradient reaches, in at least half of its positions;
    layers that end in pooling come last. For a CNN that is the last stage, for VGG its last convolution with its ReLU,
    as in the Grad-CAM paper; for a transformer that pools its patch tokens the last block or the norm behind it; for
    one that reads a class token the block before the last, because behind that one the patch tokens are not read.

    Args:
        model: the host.
        input_size: (3, H, W); by default what the host's own data config says, else (3, 224, 224).

    Returns:
        The dotted name of the layer; remembered as long as the host stays as it is.

    Raises:
        NotApplicable: no layer has a grid that the gradient reaches.
    """
    host = unwrap(model)
    size = input_size or input_size_of(host)
    return remembered(host, ("cam_layer", size), lambda: _deepest(host, size))


def _deepest(host: nn.Module, size: tuple[int, int, int]) -> str:
    names = candidate_layers(host, size)
    pooled = _pooled(host, names, size)
    deepest_first = names[::-1]
    reached: dict[str, float] = {}
    for name in sorted(deepest_first, key=pooled.__contains__):  # stable, with the pooled ones at the end
        try:
            site = resolve_site(host, name, size)
        except ValueError:  # its output holds no grid
            continue
        if site.reached >= ENOUGH:
            return site.name
        reached[site.name] = site.reached
    best = max(reached, key=lambda name: reached[name], default=None)
    told = "" if best is None else f" (at best {reached[best]:.0%}, at {best!r})"
    raise NotApplicable(
        f"no layer of this {type(host).__name__} has a spatial grid that the logits' gradient reaches in at least "
        f"{ENOUGH:.0%} of its positions{told}; name a layer"
    )


def _pooled(host: nn.Module, names: list[str], size: tuple[int, int, int]) -> set[str]:
    """Layers whose output comes straight from a pooling operation."""
    found: set[str] = set()

    def note(name: str, output: Any) -> None:
        if any(leaf.grad_fn is not None and "Pool" in leaf.grad_fn.name() for _, leaf in leaves(output)):
            found.add(name)

    x = probe_batch(host, 1, size).requires_grad_()
    with frozen(host), torch.enable_grad(), capture(host, names, once=False, at=note):
        run_host(host, x)
    return found


def cam_site(call: Call) -> Site:
    """The layer of this call, probed: what the user named, or `cam_layer`."""
    layer = cam_layer(call.model, call.input_size) if call.layer is None else call.layer
    return resolve_site(call.model, layer, call.input_size)


@dataclass(frozen=True)
class Glance:
    """What one pass showed at a site; tensors are detached, float32.

    Attributes:
        features: (B, C, h, w).
        gradient: of the target's logit with respect to the features, (B, C, h, w).
        target: class that is explained, (B,).
    """

    features: Tensor
    gradient: Tensor
    target: Tensor


def glance(call: Call) -> Glance:
    """Run the host once, and backward from the target's logit down to the site, no further.

    What lies before the site runs without autograd: one forward pass, and a backward pass through the part behind the
    site only.

    Raises:
        ValueError: the user named a layer whose grid the logits do not read.
    """
    site = cam_site(call)
    if site.reached == 0:
        raise ValueError(
            f"the logits' gradient does not reach the grid of layer {site.name!r}; name an earlier layer, such as "
            f"{cam_layer(call.model, call.input_size)!r}"
        )
    seen = observe(call.model, site, call.x, call.target, gradient=True, score=target_scores)
    assert seen.gradient is not None
    return Glance(seen.features.float(), seen.gradient.float(), seen.target)


def grid_features(call: Call, site: Site) -> Tensor:
    """Features (B, C, h, w) at a site, float32; the host runs only up to there."""
    with torch.no_grad(), capture(call.model, [site.name], stop=True) as seen:
        run_host(call.model, call.x)
    return site.layout.to_grid(seen[site.name]).float()


def grid_and_classes(call: Call, site: Site) -> tuple[Tensor, Tensor]:
    """Features (B, C, h, w) at a site, float32, and the classes (B,) that are explained, from one forward pass."""
    # In-place operations behind the layer write into what it returned: the host goes on with a copy.
    with torch.no_grad(), capture(call.model, [site.name], at=lambda _name, o: map_tensors(o, Tensor.clone)) as seen:
        logits = run_host(call.model, call.x)
    return site.layout.to_grid(seen[site.name]).float(), resolve_target(call.target, logits)
