"""The pattern that a host's strides leave on a grid, taken out: it tells of the host and not of the image.

A stride-2 layer reads some positions more than their neighbours (a 1x1 shortcut reads every second one only), so what a
host uses in front of it lies on a lattice of every second row, every second column or both. Such a lattice goes on in
step over many positions, as an edge or a speck of the image does not. So it is found as what is left when the values
are multiplied by its signs (+1, -1, +1, ...) and averaged over a window of some positions; with its signs again, that
much is taken away. Seen by frequency: soft notches at the ends of both axes and at the corner, all other detail stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attention_without_lattice", "without_lattice"]

WINDOW = 2.0  # positions: standard deviation of the Gaussian window
CLOSED, OPEN = 1e-6, 0.997  # attention below and above which nothing is told apart; .997 passes 3.7 bits a channel


def without_lattice(values: Tensor) -> Tensor:
    """Take the pattern of every second position out of values of either sign, (B, 1, h, w); each image's sum stays."""
    with torch.autocast(values.device.type, enabled=False):
        values = values.float()
        rows, columns = (_window(extent, values.device) for extent in values.shape[2:])
        both_rows, both_columns = rows + _signed(rows), columns + _signed(columns)
        even = values - (both_rows @ values @ both_columns.T - rows @ values @ columns.T)
    return even + (values - even).mean(dim=(2, 3), keepdim=True)


def attention_without_lattice(attention: Tensor) -> Tensor:
    """The same for attention in [0, 1], (B, 1, h, w), by its logit: what is wide open or closed stays so.

    Wide open is all the same: how near to 1 an attention came tells how sure the network is, and would draw peaks.
    """
    logit = attention.float().clamp(CLOSED, OPEN).logit()
    return without_lattice(logit).sigmoid().clamp_max(OPEN)


def _window(extent: int, device: torch.device) -> Tensor:
    """Gaussian means along an axis, (extent, extent), each row with a sum of 1.

    Beyond its ends the axis is mirrored, and the outermost positions not repeated: a lattice goes on in step.
    """
    at = torch.arange(extent, dtype=torch.float32, device=device)
    period = 2 * max(1, extent - 1)
    turns = math.ceil(4 * WINDOW / period)
    copies = period * torch.arange(-turns, turns + 1, dtype=torch.float32, device=device)
    inside = (at > 0) & (at < extent - 1)
    weights = _gauss((at[:, None] - at)[..., None] - copies).sum(dim=2)
    weights = weights + _gauss((at[:, None] + at)[..., None] - copies).sum(dim=2) * inside
    return weights / weights.sum(dim=1, keepdim=True)


def _gauss(distance: Tensor) -> Tensor:
    return torch.exp(-0.5 * (distance / WINDOW).square())


def _signed(window: Tensor) -> Tensor:
    """The same means of values whose signs alternate, with the signs given back; nothing on an axis of one position."""
    signs = 1 - 2 * (torch.arange(len(window), device=window.device) % 2).to(window.dtype)
    return signs[:, None] * window * signs if len(window) > 1 else torch.zeros_like(window)
