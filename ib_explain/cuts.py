"""How well a layer cuts, measured: what flows around its grid, what the grid alone carries, what the logits read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ib_explain.hooks import capture, on_own_level, registered
from ib_explain.layouts import Layout, map_tensors
from ib_explain.lending import frozen, run_host
from ib_explain.randomness import generator_of, normal
from ib_explain.statistics import RunningMoments
from ib_explain.stripes import probe_batch
from ib_explain.tails import Tail, TailRecorder

__all__ = ["ANSWERS_DIFFER", "CleanPass", "CutFigures", "answers_differ"]

PROBE_BATCH = 3
ANSWERS_DIFFER = "the model gives other logits each time for the same images, as with dropout in eval mode"


class CutFigures(NamedTuple):
    """See `ib_explain.sites.Site`."""

    leak: float
    effect: float
    reached: float
    pooled: bool
    skippable: bool


def answers_differ(host: nn.Module, size: tuple[int, int, int], args: tuple[Any, ...]) -> bool:
    """Whether the host draws random numbers: what differs between two of its passes then looks like a leak."""
    with frozen(host), torch.no_grad():
        x = probe_batch(host, PROBE_BATCH, size)
        first, second = run_host(host, x, args), run_host(host, x, args)
    return not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.float().std()))


class CleanPass:
    """One undisturbed pass over a few noise images: the outputs of some layers, and what comes of changing them."""

    def __init__(self, host: nn.Module, names: list[str], size: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        self.host, self.args = host, args
        with frozen(host), torch.no_grad(), contextlib.ExitStack() as stack:
            self.x = probe_batch(host, PROBE_BATCH, size)
            self.recorders = {name: stack.enter_context(TailRecorder(host, name)) for name in names}
            with capture(host, names, at=lambda _n, output: _copy(output)) as self.outputs:
                logits = run_host(host, self.x, args)
        if bad := int((~torch.isfinite(logits)).sum()):
            raise ValueError(f"model gives {bad} NaN or infinite logits for images of smooth noise")
        self.spread = _spread(logits)
        # Logits of a head of zeros, as torchvision's ViT is made with, tell nothing yet: what enters it does.
        self.head = None if self.spread > 0 else _zero_head(host, logits.shape[1])
        if self.head is not None:
            with frozen(host), torch.no_grad():
                entered = self._entering(lambda: run_host(host, self.x, args))
            self.spread = 0.0 if entered is None else _spread(entered)
            self.head = None if entered is None else self.head  # it does not run, or not as a module

    def effect(self, name: str, layout: Layout, tail: Tail | None = None) -> float:
        """Share of the logits' spread that is left when only the grid differs between images."""
        if not layout.has_side:
            return 1.0
        output = self.outputs[name]
        alone = layout.with_grid(output, layout.to_grid(output), self._held(name, layout))
        return self._share(self._run(tail or self._full(name), alone))

    def leak(self, name: str, layout: Layout) -> float:
        """Share of the logits' spread that is left when the grid is the same for all images and the rest is held."""
        return self._share(self._run(self._full(name), self._closed(name, layout)))

    def figures(self, name: str, layout: Layout) -> CutFigures:
        """Measure leak, effect and gradient of a layer, and whether what comes before it may be skipped."""
        closed, short = self._closed(name, layout), self.recorders[name].tail(self.x, self.args)
        blocked = self._run(self._full(name), closed)
        skippable = self._agrees(short, closed, blocked)
        tail = short if skippable else self._full(name)
        reached, pooled = self._reached_and_pooled(name, layout, tail)
        return CutFigures(self._share(blocked), self.effect(name, layout, tail), reached, pooled, skippable)

    def _held(self, name: str, layout: Layout) -> list[Tensor]:
        """Means over images of what stands beside the grid."""
        return [side.mean(dim=0, keepdim=True) for side in layout.side_of(self.outputs[name])]

    def _closed(self, name: str, layout: Layout) -> Any:
        """The layer's output with the same noise in every image's grid."""
        features = layout.to_grid(self.outputs[name])
        moments = RunningMoments()
        moments.update(features)
        noise = normal(generator_of(0), *features.shape[1:]).to(features.device)
        still = moments.result().to(features.device).restore(noise)  # (1, C, h, w)
        return layout.with_grid(self.outputs[name], still.repeat(len(self.x), 1, 1, 1), self._held(name, layout))

    def _full(self, name: str) -> Tail:
        return Tail(self.host, name, None, self.x, self.args)

    def _run(self, tail: Tail, output: Any) -> Tensor:
        with frozen(self.host), torch.no_grad():
            return self._said(lambda: tail(output))

    def _said(self, run: Callable[[], Tensor]) -> Tensor:
        """The logits that `run` gives, or what enters a head of zeros meanwhile, (B, K)."""
        if self.head is None:
            return run().float()
        entered = self._entering(run)
        assert entered is not None, "it ran in the first pass"
        return entered

    def _entering(self, run: Callable[[], Tensor]) -> Tensor | None:
        """What enters the head of zeros meanwhile, (B, D); None where it does not run once."""
        assert self.head is not None
        entered: list[Tensor] = []

        def look(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            entered.extend(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))

        with registered(partial(self.head.register_forward_pre_hook, on_own_level(look), with_kwargs=True)):
            run()
        return entered[0].float().flatten(1) if len(entered) == 1 else None

    def _share(self, logits: Tensor) -> float:
        return _spread(logits) / self.spread if self.spread > 0 else math.nan

    def _agrees(self, short: Tail, output: Any, expected: Tensor) -> bool:
        try:
            got = self._run(short, output)
        except (RuntimeError, ValueError, TypeError, StopIteration):
            return False  # the host reads what was skipped: its whole forward has to run each time
        return torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max().clamp_min(1e-6)))

    def _reached_and_pooled(self, name: str, layout: Layout, tail: Tail) -> tuple[float, bool]:
        """Share of the grid's positions that the logits' gradient reaches, and whether these are only averaged."""
        features = layout.to_grid(self.outputs[name]).detach()
        gradient = self._gradient(name, layout, tail, features)
        if gradient is None:
            return 0.0, False
        norms = gradient.norm(dim=1)
        reached = float((norms > 1e-6 * norms.max().clamp_min(1e-30)).float().mean())
        # A mean over positions gives all of them one gradient, whatever is made of the mean. What each position goes
        # through before it leaves its gradient as it is when others change: here, the right half to another image's.
        left = features.shape[-1] // 2
        other = torch.cat([features[..., :left], features.roll(1, 0)[..., left:]], dim=-1)
        again = self._gradient(name, layout, tail, other)
        alike = _close(gradient, gradient.mean(dim=(2, 3), keepdim=True).expand_as(gradient))
        return reached, alike or (again is not None and _close(gradient[..., :left], again[..., :left]))

    def _gradient(self, name: str, layout: Layout, tail: Tail, features: Tensor) -> Tensor | None:
        """Of a random mix of logits with respect to the grid, (B, C, h, w); None if nothing reaches it."""
        with frozen(self.host), torch.enable_grad():
            features = features.clone().requires_grad_()
            changed = layout.with_grid(self.outputs[name], features.clone(), self._held(name, layout))
            logits = self._said(lambda: tail(changed))
            if not logits.requires_grad:
                return None
            weights = normal(generator_of(1), *logits.shape).to(logits.device)
            try:
                (gradient,) = torch.autograd.grad((logits * weights).sum(), features, allow_unused=True)
            except RuntimeError as error:
                # The layer runs inside torch.utils.checkpoint, which ran it again without our change, or refuses.
                if isinstance(error, CheckpointError) or "use_reentrant" in str(error):
                    return None
                raise
        return None if gradient is None else gradient.float()


def _zero_head(host: nn.Module, classes: int) -> nn.Module | None:
    """The last linear layer with a row for each class, if all its weights are zero."""
    heads = [m for m in host.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == classes]
    return heads[-1] if heads and not heads[-1].weight.any() else None


def _close(one: Tensor, other: Tensor) -> bool:
    """The same up to rounding."""
    return float((one - other).norm()) <= 1e-3 * float(one.norm())


def _copy(output: Any) -> Any:
    """An in-place operation behind the layer writes into what it returned: hand the host a copy of its own."""
    return map_tensors(output, torch.Tensor.clone)


def _spread(logits: Tensor) -> float:
    """Mean distance between the logits of different images; 0 below rounding."""
    values = logits.cpu().double()  # in this order: not every device has float64
    mean = float(torch.pdist(values).mean())
    return mean if mean > 1e-6 * float(values.norm(dim=1).mean()) else 0.0
