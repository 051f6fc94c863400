"""Where the spatial grid sits in a layer's output, found by rule and verified by a probe; no table of model names.

Stripes of the input are exchanged one at a time, and the positions of the output that answer to a stripe tell where
they look. `ib_explain.readings` says which reading of the output that speaks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_explain.hooks import capture
from ib_explain.layouts import Layout, leaves
from ib_explain.lending import frozen, run_host
from ib_explain.modules import host_device, on_host
from ib_explain.randomness import generator_of, normal
from ib_explain.readings import CERTAIN, FEW, STRIPES, Reader, choose

__all__ = ["find_layouts", "probe_batch", "probe_images"]


def probe_images(count: int, size: tuple[int, int, int], seed: int) -> Tensor:
    """Smooth multi-scale noise of unit variance, (count, C, H, W) float32: it excites every scale and no class."""
    generator = generator_of(seed)
    channels, height, width = size
    image = torch.zeros(count, channels, height, width, dtype=torch.float32, device="cpu")
    for octave in range(6):
        h, w = min(height, 2 ** (octave + 2)), min(width, 2 ** (octave + 2))
        coarse = normal(generator, count, channels, h, w)
        image += F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return image / image.std(dim=(1, 2, 3), keepdim=True)


def find_layouts(
    model: nn.Module, names: Iterable[str], input_size: tuple[int, int, int], args: tuple[Any, ...] = ()
) -> dict[str, Layout | str]:
    """Find the layout of each layer's output, for inputs of one size.

    Runs 21 images in two forward passes for all layers together, 42 in four where the first draw leaves a doubt.

    Args:
        model: the host.
        names: layers by dotted name.
        input_size: (3, H, W).
        args: further arguments of the host's forward.

    Returns:
        For each name a `Layout`, or a sentence that says why its output is no grid.

    Raises:
        ValueError: a model on the meta device.
    """
    if host_device(model).type == "meta":
        raise ValueError("model is on the meta device: it has shapes and no values to measure; load its weights first")
    results: dict[str, Layout | str] = {}
    readers: dict[str, list[Reader]] = {}
    open_names = list(names)
    for draw in range(2):
        if not open_names:
            break
        for name, fresh in _probe(model, open_names, input_size, draw, args).items():
            # By path: a leaf that one draw does not move, such as a flag, has no reader of that draw.
            known = {reader.path: reader for reader in readers.get(name, [])}
            for reader in fresh:
                if reader.path in known:
                    known[reader.path].add(reader)
                else:
                    known[reader.path] = reader
            readers[name] = list(known.values())
            results[name] = choose(readers[name], input_size)
        open_names = [n for n in open_names if not (isinstance(r := results[n], Layout) and r.score >= CERTAIN)]
    return results


def _probe(
    model: nn.Module, names: list[str], input_size: tuple[int, int, int], draw: int, args: tuple[Any, ...]
) -> dict[str, list[Reader]]:
    """One draw of the stripe probe: for each layer's leaves, the change of every element under every stripe."""
    _, height, width = input_size
    base, other = probe_images(2, input_size, seed=1000 + draw)
    images = [base]
    for axis, extent in ((1, height), (2, width)):
        cuts = [round(k * extent / STRIPES) for k in range(STRIPES + 1)]
        for low, high in itertools.pairwise(cuts):
            stripe = base.clone()
            stripe.narrow(axis, low, high - low).copy_(other.narrow(axis, low, high - low))
            images.append(stripe)
    batch = torch.stack(images)
    few: dict[str, list[tuple[tuple[int | str, ...], Tensor]]] = {}
    found: dict[str, list[Reader]] = {}

    def keep(name: str, output: Any) -> None:
        few[name] = [(path, leaf.clone()) for path, leaf in leaves(output)]

    def read(name: str, output: Any) -> None:
        pairs = zip(few[name], leaves(output), strict=True)
        found[name] = [r for (path, start), (_, rest) in pairs if (r := Reader.for_leaf(path, start, rest))]

    with frozen(model) as host, torch.no_grad():
        batch = on_host(batch, host)
        # Two passes of different length: the axis whose size follows the number of images is the batch's. Layers that
        # run twice are refused where one is resolved; here the first output serves.
        with capture(host, names, at=keep, once=False, stop=True):
            run_host(host, batch[:FEW], args)
        with capture(host, names, at=read, once=False, stop=True):
            run_host(host, batch[FEW:], args)
    return found


def probe_batch(model: nn.Module, count: int, size: tuple[int, int, int]) -> Tensor:
    """`probe_images` on the model's device, in its precision."""
    return on_host(probe_images(count, size, seed=0), model)
