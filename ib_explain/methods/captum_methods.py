"""Captum's methods of the input behind this package's contract: one map an image, the same in any batch.

Gradients and rules are Captum's (arXiv 2009.07896); random draws are made here, one for all images, because Captum
draws from global generators by batch. Where a method gives a value for each colour channel, the class says how they
become one. All explain the target's logit and take no layer, except `guided_grad_cam`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ib_explain.checks import check_images, check_number, check_positive_int
from ib_explain.maps import resize
from ib_explain.methods.base import Call, NotApplicable, check_reference, register_method
from ib_explain.methods.cam import glance
from ib_explain.methods.captum_host import for_captum, inspect, run_differentiably
from ib_explain.methods.captum_rules import PROPAGATED, check_deep_lift, check_guided, check_lrp
from ib_explain.methods.grad_cam import grad_cam_map
from ib_explain.randomness import generator_of, normal, uniform

__all__ = ["DeepLift", "FeatureAblation", "GradientShap", "GuidedGradCAM", "InputXGradient", "IntegratedGradients"]
__all__ += ["LRP", "Occlusion", "Saliency", "SmoothGrad"]


@register_method("saliency")
@dataclass(frozen=True)
class Saliency:
    """Saliency: largest absolute gradient over the colour channels (Simonyan et al. 2014, arXiv 1312.6034).

    Non-negative. One forward and one backward pass, and a forward pass before them where no class is given.
    """

    unit: ClassVar[str] = "gradient"

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("saliency")
        return _gradient(call, call.x, call.classes()).abs().amax(dim=1, keepdim=True)


@register_method("input_x_gradient")
@dataclass(frozen=True)
class InputXGradient:
    """Input x gradient: first-order share of the logit, summed over colours (Shrikumar et al. 2016, arXiv 1605.01713).

    Signed; positive values speak for the target. One forward and one backward pass, and a forward pass before them
    where no class is given.
    """

    unit: ClassVar[str] = "logit"

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import InputXGradient as Peer

        call.refuse_layer("input_x_gradient")
        classes = call.classes()
        with for_captum(call.model) as host:
            return _sum(Peer(_forward(host)).attribute(call.x.detach().clone(), target=classes))


@register_method("integrated_gradients")
@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients from the mean colour (Sundararajan et al. 2017, arXiv 1703.01365).

    Signed; sums over pixels to logit(x) - logit(0). `steps` forward and backward passes.

    Attributes:
        steps: points of the Gauss-Legendre rule.
    """

    unit: ClassVar[str] = "logit"
    steps: int = 50

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import IntegratedGradients as Peer

        call.refuse_layer("integrated_gradients")
        classes = call.classes()
        rows = call.copies_per_pass * len(call.x)
        with for_captum(call.model) as host:
            peer = Peer(_forward(host))
            x = call.x.detach().clone()
            return _sum(peer.attribute(x, target=classes, n_steps=self.steps, internal_batch_size=rows))


@register_method("smooth_grad")
@dataclass(frozen=True)
class SmoothGrad:
    """SmoothGrad: mean gradient over noisy images, absolute, summed over colours (Smilkov et al. 2017, 1706.03825).

    Non-negative. `samples` forward and backward passes; all images see the same noise, scaled to each one's range.

    Attributes:
        samples: noisy copies of each image.
        noise: standard deviation as a share of the image's range of values; the paper advises .1 to .2.
    """

    unit: ClassVar[str] = "gradient"
    samples: int = 50
    noise: float = 0.15

    def __post_init__(self) -> None:
        check_positive_int(self.samples, "samples")
        check_number(self.noise, "noise", at_least=0)

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("smooth_grad")
        reach = call.x.amax(dim=(1, 2, 3), keepdim=True) - call.x.amin(dim=(1, 2, 3), keepdim=True)
        total, classes = torch.zeros_like(call.x, dtype=torch.float32), call.classes()
        for draws in _noise(call, self.samples):
            noisy = call.x[None] + draws[:, None] * (self.noise * reach)  # (n, B, 3, H, W)
            gradient = _gradient(call, noisy.flatten(0, 1), classes.repeat(len(draws)))
            total += gradient.unflatten(0, (len(draws), -1)).sum(dim=0)
        return (total / self.samples).abs().sum(dim=1, keepdim=True)


@register_method("gradient_shap")
@dataclass(frozen=True)
class GradientShap:
    """GradientSHAP: gradients at random points between noisy image and baseline (Lundberg and Lee 2017, 1705.07874).

    Signed; sums over pixels to about logit(x) - logit(baseline). `samples` forward and backward passes; all images see
    the same draws.

    Attributes:
        samples: random points.
        noise: standard deviation added to the image, in normalised units.
        baselines: images (N, 3, H, W) that the draws choose from; None is the mean colour.
    """

    unit: ClassVar[str] = "logit"
    samples: int = 50
    noise: float = 0.09
    baselines: Tensor | None = None

    def __post_init__(self) -> None:
        check_positive_int(self.samples, "samples")
        check_number(self.noise, "noise", at_least=0)
        check_reference(self.baselines, "baselines")

    def __call__(self, call: Call) -> Tensor:
        call.refuse_layer("gradient_shap")
        baselines = torch.zeros_like(call.x[:1])
        if self.baselines is not None:
            baselines = check_images(self.baselines, size=call.input_size, name="baselines").to(call.x)
        generator = generator_of(call.seed)
        where = uniform(generator, self.samples).to(call.x)
        which = torch.randint(len(baselines), (self.samples,), generator=generator, device="cpu").to(call.x.device)
        total, classes, start = torch.zeros_like(call.x, dtype=torch.float32), call.classes(), 0
        for draws in _noise(call, self.samples):
            part = slice(start, start := start + len(draws))
            base = baselines[which[part], None]  # (n, 1, 3, H, W)
            noisy = call.x[None] + self.noise * draws[:, None]
            points = base + where[part, None, None, None, None] * (noisy - base)
            gradient = _gradient(call, points.flatten(0, 1), classes.repeat(len(draws)))
            total += (gradient.unflatten(0, (len(draws), -1)) * (noisy - base)).sum(dim=0)
        return (total / self.samples).sum(dim=1, keepdim=True)


@register_method("guided_grad_cam")
@dataclass(frozen=True)
class GuidedGradCAM:
    """Guided Grad-CAM: Grad-CAM times guided backpropagation, summed over colours (Selvaraju et al. 2017).

    Signed as guided backpropagation is. Two forward and two backward passes; needs nn.ReLU modules. The default layer
    is `cam_layer`. It reacts little to the host's upper weights (Adebayo et al. 2018, arXiv 1810.03292).
    """

    unit: ClassVar[str] = "gradient^2 x feature"

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import GuidedBackprop

        check_guided(call.model, inspect(call.model, call.x))
        seen = glance(call)
        with for_captum(call.model) as host:
            guided = GuidedBackprop(host).attribute(call.x.detach().clone(), target=seen.target)
        cam = resize(grad_cam_map(seen.features, seen.gradient).clamp_min(0), call.size)
        return _sum(guided) * cam


@register_method("deep_lift")
@dataclass(frozen=True)
class DeepLift:
    """DeepLIFT, rescale rule, against the mean colour (Shrikumar et al. 2017, arXiv 1704.02685).

    Signed; sums over pixels to logit(x) - logit(0). Two forward passes and one backward pass of twice the rows (two
    for a batch size of one). Needs activations that Captum has rules for, as modules (ReLU, ELU, sigmoid, max pooling
    ...); modules that run several times meet a copy of their own in each call.
    """

    unit: ClassVar[str] = "logit"

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import DeepLift as Peer

        call.refuse_layer("deep_lift")
        structure = inspect(call.model, call.x)
        check_deep_lift(call.model, structure)
        classes, rows = call.classes(), max(1, call.copies_per_pass * len(call.x) // 2)
        eps = max(1e-10, torch.finfo(call.x.dtype).tiny)  # Captum's own is zero in half precision
        maps = []
        with for_captum(call.model, structure.calls) as host:
            for x, target in zip(call.x.split(rows), classes.split(rows), strict=True):
                maps.append(_sum(Peer(host, eps=eps).attribute(x.detach().clone(), target=target)))
        return torch.cat(maps)


@register_method("lrp")
@dataclass(frozen=True)
class LRP:
    """LRP, epsilon rule in every layer (Bach et al. 2015, doi 10.1371/journal.pone.0130140).

    Signed; positive values speak for the target. Two forward passes and one backward pass. Only for hosts that are a
    chain of modules which Captum has rules for: a sum of two branches outside a module has none.
    """

    unit: ClassVar[str] = "logit"

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import LRP as Peer

        call.refuse_layer("lrp")
        structure = inspect(call.model, call.x)
        check_lrp(call.model, structure)
        if call.x.dtype == torch.float16:
            raise NotApplicable("LRP's epsilon, 1e-9, is zero in float16; explain a float32 copy of the model")
        classes = call.classes()
        # Captum's LRP writes weights and puts them back: into a copy, since a graph of the user may hold the host's.
        twin, calls = copy.deepcopy((call.model, structure.calls))
        with for_captum(twin, calls) as host:
            peer = Peer(host)
            # Captum refuses a host for an nn.Identity or nn.Flatten, in which nothing happens: show it the others.
            peer._get_layers = lambda model: peer.layers.extend(m for m in model.modules() if type(m) in PROPAGATED)
            return _sum(peer.attribute(call.x.detach().clone(), target=classes))


@register_method("occlusion")
@dataclass(frozen=True)
class Occlusion:
    """Occlusion: fall of the logit under a sliding square of mean colour (Zeiler and Fergus 2014, arXiv 1311.2901).

    Signed; positive where covering the pixel hurts the target, the mean over the squares that cover it. One forward
    pass for each square: 729 with the default sizes.

    Attributes:
        window: side of the square in pixels; None is a fourteenth of the image's shorter side (16 for 224).
        stride: pixels between two squares; None is half a window.
    """

    unit: ClassVar[str] = "logit per square"
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "stride"):
            if getattr(self, name) is not None:
                check_positive_int(getattr(self, name), name)
        if self.window and self.stride:
            self._check_stride(self.stride, self.window)

    @staticmethod
    def _check_stride(stride: int, window: int) -> None:
        if stride > window:
            raise ValueError(f"stride must be at most the window of {window} pixels, or pixels are left out: {stride}")

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import Occlusion as Peer

        call.refuse_layer("occlusion")
        window = _tile(call, self.window)
        stride = self.stride or max(1, window // 2)
        self._check_stride(stride, window)
        classes, channels = call.classes(), int(call.x.shape[1])
        with for_captum(call.model) as host:
            maps = Peer(_forward(host)).attribute(
                call.x.detach().clone(),
                target=classes,
                sliding_window_shapes=(channels, window, window),
                strides=(channels, stride, stride),
                perturbations_per_eval=call.copies_per_pass,
            )
        return maps.float().mean(dim=1, keepdim=True)  # a square covers all channels, each is given its whole fall


@register_method("feature_ablation")
@dataclass(frozen=True)
class FeatureAblation:
    """Feature ablation: fall of the logit when one square tile takes the mean colour, tile by tile.

    Signed; positive where removing the tile hurts the target. One forward pass for each tile, 196 by default, and one
    of the intact image.

    Attributes:
        tile: side of a tile in pixels; None is a fourteenth of the image's shorter side (16 for 224).
    """

    unit: ClassVar[str] = "logit per tile"
    tile: int | None = None

    def __post_init__(self) -> None:
        if self.tile is not None:
            check_positive_int(self.tile, "tile")

    def __call__(self, call: Call) -> Tensor:
        from captum.attr import FeatureAblation as Peer

        call.refuse_layer("feature_ablation")
        tile = _tile(call, self.tile)
        rows, columns = (torch.arange(n, device=call.x.device) // tile for n in call.size)
        mask = rows[:, None] * (int(columns[-1]) + 1) + columns  # (H, W), tiles numbered from 0
        classes = call.classes()
        with for_captum(call.model) as host:
            maps = Peer(_forward(host)).attribute(
                call.x.detach().clone(),
                target=classes,
                feature_mask=mask.expand(1, int(call.x.shape[1]), -1, -1),
                perturbations_per_eval=call.copies_per_pass,
            )
        return maps.float().mean(dim=1, keepdim=True)  # a tile holds all channels, each is given its whole fall


def _gradient(call: Call, x: Tensor, classes: Tensor) -> Tensor:
    """Gradient of each row's logit with respect to the row, float32."""
    from captum.attr import Saliency as Peer

    with for_captum(call.model) as host:
        peer = Peer(_forward(host))
        return peer.attribute(x.detach().clone(), target=classes, abs=False).detach().float()


def _forward(host: nn.Module) -> Callable[[Tensor], Tensor]:
    """The host, its logits checked."""
    return lambda x: run_differentiably(host, x)


def _noise(call: Call, samples: int) -> Iterator[Tensor]:
    """Standard normal draws (n, 3, H, W), as many as fit into one pass; each draw has a seed of its own."""
    for start in range(0, samples, call.copies_per_pass):
        draws = []
        for index in range(start, min(samples, start + call.copies_per_pass)):
            generator = generator_of(call.seed * 1_000_003 + index, call.x.device)
            draws.append(normal(generator, *call.input_size).to(call.x))
        yield torch.stack(draws)


def _sum(attributions: Any) -> Tensor:
    return attributions.detach().float().sum(dim=1, keepdim=True)


def _tile(call: Call, side: int | None) -> int:
    return min(side or max(1, min(call.size) // 14), min(call.size))
