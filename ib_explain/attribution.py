"""`attribute`: one door to every method. Checks the input, cuts it into chunks, calls, checks what came out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ib_explain.checks import check_images, check_maps, check_positive_int, take_options
from ib_explain.facts import with_fresh_facts
from ib_explain.guard import unharmed
from ib_explain.layouts import map_tensors
from ib_explain.lending import HostArgs, frozen, run_host
from ib_explain.maps import resize
from ib_explain.methods.base import METHODS, Call
from ib_explain.modules import host_device, unwrap
from ib_explain.progress import Progress
from ib_explain.randomness import check_seed, seeded
from ib_explain.refusals import refused_sizes_told
from ib_explain.targets import Target, resolve_target, spread_target

__all__ = ["as_maps", "attribute", "available_methods", "check_host", "is_method", "method_runner", "run_method"]


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
        batch_size: images at a time; the maps do not depend on it.
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
    if layer is not None and not isinstance(method, str) and not is_method(method):
        raise TypeError(f"only registered methods take a layer here, got one for a {type(method).__name__}")
    check_host(method, model)
    run = method_runner(method, options)
    seed = check_seed(seed)
    size = len(x) if batch_size is None else check_positive_int(batch_size, "batch_size")
    args = options.get("additional_forward_args") if hasattr(method, "attribute") else None
    with (
        frozen(model) as host,
        seeded(seed),
        refused_sizes_told(host, tuple(x.shape[1:])),
        Progress(len(x), "attribute", show=show_progress) as progress,
    ):
        if target is not None:  # checked before anything is computed, by methods of one pass within that pass
            target = spread_target(target, len(x)).to(x.device)
            if not getattr(method if hasattr(method, "attribute") else run, "resolves_target", False):
                with torch.no_grad():
                    classes = run_host(host, x[:1], HostArgs.of(args, len(x)).row(0)).shape[1]
                target = resolve_target(target, x.new_zeros(len(x), classes))
        maps = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = x[rows]
            chosen = None if target is None else target[rows]
            if hasattr(method, "attribute"):
                run = method_runner(method, {name: _rows(name, value, x, rows) for name, value in options.items()})
            more = HostArgs.of(_rows("additional_forward_args", args, x, rows), len(part))
            explain = functools.partial(run_method, run, Call(host, part, chosen, layer, seed, batch_size, more))
            maps.append(as_maps(with_fresh_facts(host, explain), part))
            progress.step(len(part))
    return torch.cat(maps)


def _rows(name: str, option: Any, x: Tensor, rows: slice) -> Any:
    """What belongs to these images of an option of Captum's that holds one row for each of all images."""
    if name == "additional_forward_args":
        return map_tensors(option, lambda t: t[rows] if t.ndim > 0 and len(t) == len(x) else t)
    if name in ("baselines", "feature_mask"):
        return map_tensors(option, lambda t: t[rows] if t.ndim == x.ndim and len(t) == len(x) else t)
    return option


def available_methods() -> dict[str, str]:
    """Every registered method with one line about it."""
    return METHODS.summaries()


def method_runner(method: Any, options: dict[str, Any]) -> Callable[[Call], Any]:
    """Turn whatever the user wants to compare into a function of a `Call`."""
    if isinstance(method, str):
        entry = METHODS.get(method)
        known = [f.name for f in fields(entry)] if is_dataclass(entry) else []
        return entry(**take_options(options, known, f"method {method!r}"))
    if isinstance(method, type):
        raise TypeError(f"method must be an object, got the class {method.__name__}; make one of it first")
    if is_method(method):
        take_options(options, [], f"the given {type(method).__name__}")
        return method
    if hasattr(method, "attribute"):
        take = method.attribute
        chosen = options
        if not _takes_any(take):  # as NoiseTunnel does, for the method that it wraps
            known = sorted(_keywords(take) - {"inputs", "target"})
            chosen = take_options(options, known, f"{type(method).__name__}.attribute")
        if getattr(method, "resolves_target", False):  # ours: None is the top-1, found in the same pass
            return _Fitted(take, chosen)

        def explain(call: Call) -> Any:
            x, classes = _copies(call)
            with torch.enable_grad():
                return take(x, target=classes, **chosen)

        return explain
    if callable(method):
        take_options(options, [], "a function")

        def call_it(call: Call) -> Any:
            with torch.enable_grad():  # whatever the caller's mode: gradients are what such functions are about
                return method(call.model, *_copies(call))

        return call_it
    raise TypeError(
        "method must be a name, a fitted IBAttention, an object with attribute(inputs, target=...) or a function "
        f"f(model, x, target), got {type(method).__name__}"
    )


def is_method(given: Any) -> bool:
    """Whether it is an object of a method's dataclass, called with a `Call` alone; functions take three arguments."""
    if not is_dataclass(given) or isinstance(given, type) or not callable(given):
        return False
    taken = inspect.signature(given).parameters.values()
    return sum(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in taken) == 1


@dataclass(frozen=True)
class _Fitted:
    """`IBAttention.attribute` with its options."""

    attribute: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, call: Call) -> Any:
        return self.attribute(call.x, target=call.target, **self.options)


def run_method(run: Callable[[Call], Any], call: Call) -> Any:
    """What a method answers; one that is not the package's own cannot leave the host's buffers or images changed."""
    if type(run).__module__.startswith("ib_explain."):
        return run(call)
    with unharmed(call.model):
        return run(replace(call, x=call.x.clone()))


def _copies(call: Call) -> tuple[Tensor, Tensor]:
    """Images and classes that code of the user's may write into."""
    return call.x.detach().clone(), call.classes().clone()


def check_host(method: Any, model: nn.Module) -> None:
    """Refuse an `IBAttention`, or an object of Captum's, that belongs to another model.

    Raises:
        ValueError: it does.
    """
    from ib_explain.ib import IBAttention

    theirs = getattr(method, "forward_func", None)
    if not isinstance(method, IBAttention) and isinstance(theirs, nn.Module):
        if all(module is not unwrap(model) for module in theirs.modules()):  # a wrapper of the model's is fine
            raise ValueError(
                f"the given {type(method).__name__} was made for another {type(unwrap(theirs)).__name__}, not for this "
                f"{type(unwrap(model)).__name__}; make one for this very model"
            )
        return
    if isinstance(method, IBAttention) and method.host is not unwrap(model):
        raise ValueError(
            f"the given IBAttention belongs to another {type(method.host).__name__}, not to this "
            f"{type(unwrap(model)).__name__}; fit or load one for this very model, or pass the method's name, "
            "which is optimised for whatever model comes"
        )


def _keywords(function: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _takes_any(function: Callable[..., Any]) -> bool:
    """Whether it has **kwargs."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def as_maps(maps: Any, x: Tensor) -> Tensor:
    """Check a method's answer and bring it to (B, 1, H, W) float32 on x's device.

    Raises:
        TypeError: it is no tensor.
        ValueError: not one map an image, other proportions than the image's, NaN or infinite values.
    """
    if isinstance(maps, tuple) and len(maps) == 1:
        maps = maps[0]
    if isinstance(maps, np.ndarray):
        maps = torch.from_numpy(maps)
    if not isinstance(maps, Tensor):
        raise TypeError(f"the method must return a tensor (B, 1, H, W), got {type(maps).__name__}")
    if maps.ndim == 3:
        maps = maps[:, None]
    if maps.ndim != 4 or maps.shape[0] != x.shape[0]:
        raise ValueError(f"the method must return one map for each of the {len(x)} images, got {tuple(maps.shape)}")
    if maps.is_complex():
        raise TypeError(f"the method must return real maps, got {maps.dtype}")
    (height, width), (rows, columns) = x.shape[2:], maps.shape[2:]
    alike = abs(rows / height - columns / width) <= max(1 / height, 1 / width)  # a grid of the image's proportions
    if not alike or rows > height or columns > width:
        wanted = f"(B, 1, {height}, {width}), or a coarser grid of these proportions"
        raise ValueError(f"the method must return {wanted}, got {tuple(maps.shape)}")
    maps = maps.detach().to(x.device, torch.float32).sum(dim=1, keepdim=True)
    if maps.shape[2:] != x.shape[2:]:
        maps = resize(maps, (int(x.shape[2]), int(x.shape[3])))
    check_maps(maps)
    return maps
