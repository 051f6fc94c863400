"""Forward passes of a host that run through a bottleneck."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.bottleneck.module import Restriction
from ib_explain.checks import check_images
from ib_explain.hooks import replace_output
from ib_explain.hosts import channels_of
from ib_explain.layouts import Layout
from ib_explain.lending import HostArgs
from ib_explain.modules import host_device
from ib_explain.observation import Observation
from ib_explain.randomness import generator_of, normal, random_state_kept

__all__ = ["Plan", "as_attention", "passes_restricted"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a restricted pass needs to know of its images.

    Attributes:
        restriction: what holds back.
        seen: the clean pass of these images.
        layout: of the site.
        attention: (B, 1, h, w), in [0, 1].
    """

    restriction: Restriction
    seen: Observation
    layout: Layout
    attention: Tensor

    def apply_to(self, output: Any, seed: int) -> Any:
        """Restrict the layer's output in a pass of the same images, with the graph that this pass has."""
        seen = dataclasses.replace(self.seen, output=output, features=self.layout.to_grid(output))
        noise = normal(generator_of(seed, self.attention.device), 1, *seen.features.shape[1:])
        restricted = self.restriction.apply_to(seen, self.layout, self.attention, noise)
        if not self.restriction.gate.measures_bits:
            return restricted
        # Gates stop short of 1, where a rate would be infinite; what is asked to pass whole passes whole.
        passes = torch.where(self.attention < 1, self.layout.to_grid(restricted), seen.features)
        return self.layout.with_grid(restricted, passes)


@contextlib.contextmanager
def passes_restricted(
    host: nn.Module, layer: Callable[[], str | None], plan: Callable[[Tensor, HostArgs], Plan], *, seed: int
) -> Iterator[None]:
    """While inside, the host's forward passes run through a bottleneck, with the mean attention and seeded noise.

    Args:
        host: the frozen host.
        layer: gives the name of the bottleneck's layer, which may first be known when images have come.
        plan: from the images of a pass and its further arguments; its own passes are not touched.
        seed: of the noise.

    Raises:
        TypeError: in a pass whose arguments are named.
    """
    plans: list[Plan] = []

    def prepare(inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not inputs or named:
            got = f"{len(inputs)} and by name {', '.join(named) or 'none'}"
            raise TypeError(f"call the restricted model with positional arguments, images first; got {got}")
        check_images(inputs[0], channels=channels_of(host), device=host_device(host), inference=True)
        args = HostArgs.of(tuple(inputs[1:]), len(inputs[0]))
        with random_state_kept(host_device(host)):
            plans[:] = [plan(inputs[0], args)]

    def edit(output: Any) -> Any:
        return plans[0].apply_to(output, seed)

    with replace_output(host, layer, edit, before=prepare):
        yield


def as_attention(attention: float | Tensor) -> Tensor:
    """A number or a tensor in [0, 1] as a float32 tensor; its shape is checked where the grid is known."""
    expected = "attention must be a number or a floating-point tensor (B, 1, h, w), in [0, 1]"
    if isinstance(attention, Tensor):
        if not attention.is_floating_point():
            raise TypeError(f"{expected}, got a tensor of {attention.dtype}")
        value = attention.detach().float()
    else:
        if isinstance(attention, bool) or not isinstance(attention, Real):
            raise TypeError(f"{expected}, got {attention!r}")
        value = torch.tensor(float(attention), dtype=torch.float32, device="cpu")
    if value.numel() == 0 or not ((value >= 0) & (value <= 1)).all():
        got = attention if value.numel() < 2 else f"{value.min():g} to {value.max():g}"
        raise ValueError(f"{expected}, got {got}")
    return value
