"""One clean pass of the host, and all that an attention may read from it.

The part before the site runs without autograd; with `gradient=True` the part behind it records its graph, and one
backward pass gives the target's gradient at the site and at the deeper layers that are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.hooks import capture
from ib_explain.layouts import Layout, map_tensors
from ib_explain.lending import run_host
from ib_explain.sites import Site
from ib_explain.tails import Tail, TailRecorder
from ib_explain.targets import Target, resolve_target, target_scores

__all__ = ["Observation", "log_odds", "observe"]


@dataclass
class Observation:
    """What a clean pass showed; every tensor is detached.

    Attributes:
        logits: (B, K).
        target: class that is explained, (B,).
        output: what the site's layer returned.
        features: the site's grid, (B, C, h, w).
        deep: grids of the deeper layers, each (B, C', h', w').
        gradient: of the target's score at the site, (B, C, h, w), or None.
        deep_gradients: the same at the deeper layers; empty without gradient.
        tail: runs the part of the host behind the site on these images.
    """

    logits: Tensor
    target: Tensor
    output: Any
    features: Tensor
    deep: list[Tensor]
    gradient: Tensor | None
    deep_gradients: list[Tensor]
    tail: Tail


def observe(
    host: nn.Module,
    site: Site,
    x: Tensor,
    target: Target | Callable[[Tensor], Tensor] = None,
    *,
    deeper: Sequence[tuple[str, Layout]] = (),
    gradient: bool = False,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
    args: tuple[Any, ...] = (),
) -> Observation:
    """Run the frozen host once on `x` and collect what the attention reads.

    Args:
        host: the host, frozen by the caller.
        site: where the bottleneck sits.
        x: images (B, 3, H, W).
        target: as in `resolve_target`, or a function of the logits that returns the classes (B,).
        deeper: further layers to read, with their layouts.
        gradient: also read the gradient of the score.
        score: of logits (B, K) and classes (B,), (B,); None for `log_odds`.
        args: further arguments of the host's forward.

    Returns:
        Tensors without graphs.

    Raises:
        LayerError: a layer that does not run, or runs twice.
        Unfit: no logits (B, K) came out.
        LayoutChanged: a layer returned other shapes than its layout has.
        TypeError, ValueError, IndexError: as `resolve_target`.
    """
    layouts = {site.name: site.layout, **dict(deeper)}
    kept: dict[str, Any] = {}
    leaf: Tensor | None = None

    def at(name: str, output: Any) -> Any:
        nonlocal leaf
        if name == site.name:
            kept[name] = map_tensors(output, Tensor.detach)
            if gradient:
                leaf = site.layout.to_grid(kept[name]).detach().requires_grad_()
                with torch.enable_grad():
                    return site.layout.with_grid(kept[name], leaf.clone())
        else:
            layouts[name].to_grid(output)  # refuses what does not fit
            kept[name] = layouts[name].tensor(output)
        # In-place operations behind a layer write into what it returned: the host goes on with a copy.
        return map_tensors(output, Tensor.clone)

    recorder = TailRecorder(host, site.name) if site.skippable else contextlib.nullcontext()
    # From the first layer on, since a host with a no_grad block of its own goes back to what was there before the
    # block. Up to the site nothing is recorded: neither the images nor the frozen parameters want gradients.
    with torch.set_grad_enabled(gradient):
        with capture(host, layouts, at=at), recorder:
            logits = run_host(host, x.detach(), args)
        classes = target(logits.detach()) if callable(target) else resolve_target(target, logits.detach())
        gradients: list[Tensor] = []
        if gradient and leaf is not None:
            inputs = [leaf, *(kept[name] for name, _ in deeper)]
            gradients = _gradients(logits, classes, score or log_odds, inputs)
    tail = recorder.tail(x, args) if isinstance(recorder, TailRecorder) else Tail(host, site.name, None, x, args)
    return Observation(
        logits=logits.detach(),
        target=classes,
        output=kept[site.name],
        features=site.layout.to_grid(kept[site.name]).detach(),
        deep=[layout.read(kept[name].detach()) for name, layout in deeper],
        gradient=gradients[0] if gradients else None,
        deep_gradients=[layout.read(g) for (_, layout), g in zip(deeper, gradients[1:], strict=False)],
        tail=tail,
    )


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """ln p_t - ln(1 - p_t) = z_t - logsumexp of the others: (B, K), (B,) -> (B,).

    Unlike ln p_t its gradient does not vanish where the host is certain; unlike z_t it tells the class from its rivals.
    """
    logits = logits.float()
    others = logits.scatter(1, classes[:, None], -torch.inf)
    own = target_scores(logits, classes)
    return own - others.logsumexp(dim=1) if logits.shape[1] > 1 else own


def _gradients(
    logits: Tensor, classes: Tensor, score: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    if not logits.requires_grad:  # nothing behind the site reads the grid
        return [torch.zeros_like(i) for i in inputs]
    with torch.enable_grad():
        total = score(logits.float(), classes).sum()
    reachable = [i for i in inputs if i.requires_grad]
    found = iter(torch.autograd.grad(total, reachable, allow_unused=True))
    return [torch.zeros_like(i) if not i.requires_grad or (g := next(found)) is None else g for i in inputs]
