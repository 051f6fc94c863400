"""The lattice of a host's strides goes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ib_explain.lattice import OPEN, attention_without_lattice, without_lattice

SIDES = [(2, 2), (3, 5), (4, 4), (7, 8), (16, 16), (28, 9)]


def lattices(height: int, width: int) -> Tensor:
    """Every second row, every second column, and both, of mean 0 up to an odd side: (3, 1, height, width)."""
    rows, columns = (1 - 2.0 * (torch.arange(extent) % 2) for extent in (height, width))
    both = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width), rows[:, None] * columns])
    return both[:, None] - both.mean(dim=(1, 2))[:, None, None, None]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sides", SIDES)
def test_a_lattice_goes_wherever_it_starts(sides):
    for sign in (1, -1):
        even = without_lattice(3 + sign * lattices(*sides))
        torch.testing.assert_close(even, torch.full_like(even, 3.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sides", [*SIDES, (1, 1), (1, 6)])
def test_a_constant_and_the_sum_stay(sides):
    values = random(2, 1, *sides)
    torch.testing.assert_close(without_lattice(values).sum((2, 3)), values.sum((2, 3)), rtol=1e-5, atol=1e-4)
    constant = torch.full((1, 1, *sides), -7.0)
    torch.testing.assert_close(without_lattice(constant), constant, rtol=0, atol=1e-4)


def test_a_row_of_positions_has_no_lattice_across():
    values = random(1, 1, 1, 8)
    torch.testing.assert_close(without_lattice(values), without_lattice(values.mT).mT)
    torch.testing.assert_close(without_lattice(values[..., :1]), values[..., :1])


def test_what_goes_is_what_the_windows_mean_of_the_signed_values_tells():
    """A literal re-derivation on one axis, in the middle of a long grid; up to the constant that keeps the sum."""
    line, at = random(61), torch.arange(61)
    signs = 1 - 2.0 * (at % 2)
    expected = []
    for here in (29, 30, 31):
        window = torch.exp(-0.5 * ((at - here) / 2.0) ** 2)
        expected.append(line[here] - signs[here] * (window * signs * line).sum() / window.sum())
    even = without_lattice(line.expand(1, 1, 61, 61))[0, 0, 30, 29:32]  # the same in every row
    expected = torch.stack(expected)
    torch.testing.assert_close(even - even.mean(), expected - expected.mean(), rtol=1e-4, atol=1e-4)


def test_smooth_values_and_specks_stay():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    smooth = (torch.sin(rows / 3) + torch.cos(columns / 4))[None, None]
    torch.testing.assert_close(without_lattice(smooth)[..., 3:-3, 3:-3], smooth[..., 3:-3, 3:-3], rtol=0, atol=0.02)
    speck = torch.zeros(1, 1, 16, 16)
    speck[..., 8, 8] = 1
    assert without_lattice(speck)[0, 0, 8, 8] > 0.85


def test_attention_that_is_wide_open_or_closed_stays_so():
    ends = torch.zeros(1, 1, 12, 12)
    ends[..., :6] = 1
    even = attention_without_lattice(ends)
    assert (even[..., :6] > 0.95).all() and (even[..., 6:] < 0.001).all()
    everywhere = torch.tensor([0.0, 0.998, 1.0])[:, None, None, None].expand(3, 1, 5, 5)
    expected = torch.tensor([0.0, OPEN, OPEN])[:, None, None, None].expand(3, 1, 5, 5)
    torch.testing.assert_close(attention_without_lattice(everywhere), expected, rtol=0, atol=1e-5)


def test_dots_of_a_half_open_attention_go():
    dotted = (0.4 + lattices(12, 12)).sigmoid()
    torch.testing.assert_close(attention_without_lattice(dotted), torch.tensor(0.4).sigmoid().expand_as(dotted))


def test_precision_under_autocast():
    values = random(2, 1, 14, 14)
    expected = without_lattice(values)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(without_lattice(values), expected, rtol=0, atol=0)
