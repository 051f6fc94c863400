"""RISE: the masks' law, the closed form of a linear model, the paper's own procedure written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ib_explain as ibx
from ib_explain.methods.rise import RISE
from ib_explain.perturb import rise_masks


class Corner(nn.Module):
    """Class 0 becomes more likely with the brightness of the upper left quarter."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, 0, :8, :8].mean(dim=(1, 2))
        return torch.stack([score, torch.zeros_like(score)], dim=1)


def test_masks_against_the_authors_procedure() -> None:
    """Upsample with scikit-image's bilinear rule, crop at the shift: written out one mask at a time."""
    from skimage import transform

    cells = torch.rand(5, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    shifts = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    size, cell = (32, 46), (5, 7)
    masks = rise_masks(cells, shifts, size)
    for index in range(5):
        fine = transform.resize(
            cells[index].float().numpy(), (8 * cell[0], 8 * cell[1]), order=1, mode="reflect", anti_aliasing=False
        )
        y, x = (int(s * c) for s, c in zip(shifts[index].tolist(), cell, strict=True))
        np.testing.assert_allclose(masks[index].numpy(), fine[y : y + 32, x : x + 46], atol=1e-5)


def test_masks_show_every_pixel_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(4000, 7, 7, generator=generator) < 0.5
    masks = rise_masks(cells, torch.rand(4000, 2, generator=generator), (28, 28))
    assert masks.min() >= 0
    assert masks.max() <= 1
    torch.testing.assert_close(masks.mean(dim=0), torch.full((28, 28), 0.5), rtol=0, atol=0.04)


def test_definition() -> None:
    """S = sum_i p(x * M_i) M_i / (N keep), literally."""
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 4
    heat = ibx.attribute(Corner(), x, method="rise", target=0, masks=30, cells=3, keep=0.4, seed=5)
    generator = torch.Generator().manual_seed(5)
    cells = torch.rand(30, 3, 3, generator=generator) < 0.4
    masks = rise_masks(cells, torch.rand(30, 2, generator=generator), (16, 16))
    expected = torch.zeros(2, 16, 16)
    for mask in masks:
        expected += Corner()(x * mask).softmax(dim=1)[:, 0, None, None] * mask
    torch.testing.assert_close(heat[:, 0], expected / 30 / 0.4)


def test_finds_the_corner() -> None:
    heat = ibx.attribute(Corner(), torch.full((1, 3, 16, 16), 3.0), method="rise", target=0, masks=500, cells=2)
    assert heat[0, 0, 2:6, 2:6].mean() > heat[0, 0, 9:, 9:].mean() + 0.05


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="keep must lie between 0 and 1, got 1"):
        RISE(keep=1)
    with pytest.raises(ValueError, match="masks must be an integer >= 1, got 0"):
        RISE(masks=0)
    with pytest.raises(ValueError, match="method 'rise' takes no layer, got 'a'"):
        ibx.attribute(Corner(), torch.rand(1, 3, 16, 16), method="rise", layer="a", masks=1)
