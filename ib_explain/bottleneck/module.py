"""The bottleneck: attention network, gate, anchors and the statistics of what it restricts, in one nn.Module.

Its `state_dict` is the whole explainer. It knows no host and no hook: it gets an `Observation` and returns tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.bottleneck.anchors import Anchors
from ib_explain.bottleneck.attention import AttentionNetwork, NetworkInputs, RelevanceNetwork
from ib_explain.bottleneck.gates import GATES
from ib_explain.bottleneck.information import MOST_ATTENTION, energy
from ib_explain.layouts import Layout
from ib_explain.observation import Observation
from ib_explain.relevance import label_information
from ib_explain.statistics import Moments

__all__ = ["Attention", "Bottleneck", "Restriction", "empty_bottleneck"]


@dataclass
class Attention:
    """Attention of a batch: `mean` and `std` (B, 1, h, w); `value` is what the gate uses; `loss` the anchors' own."""

    mean: Tensor
    std: Tensor
    value: Tensor
    loss: Tensor


class Restriction(nn.Module):
    """A gate on the normalised grid of one site; what stands beside the grid is held at its mean.

    Args:
        gate: name in `GATES`.
        moments: statistics of the site's features.
        side: means of what stands beside the grid, as `Layout.side_of` lists it.
    """

    def __init__(self, gate: str, moments: Moments, side: list[Tensor]) -> None:
        super().__init__()
        self.gate = GATES.get(gate)()
        self.moments = Normaliser(moments)
        self._sides = len(side)
        for index, mean in enumerate(side):
            self.register_buffer(f"side_{index}", mean)

    def apply_to(self, seen: Observation, layout: Layout, attention: Tensor, noise: Tensor) -> Any:
        """The layer's output with its grid restricted.

        Args:
            seen: a clean pass.
            layout: of the site.
            attention: (B, 1, h, w) or broadcastable.
            noise: (B, C, h, w) or (1, C, h, w), N(0, 1).
        """
        mixed = self.gate.mix(self.moments(seen.features), attention, noise)
        side = [self.get_buffer(f"side_{index}") for index in range(self._sides)]
        return layout.with_grid(seen.output, self.moments.restore(mixed), side)

    def bits(self, seen: Observation, attention: Tensor) -> Tensor:
        """Bits that pass at every position, (B, 1, h, w)."""
        normalised = self.moments(seen.features)
        return self.gate.bits(attention, energy(normalised), normalised.shape[1])


class Normaliser(nn.Module):
    """Moments as buffers: features (B, C, h, w) -> (R - mean) / std in float32, and back."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.register_buffer("mean", moments.mean)
        self.register_buffer("std", moments.std)
        self.register_buffer("count", torch.tensor(moments.count, device="cpu"))

    def forward(self, features: Tensor) -> Tensor:
        return (features.float() - self.get_buffer("mean")) / self.get_buffer("std")

    def restore(self, normalised: Tensor) -> Tensor:
        """mean + std * r."""
        return torch.addcmul(self.get_buffer("mean"), self.get_buffer("std"), normalised)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to the features -> with respect to the normalised features."""
        return gradient.float() * self.get_buffer("std")


class Bottleneck(nn.Module):
    """An attention network and the restriction that it steers; its `state_dict` is the whole explainer.

    Args:
        restriction: of the site.
        deep_moments: statistics of each deeper layer that is read, per channel.
        gradient: whether the attention reads the target's gradient.
        classes: one row for each class (K, D), from which the class query is made; None with `gradient`.
        anchors: number of anchor values, 0 for none.
        relevance: the number of classes K for a bottleneck that also tells the label's information, 0 for one that
            does not.
    """

    def __init__(
        self,
        restriction: Restriction,
        deep_moments: list[Moments],
        *,
        gradient: bool,
        classes: Tensor | None,
        anchors: int = 0,
        relevance: int = 0,
    ) -> None:
        super().__init__()
        self.restriction = restriction
        self.deep = nn.ModuleList(Normaliser(m) for m in deep_moments)
        self.gradient = gradient
        channels = restriction.moments.get_buffer("mean").shape[1]
        width = 0 if classes is None else classes.shape[1]
        deep_channels = [m.mean.shape[1] for m in deep_moments]
        if classes is not None:
            rows = classes.detach().float()
            self.register_buffer("classes", (rows - rows.mean(dim=0)) / rows.std().clamp_min(1e-12))
        self.relevance = None
        with torch.device("cpu"), _in_float32():  # whatever torch's defaults are
            self.network = AttentionNetwork(channels, deep_channels, gradient=gradient, query_width=width)
            self.anchors = Anchors(anchors) if anchors else None
            if relevance:
                self.relevance = RelevanceNetwork(channels, deep_channels, gradient=gradient, query_width=width)
                # The fit fills them in: mean of ln p with nothing let through, and the label bits of a typical image.
                self.register_buffer("closed", torch.zeros(1, relevance))
                self.register_buffer("typical_bits", torch.ones(()))
        self.float()

    def attend(self, seen: Observation, noise: Tensor | None = None) -> Attention:
        """Attention for the observed images and their targets.

        Args:
            seen: a clean pass.
            noise: (B, 1, h, w), N(0, 1): A is sampled as mean + std * noise; None for the mean.
        """
        mean, std = self.network(self._read(seen))
        value = mean if noise is None else (mean + std * noise).clamp(0, MOST_ATTENTION)
        loss = mean.new_zeros(())
        if self.anchors is not None:
            value, loss = self.anchors(value)
        return Attention(mean, std, value, loss)

    def label_bits(self, seen: Observation) -> Tensor:
        """Bits about the target that each position brings, signed, (B, 1, h, w); see `ib_explain.relevance`.

        Their sum is what the host knows of the target, log2 p(target | x) - E log2 p(target | nothing).

        Raises:
            RuntimeError: built without relevance.
        """
        if self.relevance is None:
            raise RuntimeError("this bottleneck was built without relevance")
        total = label_information(seen.logits, self.get_buffer("closed"), seen.target)[:, None, None, None]  # (B,1,1,1)
        shares = self.relevance(self._read(seen)).float()  # (B, 1, h, w)
        shares = shares - shares.mean(dim=(2, 3), keepdim=True)
        return (total + shares * self.get_buffer("typical_bits")) / shares[0].numel()

    def _read(self, seen: Observation) -> NetworkInputs:
        """What the networks read of a clean pass, normalised."""
        site = self.restriction.moments
        deep = [m for m in self.deep if isinstance(m, Normaliser)]
        read = [m(d) for m, d in zip(deep, seen.deep, strict=True)]
        if self.gradient and seen.gradient is not None:
            deep_gradients = [m.of_gradient(g) for m, g in zip(deep, seen.deep_gradients, strict=True)]
            return NetworkInputs(site(seen.features), read, site.of_gradient(seen.gradient), deep_gradients, None)
        return NetworkInputs(site(seen.features), read, None, [], self.get_buffer("classes")[seen.target])


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def empty_bottleneck(
    tensors: dict[str, Tensor], *, gate: str, deeper: int, gradient: bool, anchors: int, relevance: bool
) -> Bottleneck:
    """Build a bottleneck of the shapes of stored tensors and fill it with them.

    Raises:
        KeyError, RuntimeError: tensors are missing, left over or of other shapes.
    """
    site, *deep = [
        Moments(tensors[f"{prefix}.mean"], tensors[f"{prefix}.std"], int(tensors[f"{prefix}.count"]))
        for prefix in ["restriction.moments", *(f"deep.{index}" for index in range(deeper))]
    ]
    sides = sum(name.startswith("restriction.side_") for name in tensors)
    restriction = Restriction(gate, site, [tensors[f"restriction.side_{index}"] for index in range(sides)])
    classes = None if gradient else tensors["classes"]
    count = tensors["closed"].shape[1] if relevance else 0
    bottleneck = Bottleneck(restriction, deep, gradient=gradient, classes=classes, anchors=anchors, relevance=count)
    bottleneck.load_state_dict(tensors)
    return bottleneck
