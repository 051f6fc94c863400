"""What a bottleneck's map may say (bits, attention, relevance), and from the grid to the images' size."""

from __future__ import annotations

from torch import Tensor

from ib_explain.bottleneck.gates import GATES
from ib_explain.bottleneck.module import Bottleneck, Restriction
from ib_explain.checks import did_you_mean
from ib_explain.lattice import attention_without_lattice, without_lattice
from ib_explain.maps import spread, spread_signed, with_sums
from ib_explain.observation import Observation
from ib_explain.places import Place

__all__ = ["OUTPUTS", "bits_map", "check_output", "relevance_map"]

OUTPUTS = {"bits": "bits", "attention": "attention", "relevance": "label bits"}  # with their units


def check_output(output: str, gate: str, *, relevance: bool) -> None:
    """Refuse an output that a gate does not give, or "relevance" where that was not learned.

    Raises:
        ValueError: no such gate or output (with the nearest names), or none that this gate gives.
    """
    if output not in OUTPUTS:
        raise ValueError(f"unknown output {output!r}{did_you_mean(str(output), OUTPUTS)}")
    if output == "bits" and not GATES.get(gate).measures_bits:
        raise ValueError(f"the {gate!r} gate passes everything, so it has no bits; use output='attention'")
    if output == "relevance" and not relevance:
        raise ValueError("relevance is learned in a fit: IBAttention(model, relevance=True).fit(data)")


def bits_map(
    restriction: Restriction, seen: Observation, attention: Tensor, place: Place, size: tuple[int, int]
) -> Tensor:
    """The bits that pass, brought to the images' size; the lattice of the host's strides is no part of them."""
    bits = restriction.bits(seen, attention).clamp_min(0)
    if place.strided:
        even = restriction.bits(seen, attention_without_lattice(attention)).clamp_min(0)
        bits = with_sums(even, bits.sum(dim=(1, 2, 3)))
    return spread(bits, size)


def relevance_map(bottleneck: Bottleneck, seen: Observation, place: Place, size: tuple[int, int]) -> Tensor:
    """The label bits of each position, brought to the images' size."""
    brought = bottleneck.label_bits(seen)
    return spread_signed(without_lattice(brought) if place.strided else brought, size)
