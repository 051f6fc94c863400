"""`attribute`: one door to every method. Checks the input, cuts it into chunks, asks for the maps of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ib_explain.checks import check_images, check_positive_int
from ib_explain.layouts import map_tensors
from ib_explain.lending import HostArgs, frozen, run_host
from ib_explain.methods.base import METHODS, Call
from ib_explain.modules import host_device
from ib_explain.progress import Progress
from ib_explain.randomness import check_seed, seeded
from ib_explain.refusals import refused_sizes_told
from ib_explain.runners import runner_of
from ib_explain.targets import Target, resolve_target, spread_target

__all__ = ["attribute", "available_methods"]


def attribute(
    model: nn.Module,
    x: Tensor,
    *,
    target: Target = None,
    method: Any = "ib",
    layer: str | nn.Module | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> Tensor:
    """Maps that tell where the evidence for a class is.

    Args:
        model: any nn.Module that maps (B, 3, H, W) to (B, K) logits; handed back exactly as it came.
        x: normalised images (B, 3, H, W) on the model's device.
        target: None for the model's own top-1, an int, a list or a 1-D integer tensor.
        method: a name from `available_methods()`, a fitted `IBAttention`, an object with Captum's
            `attribute(inputs, target=...)`, or a function f(model, x, target) -> (B, 1, H, W) or (B, H, W), or
            (B, C, H, W), whose channels are summed. Coarser grids, as of Captum's layer methods, are upsampled.
        layer: where the method looks; None for its own default.
        batch_size: images at a time; the maps do not depend on it, but those of a function of yours that draws random
            numbers.
        seed: of everything random in the method, also of what a function of yours draws from the global generators; an
            `IBAttention` has a seed of its own.
        show_progress: show how many images are done.
        **options: the chosen method's own; an unknown one is a TypeError that lists them.

    Returns:
        (B, 1, H, W) float32, detached, on x's device. For the default method non-negative, in bits.

    Raises:
        TypeError, ValueError, IndexError: in one line, what was expected and what came; a method whose maps hold NaN.
    """
    check_images(x, device=host_device(model))  # a TypeError for what is no model
    runner = runner_of(method, options, model)
    runner.refuse_layer(layer)
    seed = check_seed(seed)
    size = len(x) if batch_size is None else check_positive_int(batch_size, "batch_size")
    args = options.get("additional_forward_args") if runner.made_for is not None else None
    with (
        frozen(model) as host,
        seeded(seed),
        refused_sizes_told(host, tuple(x.shape[1:])),
        Progress(len(x), "attribute", show=show_progress) as progress,
    ):
        if target is not None:  # checked before anything is computed, by methods of one pass within that pass
            target = spread_target(target, len(x)).to(x.device)
            if not runner.resolves_target:
                with torch.no_grad():
                    classes = run_host(host, x[:1], HostArgs.of(args, len(x)).row(0)).shape[1]
                target = resolve_target(target, x.new_zeros(len(x), classes))
        maps = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = x[rows]
            chosen = None if target is None else target[rows]
            part_runner = runner
            if runner.made_for is not None:  # some of Captum's options hold a row for each image
                options_of_part = {name: _rows(name, value, x, rows) for name, value in options.items()}
                part_runner = runner_of(method, options_of_part, model)
            more = HostArgs.of(_rows("additional_forward_args", args, x, rows), len(part))
            maps.append(part_runner.maps(Call(host, part, chosen, layer, seed, batch_size, more)))
            progress.step(len(part))
    return torch.cat(maps)


def _rows(name: str, option: Any, x: Tensor, rows: slice) -> Any:
    """What belongs to these images of a Captum option that holds one row for each of all images."""
    if name == "additional_forward_args":
        return map_tensors(option, lambda t: t[rows] if t.ndim > 0 and len(t) == len(x) else t)
    if name in ("baselines", "feature_mask"):
        return map_tensors(option, lambda t: t[rows] if t.ndim == x.ndim and len(t) == len(x) else t)
    return option


def available_methods() -> dict[str, str]:
    """Every registered method with one line about it."""
    return METHODS.summaries()
