"""The product's own method: information-bottleneck attention, optimised per image where nothing is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_explain.checks import check_images, check_positive_int
from ib_explain.hosts import channels_of
from ib_explain.ib import IBAttention
from ib_explain.methods.base import Call, check_reference, default_site, register_method
from ib_explain.outputs import check_output
from ib_explain.per_image import PerImageSettings

__all__ = ["PerImageIB"]


@register_method("ib")
@dataclass(frozen=True)
class PerImageIB:
    """Information-bottleneck attention optimised for each image, in bits (nothing fitted).

    Attributes:
        steps, lr, beta, copies: see `PerImageSettings`.
        gate: "gaussian" or "noise"; "residual" measures no bits and takes output="attention".
        reference: images (N, 3, H, W) for the features' statistics; best a few dozen training images. By default
            smooth noise: never the explained images, or their mean would leak past the bottleneck.
        output: "bits" or "attention".
    """

    unit: ClassVar[str] = "bits"
    resolves_target: ClassVar[bool] = True
    steps: int = PerImageSettings.steps
    lr: float = PerImageSettings.lr
    beta: float | None = PerImageSettings.beta
    copies: int = PerImageSettings.copies
    gate: str = "gaussian"
    reference: Tensor | None = None
    output: str = "bits"

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")
        self._settings(0)
        check_output(self.output, self.gate, relevance=False)
        check_reference(self.reference)

    def _settings(self, seed: int) -> PerImageSettings:
        return PerImageSettings(self.steps, self.lr, self.beta, self.copies, seed)

    def __call__(self, call: Call) -> Tensor:
        check_images(call.x, channels=channels_of(call.model), name="inputs")
        if call.layer is None:
            default_site(call.model, call.input_size)  # a host without one is no failure
        ib = IBAttention(call.model, call.layer, gate=self.gate, seed=call.seed)
        return ib.attribute_per_image(
            call.x, call.target, settings=self._settings(call.seed), reference=self.reference, output=self.output
        )
